"""Several GPUs, each with some of the blocks: a pipeline, over whose borders the chains go on.

torchrun --nproc-per-node 2 examples/pipeline.py
"""

import os

import torch
import torch.distributed as dist
from stand_ins import language_model, tokens
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.utils.data import DataLoader

from reslora_kernels import ResLoRAConfig, apply_reslora, pipeline_reslora, save_adapter


class Part(nn.Module):
    """Some decoder layers of a LLaMA, with the embedding before the first and the head after the last."""

    def __init__(self, model: nn.Module, rank: int, size: int) -> None:
        super().__init__()
        count = len(model.model.layers)
        self.layers = model.model.layers[rank * count // size : (rank + 1) * count // size]
        self.rotary = model.model.rotary_emb
        self.embed = model.model.embed_tokens if rank == 0 else None
        self.head = nn.Sequential(model.model.norm, model.lm_head) if rank == size - 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.embed is None else self.embed(x)
        rotary = self.rotary(x, torch.arange(x.shape[1], device=x.device)[None])
        for layer in self.layers:
            x = layer(x, position_embeddings=rotary)
        return x if self.head is None else self.head(x)


def loss_of(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())


dist.init_process_group()
rank, size = dist.get_rank(), dist.get_world_size()
device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu")
model = apply_reslora(language_model(), ResLoRAConfig(r=16, lora_alpha=32, shortcut="middle"))
parts = [Part(model, i, size) for i in range(size)]  # what other processes run may be on the meta device
parts[rank].to(device)
pipeline = pipeline_reslora(model, parts)
stage = PipelineStage(pipeline.stages[rank], rank, size, device)
schedule = Schedule1F1B(stage, n_microbatches=4, loss_fn=loss_of)
optimizer = torch.optim.AdamW([p for p in pipeline.stages[rank].parameters() if p.requires_grad], lr=2e-4)
model.train()
for rows in DataLoader(tokens(), batch_size=8):
    optimizer.zero_grad()
    with pipeline.step():  # lends the adapters that another stage reads, and adds up their gradients
        if rank == 0:
            schedule.step(rows.to(device))
        else:
            schedule.step(target=rows.to(device))
    optimizer.step()
pipeline.gather()  # every process has all adapters
if rank == 0:
    save_adapter(model, "adapter")
dist.barrier()
dist.destroy_process_group()

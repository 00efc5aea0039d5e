"""Several GPUs, each with a part of the frozen weights: FSDP2 by PyTorch alone, bfloat16 weights, float32 reductions.

torchrun --nproc-per-node 8 examples/fsdp2.py
"""

import os

import torch
import torch.distributed as dist
from stand_ins import language_model, tokens
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader, DistributedSampler

from reslora_kernels import ResLoRAConfig, apply_reslora, save_adapter, shard_reslora

dist.init_process_group()
kind = "cuda" if torch.cuda.is_available() else "cpu"
device = f"cuda:{os.environ['LOCAL_RANK']}" if kind == "cuda" else "cpu"
if kind == "cuda":
    torch.cuda.set_device(device)
model = language_model()
apply_reslora(model, ResLoRAConfig(r=16, lora_alpha=32, shortcut="input"))  # on the main memory, before sharding
model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
mesh = init_device_mesh(kind, (dist.get_world_size(),))
shard_reslora(model, model.model.layers, mesh=mesh, mp_policy=policy)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)  # after sharding
data = tokens()
model.train()
for rows in DataLoader(data, batch_size=4, sampler=DistributedSampler(data)):
    loss = model(input_ids=rows.to(device), labels=rows.to(device)).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
save_adapter(model, "adapter")  # in every process: the adapters are gathered, the first process writes
dist.destroy_process_group()

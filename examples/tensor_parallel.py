"""Several GPUs, pairs of which hold each layer together: a tensor parallel plan, and FSDP2 across the pairs.

torchrun --nproc-per-node 8 examples/tensor_parallel.py
"""

import os

import torch
import torch.distributed as dist
from stand_ins import language_model, tokens
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, DistributedSampler

from reslora_kernels import ResLoRAConfig, apply_reslora, save_adapter, shard_reslora

dist.init_process_group()
kind = "cuda" if torch.cuda.is_available() else "cpu"
device = f"cuda:{os.environ['LOCAL_RANK']}" if kind == "cuda" else "cpu"
if kind == "cuda":
    torch.cuda.set_device(device)
mesh = init_device_mesh(kind, (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
model = language_model().to(device)
plan = {f"model.layers.*.self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
plan |= {f"model.layers.*.mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
plan |= {f"model.layers.*.{name}_proj": RowwiseParallel() for name in ("self_attn.o", "mlp.down")}
parallelize_module(model, mesh["tp"], plan)
apply_reslora(model, ResLoRAConfig(r=16, lora_alpha=32, shortcut="middle"))  # after the plan, before sharding
shard_reslora(model, model.model.layers, mesh=mesh["dp"])
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
data = tokens()
sampler = DistributedSampler(data, num_replicas=mesh["dp"].size(), rank=mesh["dp"].get_local_rank())
model.train()
for rows in DataLoader(data, batch_size=4, sampler=sampler):  # the processes of a pair see the same rows
    loss = model(input_ids=rows.to(device), labels=rows.to(device)).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
save_adapter(model, "adapter")  # in every process: the adapters are gathered, the first process writes
dist.destroy_process_group()

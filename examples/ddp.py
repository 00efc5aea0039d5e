"""Several GPUs, the whole model on each: DistributedDataParallel as it is.

torchrun --nproc-per-node 8 examples/ddp.py
"""

import os

import torch
import torch.distributed as dist
from stand_ins import language_model, tokens
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from reslora_kernels import ResLoRAConfig, apply_reslora, save_adapter

dist.init_process_group()
device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"
model = language_model().to(device)
apply_reslora(model, ResLoRAConfig(r=16, lora_alpha=32, shortcut="block"))
model = DistributedDataParallel(model)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
data = tokens()
for rows in DataLoader(data, batch_size=4, sampler=DistributedSampler(data)):
    loss = model(input_ids=rows.to(device), labels=rows.to(device)).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
if dist.get_rank() == 0:
    save_adapter(model, "adapter")
dist.destroy_process_group()

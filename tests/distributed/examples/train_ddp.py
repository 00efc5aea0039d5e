# torchrun --nproc-per-node 8 train.py
import os

import torch
import torch.distributed as dist
from my_data import load_tokens  # yours: int64 [documents, length]
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForCausalLM

from reslora_kernels import ResLoRAConfig, apply_reslora, save_adapter

dist.init_process_group()
device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained("path/or/id").to(device)
apply_reslora(model, ResLoRAConfig(r=16, lora_alpha=32, shortcut="block"))
model = DistributedDataParallel(model)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
tokens = load_tokens()
for rows in DataLoader(tokens, batch_size=4, sampler=DistributedSampler(tokens)):
    loss = model(input_ids=rows.to(device), labels=rows.to(device)).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
if dist.get_rank() == 0:
    save_adapter(model, "adapter")
dist.destroy_process_group()

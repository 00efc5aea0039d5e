"""FSDP2 through accelerate, which gets the model sharded: its own wrapping would split the chains.

accelerate launch --use_fsdp --fsdp_version 2 --num_processes 8 examples/fsdp2_accelerate.py
"""

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from stand_ins import language_model, tokens
from torch.utils.data import DataLoader

from reslora_kernels import ResLoRAConfig, apply_reslora, save_adapter, shard_reslora

plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap", cpu_ram_efficient_loading=False)
accelerator = Accelerator(fsdp_plugin=plugin)
model = language_model()
apply_reslora(model, ResLoRAConfig(r=16, lora_alpha=32, shortcut="block"))
model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
shard_reslora(model, model.model.layers)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
loader = DataLoader(tokens(), batch_size=4)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for rows in loader:
    loss = model(input_ids=rows, labels=rows).loss
    optimizer.zero_grad()
    accelerator.backward(loss)
    optimizer.step()
save_adapter(model, "adapter")  # in every process; the first one writes
accelerator.end_training()

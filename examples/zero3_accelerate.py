"""Several GPUs, each with a part of everything: DeepSpeed's ZeRO-3 through accelerate.

accelerate launch --use_deepspeed --num_processes 8 examples/zero3_accelerate.py
"""

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from stand_ins import language_model, tokens
from torch.utils.data import DataLoader

from reslora_kernels import ResLoRAConfig, apply_reslora, save_adapter

accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(zero_stage=3, gradient_clipping=1.0))
model = language_model()  # or from_pretrained, which then makes the model in parts
apply_reslora(model, ResLoRAConfig(r=16, lora_alpha=32, shortcut="input"))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(tokens(), batch_size=4))
model.train()
for rows in loader:
    loss = model(input_ids=rows, labels=rows).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
save_adapter(model, "adapter")  # in every process: the adapters are gathered, the first process writes
accelerator.end_training()

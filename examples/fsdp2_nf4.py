"""QLoRA on several GPUs: a base in bitsandbytes' NF4, sharded by FSDP2.

torchrun --nproc-per-node 8 examples/fsdp2_nf4.py
"""

import os
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from stand_ins import language_model, tokens
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from reslora_kernels import ResLoRAConfig, apply_reslora, save_adapter, shard_reslora

kind = "cuda" if torch.cuda.is_available() else "cpu"
device = f"cuda:{os.environ['LOCAL_RANK']}" if kind == "cuda" else "cpu"
if kind == "cuda":
    torch.cuda.set_device(device)
quantization = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_compute_dtype=torch.bfloat16,
    bnb_4bit_quant_storage=torch.bfloat16,  # the policy's param_dtype, which leaves the packed weights as they are
)
with TemporaryDirectory() as folder:  # a model's folder or id takes its place
    language_model().save_pretrained(folder)  # in every process: with a process group only the first one would write
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=torch.bfloat16, device_map={"": device}
    )
dist.init_process_group()
apply_reslora(model, ResLoRAConfig(r=16, lora_alpha=32, shortcut="input"))
policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
shard_reslora(model, model.model.layers, mesh=init_device_mesh(kind, (dist.get_world_size(),)), mp_policy=policy)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
data = tokens()
model.train()
for rows in DataLoader(data, batch_size=4, sampler=DistributedSampler(data)):
    loss = model(input_ids=rows.to(device), labels=rows.to(device)).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
save_adapter(model, "adapter")  # in every process: the adapters are gathered, the first process writes
dist.destroy_process_group()

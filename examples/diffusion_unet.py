"""A diffusers UNet: the attention layers learn to remove noise; the result is merged by least squares.

python examples/diffusion_unet.py
"""

import torch
from diffusers import DDPMScheduler
from stand_ins import denoiser, latents
from torch.utils.data import DataLoader

from reslora_kernels import ResLoRAConfig, apply_reslora, export_peft, inspect, merge_reslora, save_adapter

unet = denoiser()
attention = ["to_q", "to_k", "to_v", "to_out.0"]
apply_reslora(unet, ResLoRAConfig(r=4, lora_alpha=8, target_modules=attention, shortcut="middle", pre_num=2))
print(inspect(unet))
optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=5e-3)
scheduler = DDPMScheduler(num_train_timesteps=1000)
calibration = []
for clean, captions in DataLoader(latents(), batch_size=8, shuffle=True):
    noise = torch.randn_like(clean)
    steps = torch.randint(1000, (len(clean),))
    batch = {
        "sample": scheduler.add_noise(clean, noise, steps),
        "timestep": steps,
        "encoder_hidden_states": captions,
    }
    loss = torch.nn.functional.mse_loss(unet(**batch).sample, noise)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    calibration.append(batch)

save_adapter(unet, "adapter")
unet.eval()
with torch.no_grad():
    unmerged = unet(**batch).sample
    print(merge_reslora(unet, calibration=calibration))
    merged = unet(**batch).sample
print(f"relative distance of the merged output: {float((merged - unmerged).norm() / unmerged.norm()):.1e}")
export_peft(unet, "peft-adapter")

"""A vision transformer gets a new head: the head trains whole, the linear layers get adapters.

python examples/vision_vit.py
"""

import torch
from stand_ins import image_classifier, images
from torch.utils.data import DataLoader

from reslora_kernels import ResLoRAConfig, apply_reslora, load_adapter, loraplus_groups, merge_reslora, save_adapter

model = image_classifier()
config = ResLoRAConfig(r=4, lora_alpha=8, target_modules="all-linear", shortcut="block", modules_to_save=["classifier"])
apply_reslora(model, config)
optimizer = torch.optim.AdamW(loraplus_groups(model, lr=1e-3, loraplus_lr_ratio=4))
model.train()
for batch in DataLoader(images(), batch_size=16, shuffle=True):
    loss = model(**batch).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"loss {loss.item():.3f}")

save_adapter(model, "adapter")  # adapters and head
model = load_adapter(image_classifier(), "adapter").eval()
batch = next(iter(DataLoader(images(), batch_size=16)))
with torch.no_grad():
    unmerged = model(**batch).logits
    merge_reslora(model)
    torch.testing.assert_close(model(**batch).logits, unmerged)  # block merges exactly

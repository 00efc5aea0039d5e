"""LoRA+ (Hayou et al., arXiv 2402.12354): B learns faster than A by a fixed ratio."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..checks import check_module, check_number
from ..layers.adapter import AdapterLayer


def loraplus_groups(
    model: nn.Module, *, lr: float, loraplus_lr_ratio: float, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups for any optimizer, grouped as PEFT's ``create_loraplus_optimizer`` groups them.

        optimizer = torch.optim.AdamW(loraplus_groups(model, lr=1e-4, loraplus_lr_ratio=16, weight_decay=0.01))

    Args:
        model: adapted; what does not train is left out.
        lr: of every lora_A and of other matrices that train.
        loraplus_lr_ratio: lora_B and all biases learn at ``lr`` times this, which LoRA+ wants well above 1.
        weight_decay: of all but the biases.

    Returns:
        Groups with ``params``, ``lr`` and ``weight_decay``; none of them is empty.

    Raises:
        TypeError: ``model`` is not a module, or a number is none.
        ValueError: a number is not finite or out of range, or ``model`` has no adapted layer that trains.
    """
    check_module("model", model)
    for name, value in (("lr", lr), ("loraplus_lr_ratio", loraplus_lr_ratio)):
        check_number(name, value, "a finite number above 0", lambda v: v > 0)
    check_number("weight_decay", weight_decay, "a finite number of 0 or more", lambda v: v >= 0)
    layers = [module for module in model.modules() if isinstance(module, AdapterLayer)]
    if not any(layer.lora_B.requires_grad for layer in layers):
        raise ValueError("model has no ResLoRALinear that trains: adapt it first, with apply_reslora or load_adapter")
    of_b = {id(layer.lora_B) for layer in layers}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fast = lr * loraplus_lr_ratio
    groups = [
        {"params": [p for p in trained if p.dim() != 1 and id(p) not in of_b], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) in of_b], "lr": fast, "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() == 1], "lr": fast, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]

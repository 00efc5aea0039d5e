"""LoRA+ groups are PEFT's, parameter by parameter, and train at their rates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from reslora_kernels import ResLoRAConfig, apply_reslora, loraplus_groups

from .models import llama

RATES = {"lr": 1e-3, "loraplus_lr_ratio": 16.0, "weight_decay": 0.1}


def rates_of(groups: list[dict[str, Any]], names: dict[int, str]) -> dict[str, tuple[float, float]]:
    return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


@pytest.mark.parametrize("bias", ["none", "lora_only"])
def test_groups_are_those_of_peft(bias: str) -> None:
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    def base() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))

    theirs = peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules=["0", "2"], bias=bias))
    made = create_loraplus_optimizer(theirs, torch.optim.AdamW, **{**RATES, "loraplus_weight_decay": 0.1})
    names = {
        id(p): n.removeprefix("base_model.model.").replace(".default.weight", "").replace("base_layer.", "")
        for n, p in theirs.named_parameters()
    }
    ours = base()
    apply_reslora(
        ours, ResLoRAConfig(r=2, target_modules=["0", "2"], bias=bias, shortcut="none"), example_inputs=torch.ones(1, 8)
    )
    groups = loraplus_groups(ours, **RATES)
    own_names = {id(p): n for n, p in ours.named_parameters()}
    expected = rates_of(made.param_groups, names)
    assert rates_of(groups, own_names) == {name: pytest.approx(rates) for name, rates in expected.items()}


def test_b_moves_by_the_ratio() -> None:
    model = apply_reslora(llama(), ResLoRAConfig(r=2, target_modules=["q_proj", "v_proj"], shortcut="input"))
    optimizer = torch.optim.SGD(loraplus_groups(model, lr=0.1, loraplus_lr_ratio=4, weight_decay=0.0))
    layer = model.model.layers[0].self_attn.q_proj
    before = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
    for p in (layer.lora_A, layer.lora_B):
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(before[0] - layer.lora_A, torch.full_like(before[0], 0.1))
    torch.testing.assert_close(before[1] - layer.lora_B, torch.full_like(before[1], 0.4))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lr": 0}, ValueError, "lr must be a finite number above 0, got 0"),
        ({"loraplus_lr_ratio": float("inf")}, ValueError, "loraplus_lr_ratio must be a finite number above 0, got inf"),
        ({"loraplus_lr_ratio": "16"}, TypeError, "loraplus_lr_ratio must be a finite number above 0, got '16'"),
        ({"weight_decay": -1}, ValueError, "weight_decay must be a finite number of 0 or more, got -1"),
        ({"model": "llama"}, TypeError, "model must be an nn.Module, got str"),
        ({"model": nn.Linear(2, 2)}, ValueError, "model has no ResLoRALinear that trains"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"model": nn.Linear(2, 2), **RATES, **change}
    with pytest.raises(error, match=message):
        loraplus_groups(arguments.pop("model"), **arguments)

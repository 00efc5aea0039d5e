"""Adapters on disk for tests: made, tampered with, and refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from reslora_kernels import ResLoRAConfig, apply_reslora, inspect, load_adapter
from reslora_kernels.files.adapter_format import CONFIG_NAME, WEIGHTS_NAME

from .models import Scrambled, randomize

X = torch.linspace(-1, 1, 36, dtype=torch.float64).reshape(3, 12)


def config(shortcut: str = "input", **changes: Any) -> ResLoRAConfig:
    return ResLoRAConfig(**({"r": 3, "lora_alpha": 6, "shortcut": shortcut, "pre_num": 2} | changes))


def adapted(seed: int = 1, **changes: Any) -> nn.Module:
    return randomize(apply_reslora(Scrambled(), config(**changes), example_inputs=X), seed)


def state(model: nn.Module) -> dict[str, Any]:
    """Everything a failed load must leave alone."""
    return {
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "training": [module.training for module in model.modules()],
        "trainable": {name: p.requires_grad for name, p in model.named_parameters()},
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "coverage": inspect(model) if "_reslora" in vars(model) else None,
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = state(model)
    values, expected = after.pop("values"), before["values"]
    assert after == {key: value for key, value in before.items() if key != "values"}
    assert values.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in values.items())


def refused(folder: Path, message: str | None = None, error: type[Exception] = ValueError, **changes: Any) -> None:
    """The folder is refused by a plain and by an adapted model, and both stay as they were."""
    for model in (Scrambled(), adapted(seed=9, **changes)):
        before = state(model)
        with pytest.raises(error, match=message) as caught:
            load_adapter(model, folder)
        assert str(caught.value)
        assert_unchanged(model, before)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the config as JSON."""
    values = json.loads((folder / CONFIG_NAME).read_text())
    change(values)
    (folder / CONFIG_NAME).write_text(json.dumps(values))


def put_weights(folder: Path, content: bytes) -> None:
    """Other weights under a config that vouches for them."""
    (folder / WEIGHTS_NAME).write_bytes(content)
    rewrite(folder, lambda values: values.update(weights_sha256=hashlib.sha256(content).hexdigest()))


def put_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS_NAME)
    change(tensors)
    put_weights(folder, save(tensors))

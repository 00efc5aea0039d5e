"""What needs no second process: refusals of shard_reslora, and pipeline stages whose chains end at the border."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reslora_kernels import ResLoRAConfig, apply_reslora, merge_reslora, shard_reslora
from reslora_kernels.adapt.record import adapted_layers, record_of
from reslora_kernels.reference import chain_forward
from reslora_kernels.testing import relative_error

from .distributed.residual import SHORTCUTS, Block, residual
from .models import randomize


def merged() -> nn.Module:
    model = residual("block")
    merge_reslora(model)
    return model


def other_dtype() -> nn.Module:
    model = residual("block")
    model.head.bias = nn.Parameter(model.head.bias.detach().float())
    return model


@pytest.mark.parametrize(
    ("make", "blocks", "error", "message"),
    [
        (lambda: nn.Linear(2, 2), lambda m: [], ValueError, "no ResLoRA adapters"),
        (lambda: residual("block"), lambda m: [], ValueError, "at least one module"),
        (lambda: residual("block"), lambda m: 3, TypeError, "blocks must be modules"),
        (lambda: residual("block"), lambda m: ["blocks.0"], TypeError, r"blocks\[0\] must be an nn.Module, got str"),
        (lambda: residual("block"), lambda m: [m], ValueError, "the model itself"),
        (lambda: residual("block"), lambda m: [nn.Linear(2, 2)], ValueError, "a Linear that is not in the model"),
        (lambda: residual("block"), lambda m: [m.head, m.head], ValueError, "same module twice"),
        (lambda: residual("block"), lambda m: m.blocks, RuntimeError, "init_process_group"),
        (merged, lambda m: m.blocks, ValueError, "unmerge_reslora"),
        (other_dtype, lambda m: m.blocks, ValueError, "'head.bias' is torch.float32"),
    ],
)
def test_shard_reslora_refuses(
    make: Callable[[], nn.Module], blocks: Callable[[Any], Any], error: type[Exception], message: str
) -> None:
    model = make()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(error, match=message):
        shard_reslora(model, blocks(model))
    assert [name for name, _ in model.named_modules()] == before


def test_adapters_must_not_be_ignored() -> None:
    model = residual("block")
    with pytest.raises(ValueError, match="ignored_params must not hold adapters"):
        shard_reslora(model, model.blocks, ignored_params={model.blocks[0].up.lora_A})


def test_import_leaves_fsdp_alone() -> None:
    code = "import sys, reslora_kernels as r; r.shard_reslora; print('torch.distributed.fsdp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_chains_end_at_stage_borders(shortcut: str) -> None:
    """Every stage's layers compute what the reference computes for chains of that stage alone."""
    torch.manual_seed(0)
    stages = [nn.Sequential(*(Block(12, 18) for _ in range(count))).double() for count in (2, 3)]
    config = ResLoRAConfig(r=3, lora_alpha=6, shortcut=shortcut, pre_num=-1)
    calls: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    for stage in stages:
        randomize(apply_reslora(stage, config, example_inputs=torch.zeros(1, 2, 12, dtype=torch.float64)))
        for layer in adapted_layers(stage).values():
            layer.register_forward_hook(lambda m, args, y: calls.update({m: (args[0], y)}))
    x = torch.randn(4, 5, 12, dtype=torch.float64)
    for stage in stages:
        x = stage(x)
    for stage, length in zip(stages, (2, 3), strict=True):
        assert [len(chain) for chain in record_of(stage).chains] == [length, length]
        for chain in record_of(stage).chains:
            xs, ys = zip(*(calls[layer] for layer in chain.layers), strict=True)
            weights, biases = [layer.weight for layer in chain.layers], [layer.bias for layer in chain.layers]
            loras = [[getattr(layer, kind) for layer in chain.layers] for kind in ("lora_A", "lora_B")]
            truth = chain_forward(shortcut, -1, config.scaling, list(xs), weights, biases, *loras)
            assert max(relative_error(y, expected) for y, expected in zip(ys, truth, strict=True)) < 1e-14

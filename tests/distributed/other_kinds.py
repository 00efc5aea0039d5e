"""A network with every kind of adapted layer but the linear one, under DDP and FSDP2. Scenarios for two processes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from reslora_kernels import ResLoRAConfig, apply_reslora, load_adapter, save_adapter, shard_reslora
from reslora_kernels.adapt.record import adapted_layers

from ..models import randomize
from .residual import Batch, Scenario, adapters, batch, difference, same, shared_data
from .residual import plain as one_step

TOKENS, WIDTH = 11, 8


class Experts(nn.Module):
    """One of three matrices for each token, by where its largest value is."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, WIDTH, WIDTH) / 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, WIDTH)
        chosen, y = tokens.argmax(-1) % 3, torch.zeros_like(tokens)
        for e in range(3):
            rows = (chosen == e).nonzero()[:, 0]
            y = y.index_add(0, rows, nn.functional.linear(tokens[rows], self.up[e]))
        return y.view(x.shape)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x, x, x, need_weights=False)[0]
        x = x + torch.tanh(self.conv(x.mT).mT)
        y: Tensor = x + torch.tanh(self.experts(x))
        return y


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed((4 * x[..., 0]).round().long() % TOKENS)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x)
        return y


def plain() -> Network:
    torch.manual_seed(0)
    return Network().double()


def network(shortcut: Any) -> Network:
    config = ResLoRAConfig(
        r=3, lora_alpha=6, shortcut=shortcut,
        target_modules=["embed", "attn", "conv"], target_parameters=["experts.up"],
    )  # fmt: skip
    model = plain()
    apply_reslora(model, config)
    randomize(model)
    return model


def trained(model: nn.Module, data: Callable[[int], Batch]) -> list[float]:
    """The losses of three steps by SGD: AdamW divides gradients that are all rounding by themselves."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.SGD(parameters, lr=0.1), []
    for step in range(3):
        optimizer.zero_grad()
        losses.append(float(one_step(model, data, step, lambda last: nullcontext())))
        nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
    return losses


def equals_one_process(shortcut: str, kind: str, folder: Path) -> dict[str, Any]:
    alone = network(shortcut)
    expected = trained(alone, batch), adapters(alone)
    model: Any = network(shortcut)
    model = DistributedDataParallel(model) if kind == "ddp" else shard_reslora(model, model.blocks)
    found = {"difference": difference(trained(model, shared_data), model, expected)}
    if kind == "fsdp" or dist.get_rank() == 0:
        save_adapter(model, folder / f"kinds-{kind}-{shortcut}")
    dist.barrier()
    loaded = load_adapter(plain(), folder / f"kinds-{kind}-{shortcut}")
    names = {type(layer).__name__ for layer in adapted_layers(loaded).values()}
    return found | {"equal": same(adapters(loaded), adapters(model)), "kinds": len(names)}


SCENARIOS: dict[str, Scenario] = {
    f"kinds {kind} {shortcut}": partial(equals_one_process, shortcut, kind)
    for kind in ("ddp", "fsdp")
    for shortcut in ("none", "block")
}

"""Two pipeline stages, each adapted by itself: chains end at the border. Scenarios for two processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from reslora_kernels import ResLoRAConfig, apply_reslora

from ..models import randomize
from .residual import SHORTCUTS, STEPS, Block, adapters, batch

Scenario = Callable[[Path], dict[str, Any]]


def stages(shortcut: str) -> list[nn.Module]:
    """The residual network cut after its second block; each part is the root of its own chains."""
    torch.manual_seed(0)
    embed, blocks, head = nn.Linear(6, 12), [Block(12, 18) for _ in range(5)], nn.Linear(12, 3)
    parts = [nn.Sequential(embed, *blocks[:2]).double(), nn.Sequential(*blocks[2:], head).double()]
    config = ResLoRAConfig(r=3, lora_alpha=6, shortcut=shortcut, pre_num=2)
    for part, width in zip(parts, (6, 12), strict=True):
        apply_reslora(part, config, example_inputs=torch.zeros(1, 2, width, dtype=torch.float64))
        randomize(part)
    return parts


def optimizer_of(part: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in part.parameters() if p.requires_grad], lr=1e-2)


def interleaved(shortcut: str, folder: Path) -> dict[str, Any]:
    """1F1B over four microbatches, so that several forwards of a stage precede their backwards, for three steps."""
    rank = dist.get_rank()
    part = stages(shortcut)[rank]
    stage = PipelineStage(part, rank, 2, torch.device("cpu"))

    def loss_of(y: Tensor, target: Tensor) -> Tensor:
        return nn.functional.mse_loss(y, target)

    schedule = Schedule1F1B(stage, n_microbatches=4, loss_fn=loss_of, scale_grads=True)
    optimizer = optimizer_of(part)
    for step in range(STEPS):
        x, target = batch(step)
        optimizer.zero_grad()
        if rank == 0:
            schedule.step(x)
        else:
            schedule.step(target=target)
        optimizer.step()
    whole = stages(shortcut)
    optimizers = [optimizer_of(other) for other in whole]
    for step in range(STEPS):
        x, target = batch(step)
        for other in optimizers:
            other.zero_grad()
        loss_of(whole[1](whole[0](x)), target).backward()
        for other in optimizers:
            other.step()
    own, expected = adapters(part), adapters(whole[rank])
    return {"difference": max(float((own[name] - truth).norm() / truth.norm()) for name, truth in expected.items())}


SCENARIOS: dict[str, Scenario] = {f"pipeline {shortcut}": partial(interleaved, shortcut) for shortcut in SHORTCUTS}

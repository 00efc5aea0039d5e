"""One way to take training steps, for pre-training and every method alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from reslora_kernels.cli.demo import fine_tuning


def training_steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[dict[str, Any]],
    warmup_steps: int,
    loss: Callable[[nn.Module, dict[str, Any]], Tensor],
) -> Iterator[float]:
    """A step per batch in training mode, and evaluation mode in the end; yields the losses. See the demo's."""
    model.train()
    yield from fine_tuning.training_steps(model, optimizer, batches, warmup_steps, loss)
    model.eval()

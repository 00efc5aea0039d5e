"""The time of a training step, relative to the frozen model that any adapter has to run anyway."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reslora_kernels.config import Shortcut

DEFINITION = (
    "A step is forward and backward of one batch, down to the output of the embeddings, and for adapters AdamW's "
    "update. The frozen model is the pre-trained one without adapters or any weight gradient. Models take turns; the "
    "figures are medians over the rounds, the relative time that of the quotients within a round."
)


@dataclass(frozen=True)
class StepTime:
    """Medians: milliseconds, and the quotient with the frozen model's time in the same round."""

    milliseconds: float
    relative: float


def time_steps(
    frozen: nn.Module, models: Mapping[Shortcut, nn.Module], batch: Tensor, rounds: int, each_round: Callable[[], None]
) -> tuple[float, dict[Shortcut, StepTime]]:
    """Median milliseconds of a frozen model's step, and the step times of ``models``, which are left as they are.

    One round more runs beforehand, to warm up.
    """
    steps = {name: _step(model, batch) for name, model in models.items()}
    frozen_step = _step(frozen, batch)
    frozen_times: list[float] = []
    times: dict[Shortcut, list[float]] = {name: [] for name in models}
    for i in range(rounds + 1):
        measured = _milliseconds(frozen_step)
        others = {name: _milliseconds(step) for name, step in steps.items()}
        if i:
            frozen_times.append(measured)
            for name, other in others.items():
                times[name].append(other)
        each_round()
    return statistics.median(frozen_times), {
        name: StepTime(statistics.median(own), statistics.median(a / b for a, b in zip(own, frozen_times, strict=True)))
        for name, own in times.items()
    }


def _step(model: nn.Module, batch: Tensor) -> Callable[[], None]:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.0, weight_decay=0.0) if trainable else None  # moves nothing
    embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]

    def step() -> None:
        embedded = embeddings(batch).detach().requires_grad_()
        model(inputs_embeds=embedded, labels=batch, use_cache=False).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def _milliseconds(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - start)

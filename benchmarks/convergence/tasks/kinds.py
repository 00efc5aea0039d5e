"""What a task is, and the loops that every task has: training steps, and pieces of held-out data, told as they go."""

from __future__ import annotations

import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from benchmarks.convergence.settings import R, Sizes

Item = TypeVar("Item")
Batch = dict[str, Any]  # tensors by name, examples first
AT_A_TIME = 8  # examples, where memory counts


class Task(ABC):
    """Batches to train on, a loss to minimise, and figures on data that no run trains on.

    Attributes:
        title: for headings.
        kind: of base model: "decoder", "encoder" or "unet".
        unit: of the loss.
        metrics: the names of the figures beside the loss; higher is better.
        trained_whole: names of modules that every method trains in full beside its adapters.
        targets: names of the linear layers that are adapted.
        comes_trained: ``base`` loads trained weights, which nothing needs to keep.
        r: the rank of the adapters.
    """

    title: str
    kind: str
    unit: str
    metrics: tuple[str, ...] = ()
    trained_whole: tuple[str, ...] = ()
    targets: tuple[str, ...]
    comes_trained: bool = False
    r: int = R

    @abstractmethod
    def base(self, sizes: Sizes) -> nn.Module:
        """The base model with random weights, the same every time."""

    @abstractmethod
    def pretrain(self, model: nn.Module, sizes: Sizes) -> None:
        """Train every weight of ``base``."""

    def prepared(self, model: nn.Module) -> nn.Module:
        """The pre-trained model as this task uses it; tasks of one kind share a pre-training."""
        return model

    @abstractmethod
    def train(self, sizes: Sizes, count: int, examples: int, seed: int) -> list[Batch]:
        """``count`` batches to train on, the same for the same seed."""

    @abstractmethod
    def held_out(self, sizes: Sizes, examples: int) -> Batch:
        """What figures are measured on, the same for every run."""

    @abstractmethod
    def inputs(self, batch: Batch) -> dict[str, Any]:
        """The model's keyword arguments for a batch."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean loss, worked out from the model's output: PEFT adds penalties to a model's own ``.loss``."""

    def figures(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        """``loss`` and what else is measured after every few steps, in evaluation mode."""
        with evaluating(model):
            return {"loss": float(self.loss(model, batch))}

    def final_figures(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        """What is measured at the end of a run beside ``figures``."""
        return {}

    def samples(self, model: nn.Module) -> list[Any] | None:
        """What the model makes, to be looked at: images [count, height, width] of 0 (black) to 255; None if nothing."""
        return None

    def description(self) -> dict[str, Any]:
        """What a report says of the task, and what runs on it must have in common to be compared."""
        return {"title": self.title, "kind": self.kind, "unit": self.unit} | ({"r": self.r} if self.r != R else {})


def pieces(batch: Batch, examples: int = AT_A_TIME) -> Iterator[Batch]:
    """A batch in parts of so many examples."""
    for start in range(0, len(next(iter(batch.values()))), examples):
        yield {name: tensor[start : start + examples] for name, tensor in batch.items()}


def pieces_by_length(batch: Batch) -> Iterator[Batch]:
    """A batch of texts, shortest first, in parts without the last columns that are padding in all of a part."""
    order = batch["attention_mask"].sum(1).argsort(stable=True)
    width = batch["attention_mask"].shape[1]
    for piece in told(list(pieces({name: tensor[order] for name, tensor in batch.items()})), "measuring, part"):
        used = int(piece["attention_mask"].sum(1).max())
        yield {name: tensor[:, :used] if tensor.shape[1:] == (width,) else tensor for name, tensor in piece.items()}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside the ``with`` block."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def training_steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Batch], warmup_steps: int,
    loss: Callable[[nn.Module, Batch], Tensor], done: int = 0,
) -> Iterator[float]:  # fmt: skip
    """A step per batch in training mode, and evaluation mode in the end; yields the losses.

    Gradients are clipped at norm 1; the rate rises linearly over ``warmup_steps``, then falls as a cosine to 5 % of its
    peak. Goes on behind ``done`` steps, with the optimizer in the state that it had then.
    """
    clipped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup_steps, 0.525 + 0.475 * math.cos(math.pi * step / len(batches))),
        last_epoch=done - 1,
    )
    model.train()
    for batch in told(batches, "step", done):
        value = loss(model, batch)
        optimizer.zero_grad()
        torch.autograd.backward(value)
        nn.utils.clip_grad_norm_(clipped, 1.0)
        optimizer.step()
        schedule.step()
        yield value.item()
    model.eval()


class _Said:
    """What the process is at, and when it last said so."""

    doing: str = ""
    at: float = 0.0


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Lines said inside the ``with`` block begin with this."""
    before, _Said.doing = _Said.doing, what
    try:
        yield
    finally:
        _Said.doing = before


def say(line: str) -> None:
    """Print a line with the time in UTC, at once."""
    _Said.at = time.monotonic()
    print(f"{datetime.now(timezone.utc):%H:%M:%S} {_Said.doing}{': ' if _Said.doing else ''}{line}", flush=True)


def say_at_times(line: str) -> None:
    """Say it unless something was said in the last 20 seconds, or 5 on a terminal."""
    if time.monotonic() - _Said.at > (5 if sys.stdout.isatty() else 20):
        say(line)


def told(items: Iterable[Item], what: str, done: int = 0) -> Iterator[Item]:
    """The items behind the first ``done``; every so often a line says how many are done and how long the rest takes."""
    start, todo = time.monotonic(), list(items)[done:]
    for i, item in enumerate(todo):
        if i:
            left = (time.monotonic() - start) / i * (len(todo) - i)
            say_at_times(f"{what} {done + i} of {done + len(todo)}, {spoken(left)} left")
        yield item


def spoken(seconds: float) -> str:
    """As "40 s", "12 min" or "3 h 5 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"

"""What a task is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.convergence.settings import Sizes

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
    """

    title: str
    kind: str
    unit: str
    metrics: tuple[str, ...] = ()
    trained_whole: tuple[str, ...] = ()
    targets: tuple[str, ...]
    comes_trained: bool = False

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
        """What a report says of the task."""
        return {"title": self.title, "kind": self.kind, "unit": self.unit}


def pieces(batch: Batch, examples: int = AT_A_TIME) -> Iterator[Batch]:
    """A batch in parts of so many examples."""
    for start in range(0, len(next(iter(batch.values()))), examples):
        yield {name: tensor[start : start + examples] for name, tensor in batch.items()}


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

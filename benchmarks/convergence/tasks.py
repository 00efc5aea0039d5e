"""What the methods learn: batches to train on and figures on held-out data."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reslora_kernels.cli.demo import data

IGNORED = -100
PROBLEM_BYTES = 112


@dataclass(frozen=True)
class Batch:
    """Bytes [sequences, length] and what to predict of them, ``IGNORED`` elsewhere."""

    tokens: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Task:
    """``train`` draws (count, sequences, seed) batches; ``held_out`` draws so many sequences, the same for all runs."""

    title: str
    exact_match: bool
    train: Callable[[int, int, int], list[Batch]]
    held_out: Callable[[int], Batch]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Mean loss in nats of the bytes that are to be predicted, from the logits: PEFT adds penalties to ``.loss``."""
    logits = model(input_ids=batch.tokens, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORED)


@torch.no_grad()
def figures(model: nn.Module, batch: Batch, exact_match: bool) -> dict[str, float]:
    """The loss, and the share of answers that greedy generation gets right in full.

    An answer is generated exactly if and only if each of its bytes is the most likely one after the true ones before.
    """
    training = model.training
    model.eval()
    logits = model(input_ids=batch.tokens, use_cache=False).logits[:, :-1]
    model.train(training)
    labels = batch.labels[:, 1:]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    found = {"loss": float(loss)}
    if exact_match:
        found["exact_match"] = float(((logits.argmax(-1) == labels) | (labels == IGNORED)).all(1).float().mean())
    return found


def _python_train(count: int, sequences: int, seed: int) -> list[Batch]:
    drawn = data.random_batches(data.python_source().train, count, sequences, 128, seed)
    return [Batch(tokens, tokens) for tokens in drawn]


def _python_held_out(sequences: int) -> Batch:
    tokens = data.spread_batch(data.python_source().held_out, sequences, 128)
    return Batch(tokens, tokens)


NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Ida")
THINGS = ("apples", "books", "coins", "pens", "shells", "stamps")
TEMPLATES: tuple[tuple[str, Callable[[int, int], int]], ...] = (
    ("{a} has {x} {things} and buys {y} more. How many {things} does {a} have now?", lambda x, y: x + y),
    ("{a} has {x} {things} and gives {b} {z} of them. How many are left?", lambda x, y: x - y % x),
    ("{a} and {b} each have {y} {things}, and {a} finds {x} more. How many in all?", lambda x, y: x + 2 * y),
)


def problem(generator: random.Random) -> tuple[str, str]:
    """A word problem of one or two steps, and its answer."""
    template, solve = generator.choice(TEMPLATES)
    a, b = generator.sample(NAMES, 2)
    x, y = generator.randint(2, 9), generator.randint(1, 9)
    text = template.format(a=a, b=b, x=x, y=y, z=y % x, things=generator.choice(THINGS))
    return f"{text} A: ", f"{solve(x, y)}\n"


def _problems(sequences: int, generator: random.Random) -> Batch:
    tokens = torch.full((sequences, PROBLEM_BYTES), 10)
    labels = torch.full((sequences, PROBLEM_BYTES), IGNORED)
    for row in range(sequences):
        question, answer = (part.encode() for part in problem(generator))
        whole = torch.tensor(list(question + answer))
        tokens[row, : len(whole)] = whole
        labels[row, len(question) : len(whole)] = whole[len(question) :]
    return Batch(tokens, labels)


def _arithmetic_train(count: int, sequences: int, seed: int) -> list[Batch]:
    generator = random.Random(seed)
    return [_problems(sequences, generator) for _ in range(count)]


TASKS: dict[str, Task] = {
    "python": Task("Python source after English prose", False, _python_train, _python_held_out),
    "arithmetic": Task(
        "arithmetic word problems", True, _arithmetic_train, lambda count: _problems(count, random.Random("held out"))
    ),
}


def measured(model: nn.Module, task: str, batch: Batch) -> dict[str, Any]:
    """``figures`` of a task's model."""
    return figures(model, batch, TASKS[task].exact_match)

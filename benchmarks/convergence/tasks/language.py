"""Language modelling with the demo's LLaMA over bytes: Python source, and arithmetic word problems."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.convergence.settings import Sizes
from benchmarks.convergence.tasks.kinds import Batch, Task, evaluating
from reslora_kernels.cli.demo import data, fine_tuning
from reslora_kernels.cli.demo.settings import Settings

IGNORED = -100
PROBLEM_BYTES = 112
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Language(Task):
    """Next-byte prediction; batches are {"input_ids", "labels"} [sequences, bytes], labels ``IGNORED`` elsewhere."""

    kind = "decoder"
    unit = "nats per byte"
    targets: tuple[str, ...] = LINEARS

    def base(self, sizes: Sizes) -> nn.Module:
        return fine_tuning.new_model(_demo(sizes))

    def pretrain(self, model: nn.Module, sizes: Sizes) -> None:
        """On the prose of Python's help topics."""
        text = data.prose().train
        batches = data.random_batches(text, sizes.pretraining_steps, sizes.batch, sizes.sequence, seed=0)
        fine_tuning.pretrain(model, batches.to(next(model.parameters()).device), _demo(sizes), lambda loss: None)

    def inputs(self, batch: Batch) -> dict[str, Any]:
        return {"input_ids": batch["input_ids"], "use_cache": False}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(**self.inputs(batch)).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)


class PythonSource(Language):
    title = "Python source after English prose"

    def train(self, sizes: Sizes, count: int, examples: int, seed: int) -> list[Batch]:
        drawn = data.random_batches(data.python_source().train, count, examples, sizes.sequence, seed)
        return [_whole(tokens) for tokens in drawn]

    def held_out(self, sizes: Sizes, examples: int) -> Batch:
        return _whole(data.spread_batch(data.python_source().held_out, examples, sizes.sequence))


class Arithmetic(Language):
    """Questions and answers; the loss is the answer's."""

    title = "Arithmetic word problems"
    metrics = ("exact_match",)

    def train(self, sizes: Sizes, count: int, examples: int, seed: int) -> list[Batch]:
        generator = random.Random(seed)
        return [_problems(examples, generator) for _ in range(count)]

    def held_out(self, sizes: Sizes, examples: int) -> Batch:
        return _problems(examples, random.Random("held out"))

    def figures(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        """The loss, and the share of answers that greedy generation gets right in full.

        An answer is generated exactly if and only if each byte is the most likely one after the true ones before it.
        """
        with evaluating(model):
            logits = model(**self.inputs(batch)).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        right = ((logits.argmax(-1) == labels) | (labels == IGNORED)).all(1)
        return {"loss": float(loss), "exact_match": float(right.float().mean())}


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


def _demo(sizes: Sizes) -> Settings:
    return Settings(name="convergence", **asdict(sizes))


def _whole(tokens: Tensor) -> Batch:
    return {"input_ids": tokens, "labels": tokens}


def _problems(sequences: int, generator: random.Random) -> Batch:
    tokens = torch.full((sequences, PROBLEM_BYTES), 10)
    labels = torch.full((sequences, PROBLEM_BYTES), IGNORED)
    for row in range(sequences):
        question, answer = (part.encode() for part in problem(generator))
        whole = torch.tensor(list(question + answer))
        tokens[row, : len(whole)] = whole
        labels[row, len(question) : len(whole)] = whole[len(question) :]
    return {"input_ids": tokens, "labels": labels}

"""What is measured of a trained model beside its figures: what merging costs, norms of adapters and of gradients."""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any, get_args

import torch
from torch import Tensor, nn

from benchmarks.convergence.tasks.kinds import Batch, Task, evaluating, pieces, say_at_times, spoken
from reslora_kernels import collect_statistics, export_peft, merge_reslora
from reslora_kernels.adapt.record import Record, adapted_layers, record_of
from reslora_kernels.config import MergeMethod
from reslora_kernels.layers.shortcuts import hands_on
from reslora_kernels.merge.closed_form import LowRankUpdate
from reslora_kernels.merge.merging import compute_updates, unmerge_reslora

JOINT_STEPS = 128
GRADIENT_EXAMPLES = 64  # that norms of gradients are measured on
SMALLER = (1, 4)  # calibration batches that least squares is tried with, too


def settings() -> dict[str, Any]:
    """What figures of two runs must have in common to be compared, beside their budgets."""
    return {"joint_steps": JOINT_STEPS, "joint_extra_rank": "r", "gradient_examples": GRADIENT_EXAMPLES}


def is_ours(model: nn.Module) -> bool:
    """Whether the model is adapted by this package, not by PEFT."""
    return isinstance(model.__dict__.get("_reslora"), Record)


def merges(
    model: nn.Module, base: nn.Module, task: Task, calibration: list[Batch], held_out: Batch
) -> dict[str, dict[str, float]]:
    """By method: the figures after the merge, and what a fit adds to the loss on its calibration batches.

    "served" and "served in bfloat16" are PEFT's on ``base`` with the exported adapter, of the exact merge or joint fit.
    """
    if not is_ours(model):
        return {}
    config, inputs = record_of(model).config, [task.inputs(batch) for batch in calibration]
    ways: dict[str, dict[str, Any]] = {"exact": {}}
    smaller: dict[str, dict[str, Any]] = {}
    if hands_on(config.shortcut, config.pre_num):
        smaller = {
            f"least_squares, {count}": {"method": "least_squares", "calibration": inputs[:count]}
            for count in SMALLER
            if count < len(inputs)
        }
        with torch.no_grad(), collect_statistics(model) as seen:
            for batch in inputs:
                model(**batch)
        methods: tuple[MergeMethod, ...] = get_args(MergeMethod)
        ways = smaller | {method: {"method": method, "statistics": seen} for method in methods}
        fitted = {"method": "least_squares", "calibration": inputs}
        ways |= {
            "sequential": fitted | {"sequential": True},
            "joint": fitted | {"joint_steps": JOINT_STEPS, "extra_rank": config.r},
        }
    found, unmerged = {}, mean_loss(model, task, calibration)
    for name, arguments in ways.items():
        with _passes_told(model, name):
            merge_reslora(model, **arguments)
        found[name] = task.figures(model, held_out)
        if arguments.get("method") == "least_squares" and name not in smaller:
            found[name]["calibration_added"] = mean_loss(model, task, calibration) - unmerged
        if name in ("exact", "joint"):
            found |= _served(model, base, task, held_out)
        unmerge_reslora(model)
    return found


def _served(model: nn.Module, base: nn.Module, task: Task, held_out: Batch) -> dict[str, dict[str, float]]:
    """The figures of a merged model's export under PEFT: with the base as it is, and in bfloat16 where it reads ids."""
    from peft import PeftModel

    found = {}
    inputs = [value for value in task.inputs(held_out).values() if isinstance(value, Tensor)]
    ways: dict[str, torch.dtype | None] = {"served": None}
    if not any(value.is_floating_point() for value in inputs):
        ways["served in bfloat16"] = torch.bfloat16
    with tempfile.TemporaryDirectory() as folder:
        export_peft(model, folder)
        for name, dtype in ways.items():
            own = copy.deepcopy(base).to(dtype)
            found[name] = task.figures(PeftModel.from_pretrained(own, folder).to(dtype), held_out)
    return found


@contextmanager
def _passes_told(model: nn.Module, name: str) -> Iterator[None]:
    """Lines say how many passes a merge has made."""
    start, passes = time.monotonic(), count(1)

    def told_pass(*_: Any) -> None:
        seconds = time.monotonic() - start
        say_at_times(f"merging, {name}: pass {next(passes)}, {spoken(seconds)} so far")

    handle = model.register_forward_pre_hook(told_pass)
    try:
        yield
    finally:
        handle.remove()


def mean_loss(model: nn.Module, task: Task, batches: list[Batch]) -> float:
    """In evaluation mode."""
    with evaluating(model):
        return statistics.mean(float(task.loss(model, batch)) for batch in batches)


def adapter_norms(model: nn.Module) -> dict[str, dict[str, float]]:
    """Frobenius norms of A and B of each layer."""
    if not is_ours(model):
        return {}
    return {
        name: {"A": float(layer.lora_A.detach().norm()), "B": float(layer.lora_B.detach().norm())}
        for name, layer in adapted_layers(model).items()
    }


def update_ranks(model: nn.Module) -> dict[str, dict[str, float]]:
    """Of each layer's ΔW, where merging is exact: its Frobenius norm, its rank, and its effective rank.

    The last is exp(-Σ p log p) with p the singular values' shares (Roy and Vetterli, 2007).
    """
    if not is_ours(model) or hands_on(record_of(model).config.shortcut, record_of(model).config.pre_num):
        return {}
    return {name: _spread(update) for name, update in compute_updates(model, None).items()}


def _spread(update: LowRankUpdate) -> dict[str, float]:
    with torch.no_grad():
        small = torch.linalg.qr(update.b.double()).R @ torch.linalg.qr(update.a.double().mT).R.mT  # as ΔW's, but R x R
        values = torch.linalg.svdvals(small) * update.scaling
    shares = values / values.sum()
    effective = float(torch.special.entr(shares).sum().exp()) if float(values.sum()) else 0.0
    return {"norm": float(values.norm()), "rank": update.rank, "effective_rank": effective}


def gradient_norms(model: nn.Module, task: Task, batch: Batch, at_a_time: int) -> dict[str, float]:
    """The norm of the loss's gradient by A and B of each layer together; gradients that are there are left alone.

    The loss is the mean over at most ``GRADIENT_EXAMPLES``, of which ``at_a_time`` are in memory.
    """
    if not is_ours(model):
        return {}
    layers, batch = adapted_layers(model), next(pieces(batch, GRADIENT_EXAMPLES))
    count = len(next(iter(batch.values())))
    parameters: list[Tensor] = [matrix for layer in layers.values() for matrix in (layer.lora_A, layer.lora_B)]
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    for piece in pieces(batch, at_a_time):
        share = len(next(iter(piece.values()))) / count
        for total, gradient in zip(sums, torch.autograd.grad(task.loss(model, piece), parameters), strict=True):
            total += share * gradient
    norms = torch.stack([total.square().sum() for total in sums]).view(-1, 2).sum(1).sqrt()
    return dict(zip(layers, norms.tolist(), strict=True))

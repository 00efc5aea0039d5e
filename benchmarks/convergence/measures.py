"""What is measured of a trained model beside its figures: what merging costs, norms of adapters and of gradients."""

from __future__ import annotations

import statistics
from typing import Any, get_args

import torch
from torch import Tensor, nn

from benchmarks.convergence.tasks.kinds import Batch, Task, evaluating, pieces
from reslora_kernels import collect_statistics, merge_reslora
from reslora_kernels.adapt.record import Record, adapted_layers, record_of
from reslora_kernels.config import MergeMethod
from reslora_kernels.layers.shortcuts import hands_on
from reslora_kernels.merge.merging import unmerge_reslora

JOINT_STEPS = 128
GRADIENT_EXAMPLES = 64  # that norms of gradients are measured on
SMALLER = (1, 4)  # calibration batches that least squares is tried with, too


def settings() -> dict[str, Any]:
    """What figures of two runs must have in common to be compared, beside their budgets."""
    return {"joint_steps": JOINT_STEPS, "joint_extra_rank": "r", "gradient_examples": GRADIENT_EXAMPLES}


def is_ours(model: nn.Module) -> bool:
    """Whether the model is adapted by this package, not by PEFT."""
    return isinstance(model.__dict__.get("_reslora"), Record)


def merges(model: nn.Module, task: Task, calibration: list[Batch], held_out: Batch) -> dict[str, dict[str, float]]:
    """By method: the figures after the merge, and what a fit adds to the loss on its calibration batches."""
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
        merge_reslora(model, **arguments)
        found[name] = task.figures(model, held_out)
        if arguments.get("method") == "least_squares" and name not in smaller:
            found[name]["calibration_added"] = mean_loss(model, task, calibration) - unmerged
        unmerge_reslora(model)
    return found


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

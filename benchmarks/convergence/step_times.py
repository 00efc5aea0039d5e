"""Seconds of a training step of each method: short stretches in turn, so that what else the machine does hits all."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.convergence.methods import adapted
from benchmarks.convergence.runs import append, on, read_lines
from benchmarks.convergence.settings import Experiments
from benchmarks.convergence.tasks.kinds import Task, told, training_steps
from reslora_kernels.bench.results import commit_of, machine_of

WARM_UP = 1  # steps of each stretch that are not timed
FILE = "step-times.jsonl"  # of a folder, with a line for each task; of two the later holds


def measure(base: nn.Module, task: Task, name: str, experiments: Experiments, folder: Path) -> None:
    """Add the task's times unless those of every method, of these settings, are there."""
    budget, sizes = experiments.budgets[name], experiments.sizes[task.kind]
    rounds, timed = budget.step_times
    settings = {"batch": budget.batch, "sizes": asdict(sizes), "methods": list(budget.methods)}
    settings |= {"rounds": rounds, "warm_up": WARM_UP, "timed": timed}
    if _latest(folder).get(name, {}).get("settings") == settings:
        return
    device = next(base.parameters()).device
    batches = [on(batch, device) for batch in task.train(sizes, WARM_UP + timed, budget.batch, 0)]
    seconds: dict[str, list[float]] = {method: [] for method in budget.methods}
    for method in told([*budget.methods] * rounds, "stretch"):
        seconds[method].append(one_stretch(adapted(base, task, method, len(batches), 0), task, batches, device))
    result = {
        "task": name, "settings": settings, "seconds": seconds, "machine": machine_of(device),
        "commit": commit_of(Path(__file__).parents[2]),
    }  # fmt: skip
    append(result, folder / FILE)


def one_stretch(model: nn.Module, task: Task, batches: list[dict[str, Any]], device: torch.device) -> float:
    """Median seconds of a step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4, weight_decay=0.0)
    times, start = [], time.perf_counter()
    for _ in training_steps(model, optimizer, batches, 1, task.loss):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
        start = time.perf_counter()
    return statistics.median(times[WARM_UP:])


def read_all(folder: Path) -> dict[str, dict[str, float]]:
    """By task and method, the median over the rounds."""
    return {
        task: {method: statistics.median(times) for method, times in result["seconds"].items()}
        for task, result in _latest(folder).items()
    }


def _latest(folder: Path) -> dict[str, dict[str, Any]]:
    """By task."""
    return {result["task"]: result for result in read_lines(folder / FILE)}

"""Seconds of a training step of each method: short stretches in turn, so that what else the machine does hits all."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.convergence.methods import adapted
from benchmarks.convergence.runs import on, write
from benchmarks.convergence.settings import Experiments
from benchmarks.convergence.tasks.kinds import Task
from benchmarks.convergence.training import training_steps
from reslora_kernels.bench.results import commit_of, machine_of

ROUNDS, WARM_UP, TIMED = 5, 1, 5  # rounds over the methods; steps of each that are not timed, and that are


def file_of(name: str, folder: Path) -> Path:
    return folder / "step-times" / f"{name}.json"


def measure(
    base: nn.Module, task: Task, name: str, experiments: Experiments, folder: Path, advance: Callable[[], None]
) -> None:
    """Write the task's file unless it has the times of every method of these settings; ``advance`` after each round."""
    budget, sizes, path = experiments.budgets[name], experiments.sizes[task.kind], file_of(name, folder)
    settings = {"batch": budget.batch, "sizes": asdict(sizes), "methods": list(budget.methods)}
    settings |= {"rounds": ROUNDS, "warm_up": WARM_UP, "timed": TIMED}
    if path.exists() and json.loads(path.read_text())["settings"] == settings:
        return
    device = next(base.parameters()).device
    batches = [on(batch, device) for batch in task.train(sizes, WARM_UP + TIMED, budget.batch, 0)]
    seconds: dict[str, list[float]] = {method: [] for method in budget.methods}
    for _ in range(ROUNDS):
        for method, times in seconds.items():
            times.append(_one_stretch(adapted(base, task, method, len(batches), 0), task, batches, device))
        advance()
    result = {
        "settings": settings, "seconds": seconds, "machine": machine_of(device),
        "commit": commit_of(Path(__file__).parents[2]),
    }  # fmt: skip
    path.parent.mkdir(exist_ok=True)
    write(result, path)


def _one_stretch(model: nn.Module, task: Task, batches: list[dict[str, Any]], device: torch.device) -> float:
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
        path.stem: {
            method: statistics.median(times) for method, times in json.loads(path.read_text())["seconds"].items()
        }
        for path in sorted((folder / "step-times").glob("*.json"))
    }

"""Every run of a set, several at a time if asked; what the folder has is not run again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import torch
from rich.progress import Progress
from torch import nn

from benchmarks.convergence import bases, runs, step_times
from benchmarks.convergence.settings import Experiments, Given, Sizes
from benchmarks.convergence.tasks import tasks_of
from benchmarks.convergence.tasks.kinds import Task

Item = TypeVar("Item")


def train_all(
    experiments: Experiments, tasks: Mapping[str, Task], given: Given | None, out: Path, device: str, jobs: int,
    progress: Progress,
) -> None:  # fmt: skip
    """Pre-train the base models, choose the learning rates, and train and measure the final runs."""
    threads = max(1, torch.get_num_threads() // jobs)
    of_kind = {tasks[name].kind: name for name in experiments.budgets}  # which share a pre-trained model
    bar = progress.add_task("pre-training", total=len(of_kind))
    for _ in _done(partial(_pretrain, experiments, given, out, device), list(of_kind.values()), jobs, threads):
        progress.advance(bar)
    one = partial(_one_run, experiments, given, out, device)
    for title, tuning in (("learning rates", True), ("final runs", False)):
        todo = runs.missing(experiments, tasks, out, tuning=tuning)
        bar = progress.add_task(title, total=len(todo))
        for spec in _done(one, todo, jobs, threads):
            progress.update(bar, advance=1, description=f"{title}: {spec.task}, {spec.method}")


def _done(one: Callable[[Item], Item], todo: list[Item], jobs: int, threads: int) -> Iterator[Item]:
    """Each item as it is done."""
    if jobs == 1:
        yield from map(one, todo)
        return
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (threads,))
    try:
        for future in as_completed([pool.submit(one, item) for item in todo]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)  # after an error no run is begun


def _pretrain(experiments: Experiments, given: Given | None, out: Path, device: str, name: str) -> str:
    _base(name, given, experiments.sizes[tasks_of(given)[name].kind], out, device)
    return name


def _one_run(experiments: Experiments, given: Given | None, out: Path, device: str, spec: runs.Spec) -> runs.Spec:
    task = tasks_of(given)[spec.task]
    base = _base(spec.task, given, experiments.sizes[task.kind], out, device)
    runs.add(runs.train_one(base, task, experiments, spec), out)
    return spec


@cache
def _base(name: str, given: Given | None, sizes: Sizes, out: Path, device: str) -> nn.Module:
    """A process's own copy; runs adapt copies of it."""
    return bases.base_of(tasks_of(given)[name], sizes, out, torch.device(device))


def time_steps(
    experiments: Experiments, tasks: Mapping[str, Task], given: Given | None, out: Path, device: str,
    progress: Progress,
) -> None:  # fmt: skip
    """See ``step_times``; of one task after the other, with nothing else running."""
    bar = progress.add_task("step times", total=step_times.ROUNDS * len(experiments.budgets))
    for i, name in enumerate(experiments.budgets, 1):
        base = _base(name, given, experiments.sizes[tasks[name].kind], out, device)
        step_times.measure(base, tasks[name], name, experiments, out, partial(progress.advance, bar))
        progress.update(bar, completed=step_times.ROUNDS * i)

"""Every run of a set, several at a time if asked; what the folder has is not run again, and what is to come is told."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from benchmarks.convergence import measures, runs
from benchmarks.convergence.methods import GATES, METHODS, UNGATED, adapted, base_of
from benchmarks.convergence.settings import BASELINE, GRADIENT_STEPS, Budget, Experiments, Given, Sizes
from benchmarks.convergence.tasks import tasks_of
from benchmarks.convergence.tasks.kinds import AT_A_TIME, Task, doing, pieces, say, spoken

Item = TypeVar("Item")
FORWARDS = 8  # passes over held-out data, about, of all the ways to merge


def train_all(
    experiments: Experiments, tasks: Mapping[str, Task], given: Given | None, out: Path, device: str, jobs: int
) -> None:
    """Pre-train the base models, time steps, choose the learning rates, train the final runs, and merge them."""
    threads = max(1, torch.get_num_threads() // jobs)
    of_kind = {tasks[name].kind: name for name in experiments.budgets}  # which share a pre-trained model
    for _ in _done(partial(_pretrain, experiments, given, out, device), list(of_kind.values()), jobs, threads):
        pass
    costs = {name: _cost_of(experiments, name, tasks[name], given, out, device) for name in experiments.budgets}
    _say_the_whole(experiments, tasks, costs, out, jobs)
    for name in experiments.budgets:  # one after the other, with nothing else running
        with doing(f"step times of {name}"):
            base = _base(name, given, experiments.sizes[tasks[name].kind], out, device)
            runs.time_methods(base, tasks[name], name, experiments, out)
    stages: tuple[tuple[str, Callable[..., runs.Spec], Callable[[], list[runs.Spec]]], ...] = (
        ("learning rates", _one_run, partial(runs.missing, experiments, tasks, out, tuning=True)),
        ("final runs", _one_run, partial(runs.missing, experiments, tasks, out, tuning=False)),
        ("merges", _one_merge, partial(runs.unmerged, experiments, out)),
    )
    for title, one, missing in stages:
        todo = missing()
        work = [costs[spec.task].merge(spec) if one is _one_merge else costs[spec.task].run(spec) for spec in todo]
        start, rest = time.monotonic(), sum(work)
        for i, spec in enumerate(_done(partial(one, experiments, given, out, device), todo, jobs, threads), 1):
            rest -= work[todo.index(spec)]
            pace = (time.monotonic() - start) / (sum(work) - rest)
            say(f"{title}: {i} of {len(todo)} done ({spec}); about {spoken(rest * pace)} left of these")


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


class Cost:
    """Seconds that a task's runs take here, from parts of them measured on a few examples."""

    def __init__(self, base: nn.Module, task: Task, budget: Budget, sizes: Sizes) -> None:
        device = next(base.parameters()).device
        batches = [runs.on(batch, device) for batch in task.train(sizes, runs.WARM_UP + 2, budget.batch, 0)]
        whole = task.held_out(sizes, budget.held_out)
        count, held_out = len(next(iter(whole.values()))), runs.on(next(pieces(whole)), device)
        model = adapted(base, task, BASELINE, len(batches), 0)
        self._budget = budget
        self.step = runs.one_stretch(model, task, batches, device)
        task.figures(model, held_out)  # the first call imports what it needs
        self.measuring = _seconds(partial(task.figures, model, held_out)) * count / AT_A_TIME
        self.generating = _seconds(partial(task.final_figures, model, held_out))
        if task.kind == "decoder":  # digits are as many whatever is held out
            self.generating *= min(budget.generated, count) / AT_A_TIME

    def run(self, spec: runs.Spec) -> float:
        steps, evaluations = self._budget.steps * self.step, 1 if spec.tunes else self._budget.evaluations
        if spec.tunes:
            return steps + evaluations * self.measuring
        gradients = len(self._budget.gradient_steps or (0, 1)) * measures.GRADIENT_EXAMPLES / self._budget.batch
        return steps + evaluations * self.measuring + gradients * self.step + self.generating

    def merge(self, spec: runs.Spec) -> float:
        if spec.method.split("-")[0] not in ("input", "middle"):
            return self.measuring
        fits = (measures.JOINT_STEPS + 4 * self._budget.calibration_batches) * self.step
        return FORWARDS * self.measuring + fits * self._budget.calibration_batch / self._budget.batch


def _cost_of(experiments: Experiments, name: str, task: Task, given: Given | None, out: Path, device: str) -> Cost:
    sizes = experiments.sizes[task.kind]
    return Cost(_base(name, given, sizes, out, device), task, experiments.budgets[name], sizes)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _say_the_whole(
    experiments: Experiments, tasks: Mapping[str, Task], costs: dict[str, Cost], out: Path, jobs: int
) -> None:
    """What there is to do, and about how long it takes: before it begins."""
    found = runs.read_all(out)
    for name, budget in experiments.budgets.items():
        cost, only = costs[name], experiments.only((name,))
        tuning = runs.missing(only, tasks, out, tuning=True)
        final = [runs.Spec(name, method, 0.0, seed) for seed in experiments.seeds for method in budget.methods]
        have = {replace(spec, rate=0.0): result.get("merges") for spec, result in found.items()}
        todo = tuning + [spec for spec in final if spec not in have]
        merged = [spec for spec in final if spec.seed in experiments.seeds[: budget.merged_seeds]]
        merged = [spec for spec in merged if METHODS[spec.method].merges and not have.get(spec)]
        whole = sum(map(cost.run, todo)) + sum(map(cost.merge, merged))
        rounds, timed = budget.step_times
        whole += rounds * (timed + runs.WARM_UP) * len(budget.methods) * cost.step
        say(
            f"{tasks[name].title}: {len(todo)} runs and {len(merged)} merges, about {spoken(whole / jobs)} on this "
            f"machine (a step {cost.step:.2g} s, measuring {spoken(cost.measuring)}, generating "
            f"{spoken(cost.generating)})"
        )


def _pretrain(experiments: Experiments, given: Given | None, out: Path, device: str, name: str) -> str:
    with doing(f"the base model of {name}"):
        _base(name, given, experiments.sizes[tasks_of(given)[name].kind], out, device)
    return name


def _one_run(experiments: Experiments, given: Given | None, out: Path, device: str, spec: runs.Spec) -> runs.Spec:
    task = tasks_of(given)[spec.task]
    with doing(str(spec)):
        base = _base(spec.task, given, experiments.sizes[task.kind], out, device)
        runs.add(runs.train_one(base, task, experiments, spec, out), out)
    return spec


def _one_merge(experiments: Experiments, given: Given | None, out: Path, device: str, spec: runs.Spec) -> runs.Spec:
    task = tasks_of(given)[spec.task]
    with doing(str(spec)):
        base = _base(spec.task, given, experiments.sizes[task.kind], out, device)
        runs.add(runs.merge_one(base, task, experiments, runs.read_all(out)[spec], out), out)
    return spec


@cache
def _base(name: str, given: Given | None, sizes: Sizes, out: Path, device: str) -> nn.Module:
    """A process's own copy; runs adapt copies of it."""
    return base_of(tasks_of(given)[name], sizes, out, torch.device(device))


def of_given(
    given: Given, *, methods: str, steps: int, batch: int, sequence: int, held_out: int, rates: str, seeds: int,
    evaluations: int = 6, generated: int = 64, merged_seeds: int | None = None,
) -> Experiments:  # fmt: skip
    """The set of runs of ``given``; ``methods`` and ``rates`` are separated by commas.

    Raises:
        ValueError: a method that is not there, or a rate that is no number above 0.
    """
    names = tuple(dict.fromkeys((BASELINE, *methods.split(","))))
    for name in names:
        if name not in METHODS:
            gated = f"a shortcut's with {', '.join(f'-{ending}' for ending in GATES)} after it"
            raise ValueError(f"--methods must be of {', '.join(UNGATED)}, or {gated}, got {name!r}")
    try:
        numbers = tuple(float(rate) for rate in rates.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) <= 0:
        raise ValueError(f"--rates must be numbers above 0, as in 1e-4,3e-4, got {rates!r}")
    budget = Budget(
        methods=names, steps=steps, evaluations=min(steps, evaluations), batch=batch, held_out=held_out, rates=numbers,
        tuning_runs=1, calibration_batch=batch, warmup_steps=max(1, min(steps // 10, 100)), generated=generated,
        gradient_steps=tuple(step for step in GRADIENT_STEPS if step <= steps), merged_seeds=merged_seeds,
        step_times=(3, 2),
    )  # fmt: skip
    sizes = {given.kind: Sizes(sequence=sequence, pretraining_steps=0)}
    return Experiments(name="given", sizes=sizes, budgets={given.task: budget}, seeds=tuple(range(seeds)))

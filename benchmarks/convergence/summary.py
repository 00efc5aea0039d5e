"""Runs compared over seeds: means, spreads, paired tests against LoRA, steps and seconds to LoRA's final loss."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from benchmarks.convergence.runs import Spec
from benchmarks.convergence.settings import TUNING_SEED

BASELINE = "lora"


@dataclass(frozen=True)
class Row:
    """A method on a task. ``difference`` is to LoRA's final loss with the same seed; p of a paired t-test, None if one.

    ``steps`` and ``seconds`` are medians over the seeds that reached the final loss of LoRA with the same seed.
    """

    task: str
    method: str
    rate: float
    seeds: int
    parameters: int
    loss: float
    spread: float
    difference: float
    p: float | None
    loss_at_loras_time: float
    reached: int
    steps: float | None
    seconds: float | None
    exact_match: float | None
    lost_shares: dict[str, list[float]]


def crossing(curve: list[dict[str, Any]], key: str, target: float) -> float | None:
    """Where a run's loss is ``target`` first, in ``key`` ("step" or "seconds"), interpolated; None if never."""
    for before, after in zip([curve[0], *curve], curve, strict=False):
        if after["loss"] <= target:
            span = before["loss"] - after["loss"]
            share = (before["loss"] - target) / span if span else 1.0
            return float(before[key] + share * (after[key] - before[key]))
    return None


def loss_at(curve: list[dict[str, Any]], seconds: float) -> float:
    """A run's loss after so many seconds of training, interpolated; its last one if it was done by then."""
    for before, after in pairwise(curve):
        if after["seconds"] >= seconds:
            share = (seconds - before["seconds"]) / (after["seconds"] - before["seconds"])
            return float(before["loss"] + share * (after["loss"] - before["loss"]))
    return float(curve[-1]["loss"])


def summarize(results: list[dict[str, Any]]) -> list[Row]:
    """One row per task and method with final runs; LoRA first, then by final loss.

    Raises:
        ValueError: a task has no final run of LoRA, or a method lacks seeds that LoRA has.
    """
    final: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
    for result in results:
        spec = Spec(**result["spec"])
        if spec.seed != TUNING_SEED:
            final.setdefault(spec.task, {}).setdefault(spec.method, {})[spec.seed] = result
    rows: list[Row] = []
    for task, methods in sorted(final.items(), reverse=True):
        if BASELINE not in methods:
            raise ValueError(f"task {task!r} has no final run of {BASELINE!r} to compare with")
        found = [_row(task, method, runs, methods[BASELINE]) for method, runs in methods.items()]
        rows += sorted(found, key=lambda row: (row.method != BASELINE, row.loss))
    return rows


def _row(task: str, method: str, runs: dict[int, dict[str, Any]], lora: dict[int, dict[str, Any]]) -> Row:
    from scipy.stats import ttest_rel

    if runs.keys() != lora.keys():
        raise ValueError(f"{task}, {method}: seeds {sorted(runs)} are not LoRA's {sorted(lora)}; finish the set first")
    seeds = sorted(runs)
    own, theirs = [runs[s]["curve"] for s in seeds], [lora[s]["curve"] for s in seeds]
    losses, targets = [c[-1]["loss"] for c in own], [c[-1]["loss"] for c in theirs]
    paired = method != BASELINE and len(seeds) > 1
    steps, seconds = (
        [at for c, t in zip(own, targets, strict=True) if (at := crossing(c, key, t)) is not None]
        for key in ("step", "seconds")
    )
    matches = [c[-1]["exact_match"] for c in own if "exact_match" in c[-1]]
    first = runs[seeds[0]]
    return Row(
        task, method, first["spec"]["rate"], len(seeds), first["trained_parameters"],
        statistics.mean(losses), statistics.stdev(losses) if len(seeds) > 1 else 0.0,
        statistics.mean(a - b for a, b in zip(losses, targets, strict=True)),
        float(ttest_rel(losses, targets).pvalue) if paired else None,
        statistics.mean(loss_at(c, t[-1]["seconds"]) for c, t in zip(own, theirs, strict=True)),
        len(steps), statistics.median(steps) if steps else None, statistics.median(seconds) if seconds else None,
        statistics.mean(matches) if matches else None,
        {name: [runs[s]["merges"][name]["lost_share"] for s in seeds] for name in first["merges"]},
    )  # fmt: skip

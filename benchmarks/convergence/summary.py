"""Runs compared over seeds: means, spreads, paired tests against LoRA, steps and seconds to LoRA's final loss."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Any

import numpy as np

from benchmarks.convergence.runs import Spec
from benchmarks.convergence.settings import BASELINE, SHORTCUTS

Runs = dict[int, dict[str, Any]]  # results by seed
HEADLINE = {"cola": "matthews"}  # GLUE's figure of a task where it is not the first of those beside the loss


@dataclass(frozen=True)
class Row:
    """A method on a task. ``difference`` is to LoRA's final loss with the same seed; p of a paired t-test, None if one.

    ``steps`` is the median over the seeds of the step at which the final loss of LoRA with the same seed was reached;
    None if it never was by half of them; ``reached`` counts those by which it was. ``loss_at_loras_time`` is after as
    many seconds as all of LoRA's steps take. ``metrics`` are means, with the spread, of what is measured beside the
    loss; ``paired`` is, for the loss and each of them, the mean difference to LoRA with the same seed, and its p.
    ``gain`` is what training takes off the loss, the mean, with ``gain_spread``; in each of ``merges``, one for each
    seed that was merged, ``added`` is what the merge puts back.
    """

    task: str
    method: str
    rate: float
    seeds: int
    parameters: int
    step_seconds: float
    loss: float
    spread: float
    difference: float
    p: float | None
    loss_at_loras_time: float
    reached: int
    steps: float | None
    metrics: dict[str, tuple[float, float]]
    paired: dict[str, tuple[float, float]]
    gain: float
    gain_spread: float
    merges: dict[str, list[dict[str, float]]]

    @property
    def seconds(self) -> float | None:
        """To the final loss of LoRA."""
        return None if self.steps is None else self.steps * self.step_seconds

    def lost(self, merge: str) -> tuple[float, float]:
        """What a merge adds to the loss, as a share of the mean gain: the mean over the seeds, and in the worst.

        NaN where the gain is less than twice its standard error.
        """
        if self.gain <= 2 * self.gain_spread / math.sqrt(self.seeds):
            return math.nan, math.nan
        added = [figures["added"] for figures in self.merges[merge]]
        return statistics.mean(added) / self.gain, max(added) / self.gain

    @property
    def verdict(self) -> str:
        """Whether the loss differs from LoRA's, at the 5 % level."""
        if self.p is None or math.isnan(self.p):
            return ""
        if self.p >= 0.05:
            return "no significant difference"
        return "better than LoRA" if self.difference < 0 else "worse than LoRA"


def crossing(curve: list[dict[str, Any]], target: float) -> float | None:
    """The step at which a run's loss is ``target`` first, interpolated; None if never."""
    for before, after in zip([curve[0], *curve], curve, strict=False):
        if after["loss"] <= target:
            span = before["loss"] - after["loss"]
            share = (before["loss"] - target) / span if span else 1.0
            return float(before["step"] + share * (after["step"] - before["step"]))
    return None


def loss_at(curve: list[dict[str, Any]], step: float) -> float:
    """A run's loss after so many steps, interpolated; its last if it was done by then."""
    for before, after in pairwise(curve):
        if before["step"] <= step < after["step"]:
            share = (step - before["step"]) / (after["step"] - before["step"])
            return float(before["loss"] + share * (after["loss"] - before["loss"]))
    return float(curve[-1]["loss"])


def final_runs(results: list[dict[str, Any]]) -> dict[str, dict[str, Runs]]:
    """By task, method and seed; runs that tuned a rate are left out, and seeds that a method of the task lacks.

    Raises:
        ValueError: a method has final runs with two rates.
    """
    found = every_final_run(results)
    for methods in found.values():
        common = set[int].intersection(*(set(runs) for runs in methods.values()))
        methods |= {method: {seed: runs[seed] for seed in sorted(common)} for method, runs in methods.items()}
    return {task: methods for task, methods in found.items() if all(methods.values())}


def every_final_run(results: list[dict[str, Any]]) -> dict[str, dict[str, Runs]]:
    """By task, method and seed, whichever seeds a method has; the same error."""
    found: dict[str, dict[str, Runs]] = {}
    for result in results:
        spec = Spec(**result["spec"])
        if not spec.tunes:
            runs = found.setdefault(spec.task, {}).setdefault(spec.method, {})
            runs[spec.seed] = result
            if len(rates := sorted({run["spec"]["rate"] for run in runs.values()})) > 1:
                raise ValueError(f"{spec.task}, {spec.method}: final runs with rates {rates}; keep those of one")
    return found


def description_of(runs: dict[str, Runs]) -> dict[str, Any]:
    """Of the task that these runs by method are of."""
    description: dict[str, Any] = next(iter(next(iter(runs.values())).values()))["task"]
    return description


def rates_tried(results: list[dict[str, Any]]) -> dict[str, dict[tuple[str, float], tuple[float, float]]]:
    """By task, and by method and learning rate: final loss of the runs that judged the rate, mean and spread."""
    losses: dict[str, dict[tuple[str, float], list[float]]] = {}
    for result in results:
        spec = Spec(**result["spec"])
        if spec.tunes:
            found = losses.setdefault(spec.task, {}).setdefault((spec.method, spec.rate), [])
            found.append(result["curve"][-1]["loss"])
    return {task: {key: mean_and_spread(own) for key, own in found.items()} for task, found in losses.items()}


def summarize(results: list[dict[str, Any]], step_seconds: dict[str, dict[str, float]]) -> list[Row]:
    """One row per task and method, LoRA first, then by loss; ``step_seconds`` by task and method.

    Raises:
        ValueError: a task has no final run of LoRA, or no step times.
    """
    rows: list[Row] = []
    for task, methods in final_runs(results).items():
        if BASELINE not in methods:
            raise ValueError(f"task {task!r} has no final run of {BASELINE!r} to compare with")
        times = step_seconds.get(task, {})
        if missing := methods.keys() - times.keys():
            raise ValueError(f"task {task!r} has no step times of {', '.join(sorted(missing))}: begin its set again")
        found = [_row(task, method, runs, methods[BASELINE], times) for method, runs in methods.items()]
        rows += sorted(found, key=lambda row: (row.method != BASELINE, row.loss))
    return rows


def _row(task: str, method: str, runs: Runs, lora: Runs, times: dict[str, float]) -> Row:
    from scipy.stats import ttest_rel

    seeds = sorted(runs)
    own, theirs = [runs[s]["curve"] for s in seeds], [lora[s]["curve"] for s in seeds]
    losses, targets = [c[-1]["loss"] for c in own], [c[-1]["loss"] for c in theirs]
    paired = method != BASELINE and len(seeds) > 1
    steps = [crossing(c, t) for c, t in zip(own, targets, strict=True)]
    as_long = own[0][-1]["step"] * times[BASELINE] / times[method]  # steps in the time of all of LoRA's
    first = runs[seeds[0]]
    names = metrics_of(first)
    return Row(
        task, method, first["spec"]["rate"], len(seeds), first["trained_parameters"],
        times[method],
        *mean_and_spread(losses),
        statistics.mean(a - b for a, b in zip(losses, targets, strict=True)),
        float(ttest_rel(losses, targets).pvalue) if paired else None,
        statistics.mean(loss_at(c, as_long) for c in own),
        *_reached(steps),
        {name: mean_and_spread([runs[s]["final"][name] for s in seeds]) for name in names},
        {name: _paired(runs, lora, name) for name in ("loss", *names)} if paired else {},
        *mean_and_spread([c[0]["loss"] - c[-1]["loss"] for c in own]),
        {name: [_merged(runs[s], name) for s in seeds if runs[s]["merges"]] for name in first["merges"]},
    )  # fmt: skip


def _paired(runs: Runs, lora: Runs, name: str) -> tuple[float, float]:
    """The mean difference of a final figure over the seeds, and p of a paired t-test: 1 where no seed differs."""
    from scipy.stats import ttest_rel

    own, theirs = ([of[seed]["final"][name] for seed in sorted(runs)] for of in (runs, lora))
    p = 1.0 if own == theirs else float(ttest_rel(own, theirs).pvalue)
    return statistics.mean(a - b for a, b in zip(own, theirs, strict=True)), p


def _reached(steps: list[float | None]) -> tuple[int, float | None]:
    """How many did, and the median of all, of which those that did not come last."""
    found = statistics.median(math.inf if at is None else at for at in steps)
    return sum(at is not None for at in steps), found if math.isfinite(found) else None


def _merged(result: dict[str, Any], name: str) -> dict[str, float]:
    figures: dict[str, float] = result["merges"][name]
    return figures | {"added": figures["loss"] - result["curve"][-1]["loss"]}


def metrics_of(result: dict[str, Any]) -> list[str]:
    """The figures of a final run beside its loss."""
    return [name for name in result["final"] if name not in ("step", "seconds", "loss")]


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation, NaN if a value is; the latter is 0 for one value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def shortcuts_of(names: Iterable[str]) -> list[str]:
    """Of each shortcut the methods to speak of: that with the default pre_num, or all where there is none."""
    found: list[str] = []
    for shortcut in SHORTCUTS:
        own = [name for name in names if name.split("-")[0] == shortcut]
        found += [shortcut] if shortcut in own else own
    return found


def headline(row: Row) -> str:
    """The name of the figure that a task is judged by, beside the loss; "loss" if there is none."""
    return _judged_by(row.task, row.metrics)


def _judged_by(task: str, metrics: Iterable[str]) -> str:
    return HEADLINE.get(task, next(iter(metrics), "loss"))


def holm(ps: list[float]) -> list[float]:
    """Holm's adjusted p-values: the i-th smallest of n times n - i, none below a smaller one's, none above 1."""
    found, least = [0.0] * len(ps), 0.0
    for place, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        least = max(least, min(1.0, (len(ps) - place) * ps[i]))
        found[i] = least
    return found


@dataclass(frozen=True)
class Comparison:
    """A final figure of ``method`` on a task, and that of ``beside`` with the same seeds: means, and their difference.

    ``p`` is that of a paired t-test, ``corrected`` after Holm's correction over all of the family.
    """

    task: str
    method: str
    beside: str
    figure: str
    seeds: int
    mean: float
    besides: float
    difference: float
    p: float
    corrected: float


def compared(
    results: list[dict[str, Any]], tasks: Iterable[str], pairs: Iterable[tuple[str, str]], figure: str
) -> list[Comparison]:
    """A family of tests: of each task and each pair of methods by ``figure``, "loss" or "headline".

    Raises:
        ValueError: a pair has fewer than three seeds in common; and as for ``final_runs``.
    """
    every, found = every_final_run(results), []
    for task, (method, beside) in product(tasks, pairs):
        own, theirs = (every.get(task, {}).get(name, {}) for name in (method, beside))
        if len(seeds := sorted(own.keys() & theirs.keys())) < 3:
            raise ValueError(f"{task}: {method!r} and {beside!r} must have three seeds in common, got {seeds}")
        name = figure if figure == "loss" else _judged_by(task, metrics_of(own[seeds[0]]))
        own, theirs = ({seed: runs[seed] for seed in seeds} for runs in (own, theirs))
        means = (statistics.mean(run["final"][name] for run in runs.values()) for runs in (own, theirs))
        found.append(Comparison(task, method, beside, name, len(seeds), *means, *_paired(own, theirs, name), 1.0))
    corrected = holm([comparison.p for comparison in found])
    return [replace(comparison, corrected=p) for comparison, p in zip(found, corrected, strict=True)]


def mean_update(runs: Runs) -> dict[str, float]:
    """Of the layers' ΔW, means over layers and seeds of "norm", "rank" and "effective_rank"; {} if not measured."""
    if not all(result.get("update_ranks") for result in runs.values()):
        return {}
    layers = [layer for result in runs.values() for layer in result["update_ranks"].values()]
    return {name: statistics.mean(layer[name] for layer in layers) for name in ("norm", "rank", "effective_rank")}


def gradient_ratios(runs: Runs, lora: Runs) -> dict[str, tuple[float, float]]:
    """By step: gradient norms to those of LoRA with the same seed, in the first third of the layers and in the last.

    Geometric means over layers and seeds.
    """
    first = next(iter(runs.values()))["gradient_norms"]

    def ratio(step: str, part: slice) -> float:
        own = [
            math.log(norm / lora[seed]["gradient_norms"][step][name])
            for seed, result in runs.items()
            for name, norm in list(result["gradient_norms"][step].items())[part]
        ]
        return math.exp(statistics.mean(own))

    thirds = {step: len(norms) // 3 for step, norms in first.items()}
    return {step: (ratio(step, slice(n)), ratio(step, slice(-n, None))) for step, n in thirds.items()}


@dataclass(frozen=True)
class OverTasks:
    """A method on several tasks: what it takes off LoRA's final loss, as shares of what LoRA's training takes off.

    ``low`` and ``high`` are a 95 % t-interval of the mean; ``p`` is that of a two-sided sign test of ``better`` in all.
    """

    method: str
    shares: list[float]
    mean: float
    low: float
    high: float
    better: int
    p: float


def over_tasks(rows: list[Row]) -> list[OverTasks]:
    """Of each shortcut that ran on two tasks or more."""
    from scipy.stats import binomtest, t

    gains = {row.task: row.gain for row in rows if row.method == BASELINE}
    found = []
    for method in shortcuts_of(dict.fromkeys(row.method for row in rows)):
        shares = [-row.difference / gains[row.task] for row in rows if row.method == method]
        if len(shares) < 2:
            continue
        mean, spread = mean_and_spread(shares)
        reach = float(t.ppf(0.975, len(shares) - 1)) * spread / math.sqrt(len(shares))
        better = sum(share > 0 for share in shares)
        found.append(
            OverTasks(
                method, shares, mean, mean - reach, mean + reach, better,
                float(binomtest(better, sum(share != 0 for share in shares)).pvalue) if any(shares) else 1.0,
            )
        )  # fmt: skip
    return found

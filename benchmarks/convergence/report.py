"""REPORT.md and report.html with their figures, from a folder's runs and nothing else."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from benchmarks.convergence.measures import JOINT_STEPS
from benchmarks.convergence.methods import METHODS
from benchmarks.convergence.pages import Section, draw_all, html, markdown
from benchmarks.convergence.pages import table as table
from benchmarks.convergence.runs import read_all, read_step_times
from benchmarks.convergence.settings import BASELINE, SHORTCUTS, R
from benchmarks.convergence.summary import (
    Row,
    Runs,
    description_of,
    final_runs,
    gradient_ratios,
    headline,
    holm,
    mean_update,
    over_tasks,
    rates_tried,
    shortcuts_of,
    summarize,
)

GOAL = {"up to 4": 0.01, "all": 0.02}  # of fine-tuning's gain that the best fit may lose, by pre_num


def in_short(folder: Path) -> list[Section]:
    """Two sections with a row for each task of a folder of runs: does a shortcut pay, and what does merging cost?

    Raises:
        ValueError: as for ``write_report``.
    """
    results = list(read_all(folder).values())
    every = summarize(results, read_step_times(folder))
    budgets = [result["budget"] for result in results]
    batches, examples = (max(b[f"calibration_{name}"] for b in budgets) for name in ("batches", "batch"))
    learnt, merged = [], []
    for task, runs in final_runs(results).items():
        rows = {row.method: row for row in every if row.task == task}
        title, lora = description_of(runs)["title"], rows[BASELINE]
        cells = (f"{rows[m].difference:+.4f} (p {_p(rows[m])}), {_steps(rows[m], lora)}" for m in SHORTCUTS)
        learnt.append((title, f"{lora.loss:.4f}", *cells))
        merged.append((title, *(_merge_costs(rows[m]) for m in SHORTCUTS if "joint" in rows[m].merges)))
    return [
        Section(
            "Learning", 4,
            "Final held-out loss to LoRA's; p of a paired t-test over the seeds, each alone: of 20 comparisons without "
            "a difference one is below 0.05; the median step at which LoRA's final loss with the same seed is first "
            "reached, LoRA's own in brackets; by how many seeds, if not all.",
            ("task", "LoRA", *(METHODS[method].title for method in SHORTCUTS)), learnt,
        ),
        Section(
            "Merging", 4,
            "The share of the gain in held-out loss that is lost by the better merge of the paper / by least squares / "
            f"by a joint fit of {JOINT_STEPS} steps after it at twice the rank, on at most {batches} calibration "
            f"batches of at most {examples} examples. `block` merges exactly.",
            ("task", *(METHODS[method].title for method in SHORTCUTS if method != "block")), merged,
        ),
    ]  # fmt: skip


def _merge_costs(row: Row) -> str:
    paper = min(row.lost(name)[0] for name in ("input", "weights"))
    return " / ".join((_share(paper, 0), *(_share(row.lost(name)[0], 1) for name in ("least_squares", "joint"))))


def write_report(folder: Path) -> Path:
    """Write both reports beside the runs and return the path of the HTML one.

    Raises:
        ValueError: the folder has no runs that can be compared (see ``summarize``).
    """
    results = list(read_all(folder).values())
    if not results:
        raise ValueError(f"{str(folder)!r} has no runs: python -m benchmarks.convergence run --out {folder}")
    rows = summarize(results, read_step_times(folder))
    by_task, tried = final_runs(results), rates_tried(results)
    if not by_task:
        raise ValueError(f"{str(folder)!r} has no seed yet that every method has run with")
    sections = [Section("Convergence", 1, _provenance(results)), _headline(rows, by_task), _corrected(rows, by_task)]
    sections += [_over_tasks(rows), _merge_goal(rows)]
    for task, runs in by_task.items():
        sections += _task([row for row in rows if row.task == task], runs, tried.get(task, {}))
    sections.append(Section("Figures", images=tuple(draw_all(by_task, rows, folder))))
    for name, render in (("REPORT.md", markdown), ("report.html", html)):
        (folder / name).write_text(render(sections))
    return folder / "report.html"


def _provenance(results: list[dict[str, Any]]) -> str:
    machine = results[0]["machine"]
    commits = sorted({str(result["commit"][0])[:10] for result in results})
    return (
        "Each method adapts a copy of the same pre-trained model for the same number of steps, on the same batches for "
        "the same seed. The learning rate of each is the best of the same grid in runs with seeds that no other run "
        "has, by the loss on the same held-out examples as all losses here. "
        f"{machine.get('gpu') or machine['cpu']}, {machine['threads']} threads a run, torch {machine['torch']}, commit "
        f"{', '.join(commits)}."
    )


def _headline(rows: list[Row], by_task: dict[str, dict[str, Runs]]) -> Section:
    """What a user asks first: how soon is LoRA's final loss reached, and is the loss lower in the end?"""
    lines = []
    for row in rows:
        lora = next(other for other in rows if other.task == row.task and other.method == BASELINE)
        if row.method in shortcuts_of(by_task[row.task]):
            lines.append(
                (
                    description_of(by_task[row.task])["title"], METHODS[row.method].title, _steps(row, lora),
                    _seconds(row, lora), f"{row.difference:+.4f}", _p(row), row.verdict,
                )
            )  # fmt: skip
    return Section(
        "Steps and seconds to LoRA's final loss",
        text="Where the final loss of LoRA with the same seed is first reached: medians over the seeds, those that do "
        "not get there last; LoRA's own in brackets; and by how many seeds, if not all. Each p stands alone: of 20 "
        "comparisons without a difference one is below 0.05.",
        header=("task", "method", "steps", "seconds", "final loss to LoRA's", "p", "verdict"),
        rows=lines,
    )


def _corrected(rows: list[Row], by_task: dict[str, dict[str, Runs]]) -> Section:
    """The tests of all tasks and shortcuts as one family, of the figure that a task is judged by and of the loss."""
    tested = [row for row in rows if row.paired and row.method in shortcuts_of(by_task[row.task])]
    names = [(headline(row), "loss") for row in tested]
    ps = [holm([row.paired[own[i]][1] for row, own in zip(tested, names, strict=True)]) for i in (0, 1)]
    lines = [
        (
            description_of(by_task[row.task])["title"], METHODS[row.method].title, str(row.seeds), _spoken(own[0]),
            *(cell for i in (0, 1) for cell in (f"{row.paired[own[i]][0]:+.4f}", f"{ps[i][k]:.2g}")),
        )
        for k, (row, own) in enumerate(zip(tested, names, strict=True))
    ]  # fmt: skip
    return Section(
        "Corrected for the number of tests",
        text="The mean difference to LoRA with the same seeds after the last step, of the figure that a task is judged "
        "by and of the held-out loss; p of paired t-tests after Holm's correction over all rows, for either family.",
        header=("task", "method", "seeds", "figure", "to LoRA's", "p, Holm", "loss to LoRA's", "p, Holm"),
        rows=lines,
    )


def _over_tasks(rows: list[Row]) -> Section:
    return Section(
        "Over tasks",
        text="What a shortcut takes off LoRA's final loss, as a share of what LoRA's training takes off the loss: the "
        "mean over the tasks with a 95 % t-interval, and on how many it takes off anything, with p of a sign test.",
        header=("method", "tasks", "mean share", "95 % interval", "better on", "p"),
        rows=[
            (
                METHODS[found.method].title, str(len(found.shares)), f"{found.mean:+.1%}",
                f"{found.low:+.1%} to {found.high:+.1%}", str(found.better), f"{found.p:.2g}",
            )
            for found in over_tasks(rows)
        ],
    )  # fmt: skip


def _merge_goal(rows: list[Row]) -> Section:
    lines = []
    for row in (row for row in rows if "joint" in row.merges):
        goal, lost = GOAL["all" if row.method.endswith("-all") else "up to 4"], row.lost("joint")[0]
        unseen, seen = (
            statistics.mean(merge[k] for merge in row.merges["joint"]) for k in ("added", "calibration_added")
        )
        lines.append(
            (
                row.task, METHODS[row.method].title, f"{row.gain:.4f} ± {row.gain_spread:.4f}", f"{unseen:+.4f}",
                f"{seen:+.4f}", _share(lost, 2), f"{goal:.0%}",
                "" if math.isnan(lost) else "met" if lost <= goal else "missed",
            )
        )  # fmt: skip
    return Section(
        "What merging by least squares and a joint fit costs",
        text="What training takes off the held-out loss, ± standard deviation; what the merge, with the joint fit at "
        "twice the adapter's rank, adds to it, and to the loss on the batches that it was fitted to; the share of the "
        "gain that is lost, if the gain is more than two standard errors; means over the seeds. Where it adds to "
        "held-out loss alone, more calibration batches would help; where it adds as much to both, its fit is at its "
        "limit.",
        header=("task", "method", "gain", "added", "added, calibration data", "lost", "goal", ""),
        rows=lines,
    )


def _task(rows: list[Row], runs: dict[str, Runs], tried: dict[tuple[str, float], tuple[float, float]]) -> list[Section]:
    about, lora = description_of(runs), rows[0]
    budget = next(iter(runs[BASELINE].values()))["budget"]
    metrics = tuple(lora.metrics)
    return [
        Section(
            about["title"],
            text=f"{budget['steps']} steps of {budget['batch']} examples, r = {about.get('r', R)}, {lora.seeds} seeds; "
            f"loss in {about['unit']}; mean ± standard deviation; p of a paired t-test of the final losses over seeds.",
        ),
        Section(
            "Equal steps", 3,
            header=("method", "parameters", "rate", "final loss", "to LoRA's", "p", *(_spoken(m) for m in metrics)),
            rows=[
                (
                    METHODS[row.method].title, f"{row.parameters:,}", f"{row.rate:g}",
                    f"{row.loss:.4f} ± {row.spread:.4f}", _difference(row, row.difference), _p(row),
                    *("{:.1%} ± {:.1%}".format(*row.metrics[metric]) for metric in metrics),
                )
                for row in rows
            ],
        ),
        Section(
            "Equal time", 3,
            "The loss after as many seconds as LoRA's steps take; and how soon LoRA's final loss is reached.",
            header=("method", "ms a step", "loss at LoRA's time", "to LoRA's", "steps to LoRA's loss", "seconds"),
            rows=[
                (
                    METHODS[row.method].title, f"{row.step_seconds * 1e3:.1f}", f"{row.loss_at_loras_time:.4f}",
                    _difference(row, row.loss_at_loras_time - lora.loss), _steps(row, lora), _seconds(row, lora),
                )
                for row in rows
            ],
        ),
        *_learning_rates(tried),
        *_updates(rows, runs),
        *_gradients(runs),
        *_merging(rows, metrics, budget),
    ]  # fmt: skip


def _learning_rates(tried: dict[tuple[str, float], tuple[float, float]]) -> list[Section]:
    if not tried:
        return []
    methods, rates = dict.fromkeys(method for method, _ in tried), sorted({rate for _, rate in tried})

    def loss(method: str, rate: float) -> str:
        return "{:.4f} ± {:.4f}".format(*tried[method, rate]) if (method, rate) in tried else ""

    return [
        Section(
            "Learning rates", 3,
            "Final loss of the runs that chose each method's rate, mean ± standard deviation. Where the best is at an "
            "end of the grid, a rate beyond it might be better still. A method with another pre_num has the rate of "
            "its shortcut.",
            ("method", *(f"{rate:g}" for rate in rates)),
            [(METHODS[method].title, *(loss(method, rate) for rate in rates)) for method in methods],
        )
    ]  # fmt: skip


def _updates(rows: list[Row], runs: dict[str, Runs]) -> list[Section]:
    """Whether a shortcut's update is larger, or of higher rank, than LoRA's: where it is one matrix a layer."""
    own = [(row, update) for row in rows if (update := mean_update(runs[row.method]))]
    return own and [
        Section(
            "Updates", 3, "Of the layers' ΔW at the end, means over layers and seeds: Frobenius norm, rank, and "
            "effective rank (exp of the entropy of the singular values' shares).",
            ("method", "rate", "norm", "rank", "effective rank"),
            [
                (
                    METHODS[row.method].title, f"{row.rate:g}", f"{update['norm']:.3f}",
                    *(f"{update[name]:.2f}" for name in ("rank", "effective_rank")),
                )
                for row, update in own
            ],
        )
    ]  # fmt: skip


def _gradients(runs: dict[str, Runs]) -> list[Section]:
    """Whether a shortcut lets more gradient through to the adapters, and to which."""
    methods, lora = shortcuts_of(runs), runs[BASELINE]
    if not methods or not all(result["gradient_norms"] for result in lora.values()):
        return []
    return [
        Section(
            "Gradients", 3, "The norm of the held-out loss's gradient by A and B of a layer, to that of LoRA with the "
            "same seed after as many steps: in the first third of the layers / in the last.",
            ("method", *(f"step {step}" for step in next(iter(lora.values()))["gradient_norms"])),
            [
                (METHODS[m].title, *(f"{a:.2f} / {b:.2f}" for a, b in gradient_ratios(runs[m], lora).values()))
                for m in methods
            ],
        )
    ]  # fmt: skip


def _merging(rows: list[Row], metrics: tuple[str, ...], budget: dict[str, Any]) -> list[Section]:
    """The share of fine-tuning's gain that each merge loses, and the figures after it."""
    merged = [row for row in rows if row.merges.keys() - {"exact"}]
    if not merged:
        return []
    names = dict.fromkeys(name for row in merged for name in row.merges if not name.startswith("least_squares, "))
    if all("joint" in row.merges for row in merged):
        names.pop("exact", None)

    def share(row: Row, name: str) -> str:
        if name not in row.merges:
            return ""
        mean, worst = row.lost(name)
        return f"{_share(mean, 1)} ({_share(worst, 1)})"

    def figure(row: Row, name: str, metric: str) -> str:
        if name not in row.merges:
            return ""
        mean = statistics.mean(merge[metric] for merge in row.merges[name])
        return f"{mean:.4f}" if metric == "loss" else f"{mean:.1%}"

    after = ("loss", *(metric for metric in metrics if metric in next(iter(merged[0].merges.values()))[0]))
    return [
        Section(
            "Merging", 3, "What merging adds to the loss, mean over the seeds (worst seed), as a share of "
            f"fine-tuning's mean gain; fitted to {budget['calibration_batches']} batches of "
            f"{budget['calibration_batch']} examples.",
            ("method", *names), [(METHODS[row.method].title, *(share(row, name) for name in names)) for row in merged],
        ),
        *(
            Section(
                f"{_spoken(metric).capitalize()} before and after merging", 4, "",
                ("method", "before", *names),
                [
                    (
                        METHODS[row.method].title,
                        f"{row.loss:.4f}" if metric == "loss" else f"{row.metrics[metric][0]:.1%}",
                        *(figure(row, name, metric) for name in names),
                    )
                    for row in merged
                ],
            )
            for metric in after
        ),
    ]  # fmt: skip


def _spoken(metric: str) -> str:
    return "F1" if metric == "f1" else metric.replace("_", " ")


def _difference(row: Row, value: float) -> str:
    return "" if row.method == BASELINE else f"{value:+.4f}"


def _p(row: Row) -> str:
    return "" if row.p is None else f"{row.p:.2g}"


def _steps(row: Row, lora: Row) -> str:
    reached = f", {row.reached} of {row.seeds} seeds" if row.reached < row.seeds else ""
    return f"{_or_never(row.steps, 0)} ({_or_never(lora.steps, 0)}){reached}"


def _seconds(row: Row, lora: Row) -> str:
    return f"{_or_never(row.seconds, 1)} ({_or_never(lora.seconds, 1)})"


def _or_never(value: float | None, digits: int) -> str:
    return "never" if value is None else f"{value:.{digits}f}"


def _share(value: float, digits: int) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}%}"

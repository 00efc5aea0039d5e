"""REPORT.md and one figure per task, from a folder's runs and nothing else."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.convergence.methods import METHODS
from benchmarks.convergence.runs import Spec, read_all
from benchmarks.convergence.settings import TUNING_SEED
from benchmarks.convergence.summary import BASELINE, Row, summarize
from benchmarks.convergence.tasks import TASKS


def write_report(folder: Path) -> Path:
    """Write the report beside the runs and return its path.

    Raises:
        ValueError: the folder has no runs, or not all of a set (see ``summarize``).
    """
    results = read_all(folder)
    if not results:
        raise ValueError(f"{str(folder)!r} has no runs: python -m benchmarks.convergence run --out {folder}")
    rows = summarize(results)
    parts = ["# Convergence", _provenance(results)]
    for task in dict.fromkeys(row.task for row in rows):
        own = [row for row in rows if row.task == task]
        figure = f"{task}.png"
        _draw(task, results, folder / figure)
        parts += [f"## {TASKS[task].title}", _losses(own), f"![losses over steps]({figure})", _merge_table(own)]
    report = folder / "REPORT.md"
    report.write_text("\n\n".join(part for part in parts if part) + "\n")
    return report


def _provenance(results: list[dict[str, Any]]) -> str:
    machine, budget = results[0]["machine"], results[0]["budget"]
    model = budget["model"]
    commits = sorted({str(result["commit"][0])[:10] for result in results})
    return (
        f"A LLaMA over bytes ({model['layers']} layers of width {model['hidden_size']}), pre-trained on English prose "
        f"for {model['pretraining_steps']} steps, then {budget['steps']} steps of {model['batch']} sequences with each "
        f"method. Learning rates are the best of a grid on a seed of their own. {machine['cpu']}, {machine['threads']} "
        f"threads, torch {machine['torch']}, commit {', '.join(commits)}. Losses are held-out nats per predicted byte."
    )


def _losses(rows: list[Row]) -> str:
    matched = any(row.exact_match is not None for row in rows)
    header = (
        "| method | parameters | rate | final loss | to LoRA, same seed | p | loss at LoRA's time "
        "| steps to LoRA's loss | seconds |" + (" exact match |" if matched else "")
    )
    lines = [header, "|---" * header.count("|", 1) + "|"]
    for row in rows:
        reached = f" ({row.reached} of {row.seeds})" if row.reached < row.seeds else ""
        difference = "" if row.method == BASELINE else f"{row.difference:+.4f}"
        line = (
            f"| {METHODS[row.method].title} | {row.parameters:,} | {row.rate:g} | {row.loss:.4f} ± {row.spread:.4f} | "
            f"{difference} | {'' if row.p is None else f'{row.p:.2g}'} | "
            f"{row.loss_at_loras_time:.4f} | {'never' if row.steps is None else f'{row.steps:.0f}{reached}'} | "
            f"{'' if row.seconds is None else f'{row.seconds:.1f}'} |"
        )
        lines.append(line + (f" {row.exact_match:.1%} |" if row.exact_match is not None else ""))
    tests = f"{rows[0].seeds} seeds; mean ± standard deviation; p of a paired t-test over seeds."
    return "\n".join(lines) + f"\n\n{tests}"


def _merge_table(rows: list[Row]) -> str:
    """The share of fine-tuning's gain that each merge loses: the mean over seeds and the worst seed."""
    merged = [row for row in rows if row.lost_shares.keys() - {"exact"}]
    if not merged:
        return ""
    names = list(merged[0].lost_shares)
    lines = ["Share of fine-tuning's gain in loss that merging lost, mean (worst seed):", ""]
    lines += ["| method | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row in merged:
        cells = [f"{statistics.mean(row.lost_shares[n]):.1%} ({max(row.lost_shares[n]):.1%})" for n in names]
        lines.append(f"| {METHODS[row.method].title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _draw(task: str, results: list[dict[str, Any]], path: Path) -> None:
    """Mean loss over steps with the seeds' spread."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    curves: dict[str, list[list[dict[str, Any]]]] = {}
    for result in results:
        spec = Spec(**result["spec"])
        if spec.task == task and spec.seed != TUNING_SEED:
            curves.setdefault(spec.method, []).append(result["curve"])
    for method, seeds in curves.items():
        steps = [point["step"] for point in seeds[0]][1:]
        losses = [[curve[i]["loss"] for curve in seeds] for i in range(1, len(steps) + 1)]
        mean = [statistics.mean(values) for values in losses]
        line = axes.plot(steps, mean, label=METHODS[method].title, linewidth=2 if method == BASELINE else 1.3)[0]
        axes.fill_between(steps, [min(v) for v in losses], [max(v) for v in losses], color=line.get_color(), alpha=0.12)
    axes.set(xlabel="step", ylabel="held-out loss, nats per byte", title=TASKS[task].title)
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.25)
    figure.savefig(path, dpi=130)

"""The figures of a report. Each function draws from runs or rows, and returns False where they hold nothing to draw."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.convergence.methods import METHODS
from benchmarks.convergence.settings import BASELINE, SHORTCUTS
from benchmarks.convergence.summary import Row, Runs


@contextmanager
def _axes(path: Path, columns: int = 1, rows: int = 1, size: tuple[float, float] = (7, 4.2)) -> Iterator[Any]:
    """Axes to draw on, written to ``path`` in the end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    yield figure.subplots(rows, columns, squeeze=False)
    figure.savefig(path, dpi=110)


def losses(runs: dict[str, Runs], path: Path, about: dict[str, Any]) -> bool:
    """Mean loss over steps, with the range of the seeds; the two largest ranks' and peers' curves included."""
    with _axes(path, size=(8, 4.6)) as axes:
        for method, seeds in runs.items():
            curves = [result["curve"][1:] for result in seeds.values()]
            steps = [point["step"] for point in curves[0]]
            values = [[curve[i]["loss"] for curve in curves] for i in range(len(steps))]
            mean = [statistics.mean(v) for v in values]
            width = 2.2 if method == BASELINE else 1.2
            line = axes[0, 0].plot(steps, mean, label=METHODS[method].title, linewidth=width)[0]
            axes[0, 0].fill_between(
                steps, [min(v) for v in values], [max(v) for v in values], color=line.get_color(), alpha=0.08
            )
        axes[0, 0].set(xlabel="step", ylabel=f"held-out loss, {about['unit']}", title=about["title"])
        axes[0, 0].legend(frameon=False, fontsize=7, ncols=2)
        axes[0, 0].grid(alpha=0.25)
    return True


def pre_num(rows: list[Row], path: Path, about: dict[str, Any]) -> bool:
    """Final loss of ``block`` and ``middle`` with 0 (LoRA), 1, 2, 4 and all earlier blocks."""
    labels = ("0", "1", "2", "4", "all")
    found = {row.method: row for row in rows}
    names = {s: [BASELINE, f"{s}-1", s, f"{s}-4", f"{s}-all"] for s in ("block", "middle")}
    if not all(name in found for own in names.values() for name in own):
        return False
    with _axes(path) as axes:
        for shortcut, own in names.items():
            means, spreads = ([getattr(found[name], key) for name in own] for key in ("loss", "spread"))
            axes[0, 0].errorbar(labels, means, spreads, label=shortcut, capsize=3, marker="o")
        axes[0, 0].set(xlabel="pre_num (0: LoRA)", ylabel=f"final loss, {about['unit']}")
        axes[0, 0].legend(frameon=False)
        axes[0, 0].grid(alpha=0.25)
    return True


def calibration(rows: list[Row], path: Path) -> bool:
    """Share of the gain that plain least squares loses, by number of calibration batches."""
    merged = [row for row in rows if "least_squares" in row.merges]
    if not merged:
        return False
    with _axes(path) as axes:
        for row in merged:
            smaller = [name for name in row.merges if name.startswith("least_squares, ")]
            counts = [name.split(", ")[1] for name in smaller] + ["all"]
            means = [100 * row.lost(name)[0] for name in (*smaller, "least_squares")]
            axes[0, 0].plot(counts, means, marker="o", label=METHODS[row.method].title)
        axes[0, 0].axhline(1, color="grey", linewidth=0.8, linestyle="--")
        axes[0, 0].set(xlabel="calibration batches", ylabel="% of the gain lost by merging")
        axes[0, 0].legend(frameon=False, fontsize=8)
        axes[0, 0].grid(alpha=0.25)
    return True


def norms(runs: dict[str, Runs], path: Path) -> bool:
    """Mean over seeds of ‖A‖ and ‖B‖ less LoRA's with the same seed, layers in the order of the model."""
    own = _ours(runs, "adapter_norms")
    if not own:
        return False
    with _axes(path, columns=2, size=(10, 3.8)) as axes:
        for ax, matrix in zip(axes[0], "AB", strict=True):
            for method in own:
                names = list(next(iter(runs[method].values()))["adapter_norms"])
                differences = [
                    statistics.mean(
                        result["adapter_norms"][name][matrix] - runs[BASELINE][seed]["adapter_norms"][name][matrix]
                        for seed, result in runs[method].items()
                    )
                    for name in names
                ]
                ax.plot(differences, label=METHODS[method].title, linewidth=1)
            ax.axhline(0, color="grey", linewidth=0.8)
            ax.set(xlabel="layer", ylabel=f"‖{matrix}‖ less LoRA's")
            ax.grid(alpha=0.25)
        axes[0, 0].legend(frameon=False, fontsize=8)
    return True


def gradients(runs: dict[str, Runs], path: Path) -> bool:
    """Mean over seeds of the gradient's norm by A and B of each layer, after the first and the last evaluation."""
    own = _ours(runs, "gradient_norms")
    if not own:
        return False
    steps = list(next(iter(runs[own[0]].values()))["gradient_norms"])
    with _axes(path, columns=len(steps), size=(10, 3.8)) as axes:
        for ax, step in zip(axes[0], steps, strict=True):
            for method in (BASELINE, *own):
                seeds = list(runs[method].values())
                names = list(seeds[0]["gradient_norms"][step])
                ax.plot(
                    [statistics.mean(result["gradient_norms"][step][name] for result in seeds) for name in names],
                    label=METHODS[method].title,
                    linewidth=1,
                )
            ax.set(xlabel="layer", ylabel="gradient norm", yscale="log", title=f"after step {step}")
            ax.grid(alpha=0.25)
        axes[0, 0].legend(frameon=False, fontsize=8)
    return True


def samples(runs: dict[str, Runs], path: Path) -> bool:
    """One row of images per method and evaluated step, of the first seed."""
    first = {method: next(iter(seeds.values())).get("samples") for method, seeds in runs.items()}
    shown = [(method, step, images) for method, own in first.items() if own for step, images in own.items()]
    if not shown:
        return False
    shown.sort(key=lambda row: (int(row[1]), list(runs).index(row[0])))
    count = len(shown[0][2])
    with _axes(path, columns=count, rows=len(shown), size=(0.7 * count + 2.5, 0.75 * len(shown))) as axes:
        for line, (method, step, images) in zip(axes, shown, strict=True):
            for ax, image in zip(line, images, strict=True):
                ax.imshow(image, cmap="gray", vmin=0, vmax=255)
                ax.set(xticks=[], yticks=[])
            line[0].set_ylabel(
                f"{METHODS[method].title}, {step} ", rotation=0, fontsize=8,
                horizontalalignment="right", verticalalignment="center",
            )  # fmt: skip
    return True


def _ours(runs: dict[str, Runs], key: str) -> list[str]:
    """The methods with a shortcut that have this measure, if LoRA has it, too."""
    if not next(iter(runs[BASELINE].values()))[key]:
        return []
    return [method for method in SHORTCUTS if method in runs and next(iter(runs[method].values()))[key]]

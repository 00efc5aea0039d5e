"""How a report looks: its sections as Markdown and as HTML, and its figures, each with panels for every task."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.convergence.methods import METHODS
from benchmarks.convergence.settings import BASELINE
from benchmarks.convergence.summary import Row, Runs, description_of, shortcuts_of

PRE_NUM = {s: (BASELINE, f"{s}-1", s, f"{s}-4", f"{s}-all") for s in ("block", "middle")}  # 0, 1, 2, 4 and all
Panel = Callable[[Any], None]  # draws on the axes that it is given


@dataclass(frozen=True)
class Section:
    """A heading, what is said under it, a table, and figures by file name."""

    title: str
    level: int = 2
    text: str = ""
    header: tuple[str, ...] = ()
    rows: list[tuple[str, ...]] = field(default_factory=list)
    images: tuple[tuple[str, str], ...] = ()


def table(section: Section) -> str:
    """In Markdown."""
    lines = [section.header, ("---",) * len(section.header), *section.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown(sections: list[Section]) -> str:
    parts: list[str] = []
    for section in sections:
        parts += [f"{'#' * section.level} {section.title}", section.text]
        if section.rows:
            parts.append(table(section))
        parts += [f"![{text}]({name})" for name, text in section.images]
    return "\n\n".join(part for part in parts if part) + "\n"


def html(sections: list[Section]) -> str:
    parts: list[str] = []
    for section in sections:
        parts.append(f"<h{section.level}>{escape(section.title)}</h{section.level}>\n<p>{escape(section.text)}</p>")
        if section.rows:
            lines = [_line("th", section.header), *(_line("td", row) for row in section.rows)]
            parts.append(f'<div class="wide"><table>\n{"".join(lines)}</table></div>')
        parts += [f'<img src="{escape(name)}" alt="{escape(text)}">' for name, text in section.images]
    return PAGE.format(title=escape(sections[0].title), body="\n".join(parts))


def _line(cell: str, texts: tuple[str, ...]) -> str:
    return f"<tr>{''.join(f'<{cell}>{escape(text)}</{cell}>' for text in texts)}</tr>\n"


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
body {{ margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 64rem;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }}
h2 {{ margin-top: 2.5rem; border-top: 1px solid; padding-top: 1rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: .86rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .35rem .6rem; text-align: right; border-bottom: 1px solid; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
img {{ display: block; max-width: 100%; height: auto; margin: 1rem 0; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def draw_all(by_task: dict[str, dict[str, Runs]], rows: list[Row], folder: Path) -> list[tuple[str, str]]:
    """Write what there is to draw into the folder; the names of its files, with what they show."""
    every = [(runs, [row for row in rows if row.task == task]) for task, runs in by_task.items()]
    with_pre_num = [own for own in every if all(name in own[0] for names in PRE_NUM.values() for name in names)]
    learning: list[Panel] = [partial(_losses, runs) for runs, _ in every]
    learning += [partial(_pre_num, *own) for own in with_pre_num]
    merging: list[Panel] = [partial(_calibration, *own) for own in every if _merged(own[1])]
    layers = [panel for runs, _ in every for panel in _layers(runs)]
    drawn = [
        ("learning", "Loss over steps, and final loss against pre_num", partial(_grid, learning, 3, (7, 4.2))),
        ("merging", "Merging by least squares against calibration batches", partial(_grid, merging, 4, (4.4, 3.6))),
        ("layers", "Norms of adapters and gradients by layer", partial(_grid, layers, 4, (4.4, 3.4))),
        ("samples", "Images at equal steps, first seed", partial(_samples, [runs for runs, _ in every])),
    ]
    return [(f"{name}.png", title) for name, title, draw in drawn if draw(folder / f"{name}.png")]


@contextmanager
def _figure(path: Path, width: float, height: float) -> Iterator[Any]:
    """A figure of so many inches, written to ``path`` in the end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    yield figure
    figure.savefig(path, dpi=90)


def _grid(panels: list[Panel], columns: int, size: tuple[float, float], path: Path) -> bool:
    """Draw the panels line by line, each of ``size`` inches; False if there is none."""
    if not panels:
        return False
    columns = min(columns, len(panels))
    lines = math.ceil(len(panels) / columns)
    with _figure(path, columns * size[0], lines * size[1]) as figure:
        for i, panel in enumerate(panels, 1):
            axes = figure.add_subplot(lines, columns, i)
            panel(axes)
            axes.grid(alpha=0.25)
    return True


def _losses(runs: dict[str, Runs], axes: Any) -> None:
    """Mean loss over steps, with the range of the seeds."""
    for method, seeds in runs.items():
        curves = [result["curve"][1:] for result in seeds.values()]
        steps = [point["step"] for point in curves[0]]
        values = [[curve[i]["loss"] for curve in curves] for i in range(len(steps))]
        mean = [statistics.mean(v) for v in values]
        width = 2.2 if method == BASELINE else 1.2
        line = axes.plot(steps, mean, label=METHODS[method].title, linewidth=width)[0]
        axes.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=line.get_color(), alpha=0.08)
    about = description_of(runs)
    axes.set(xlabel="step", ylabel=f"held-out loss, {about['unit']}", title=about["title"])
    axes.legend(frameon=False, fontsize=7, ncols=2)


def _pre_num(runs: dict[str, Runs], rows: list[Row], axes: Any) -> None:
    """Final loss of ``block`` and ``middle`` with each pre_num."""
    found, about = {row.method: row for row in rows}, description_of(runs)
    for shortcut, names in PRE_NUM.items():
        means, spreads = ([getattr(found[name], key) for name in names] for key in ("loss", "spread"))
        axes.errorbar(("0", "1", "2", "4", "all"), means, spreads, label=shortcut, capsize=3, marker="o")
    axes.set(xlabel="pre_num (0: LoRA)", ylabel=f"final loss, {about['unit']}", title=about["title"])
    axes.legend(frameon=False)


def _merged(rows: list[Row]) -> list[Row]:
    return [row for row in rows if "least_squares" in row.merges]


def _calibration(runs: dict[str, Runs], rows: list[Row], axes: Any) -> None:
    """Share of the gain that plain least squares loses, by number of calibration batches."""
    for row in _merged(rows):
        smaller = [name for name in row.merges if name.startswith("least_squares, ")]
        counts = [name.split(", ")[1] for name in smaller] + ["all"]
        means = [100 * row.lost(name)[0] for name in (*smaller, "least_squares")]
        axes.plot(counts, means, marker="o", label=METHODS[row.method].title)
    axes.axhline(1, color="grey", linewidth=0.8, linestyle="--")
    axes.set(xlabel="calibration batches", ylabel="% of the gain lost by merging")
    axes.set_title(description_of(runs)["title"], fontsize=9)
    axes.legend(frameon=False, fontsize=8)


def _layers(runs: dict[str, Runs]) -> list[Panel]:
    """Four panels of measures by layer, in the order of the model; none if these runs have no such measures."""
    lora = next(iter(runs[BASELINE].values()))
    if not lora["adapter_norms"]:
        return []
    steps = lora["gradient_norms"]
    norms: list[Panel] = [partial(_norms, runs, matrix) for matrix in "AB"]
    return [*norms, *(partial(_gradients, runs, step) for step in steps)]


def _norms(runs: dict[str, Runs], matrix: str, axes: Any) -> None:
    """Mean over seeds of ‖A‖ or ‖B‖ less LoRA's with the same seed."""
    for method in _shortcuts(runs):
        names = list(next(iter(runs[method].values()))["adapter_norms"])
        differences = [
            statistics.mean(
                result["adapter_norms"][name][matrix] - runs[BASELINE][seed]["adapter_norms"][name][matrix]
                for seed, result in runs[method].items()
            )
            for name in names
        ]
        axes.plot(differences, label=METHODS[method].title, linewidth=1)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(xlabel="layer", ylabel=f"‖{matrix}‖ less LoRA's")
    axes.set_title(description_of(runs)["title"], fontsize=9)
    axes.legend(frameon=False, fontsize=7)


def _gradients(runs: dict[str, Runs], step: str, axes: Any) -> None:
    """Mean over seeds of the gradient's norm by A and B together."""
    for method in (BASELINE, *_shortcuts(runs)):
        norms = [result["gradient_norms"][step] for result in runs[method].values()]
        means = [statistics.mean(own[name] for own in norms) for name in norms[0]]
        axes.plot(means, label=METHODS[method].title, linewidth=1)
    axes.set(xlabel="layer", ylabel=f"gradient norm after step {step}", yscale="log")
    axes.set_title(description_of(runs)["title"], fontsize=9)
    axes.legend(frameon=False, fontsize=7)


def _shortcuts(runs: dict[str, Runs]) -> list[str]:
    return shortcuts_of(runs)


def _samples(every: list[dict[str, Runs]], path: Path) -> bool:
    """Tasks side by side; False if none has images."""
    blocks = [(description_of(runs)["title"], images) for runs in every if (images := _images(runs))]
    if not blocks:
        return False
    height = 0.5 + 0.75 * max(len(images) for _, images in blocks)
    with _figure(path, sum(2.5 + 0.7 * len(images[0][1]) for _, images in blocks), height) as figure:
        parts = figure.subfigures(1, len(blocks), squeeze=False)[0]
        for part, (title, images) in zip(parts, blocks, strict=True):
            part.suptitle(title, fontsize=9)
            _lines_of_images(part, images)
    return True


def _images(runs: dict[str, Runs]) -> list[tuple[str, Any]]:
    """By evaluated step and method, of the first seed: what stands before a line of images, and those."""
    first = {method: next(iter(seeds.values())).get("samples") or {} for method, seeds in runs.items()}
    steps = sorted({int(step) for own in first.values() for step in own})
    return [
        (f"{METHODS[method].title}, {step} ", own[str(step)])
        for step in steps
        for method, own in first.items()
        if str(step) in own
    ]


def _lines_of_images(figure: Any, lines: list[tuple[str, Any]]) -> None:
    grid = figure.subplots(len(lines), len(lines[0][1]), squeeze=False)
    for axes, (label, images) in zip(grid, lines, strict=True):
        for ax, image in zip(axes, images, strict=True):
            ax.imshow(image, cmap="gray", vmin=0, vmax=255)
            ax.set(xticks=[], yticks=[])
        axes[0].set_ylabel(label, rotation=0, fontsize=8, horizontalalignment="right", verticalalignment="center")

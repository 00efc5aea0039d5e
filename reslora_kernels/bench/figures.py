"""The figures as PNG, drawn once for a light and once for a dark page, and the numbers behind them, bars included.

Figures without data are left out.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from reslora_kernels.bench.results import TIMED, Measurement, ModelMeasurement, Result, share


@dataclass(frozen=True)
class Theme:
    """``ink`` for text and lines on ``paper``; ``grid`` for what should stay in the background."""

    name: str
    paper: str
    ink: str
    grid: str


LIGHT = Theme("light", "#ffffff", "#1f2937", "#d9dee6")
DARK = Theme("dark", "#161b22", "#e6e9ee", "#343c48")
THEMES = (LIGHT, DARK)


def new_figure(theme: Theme, rows: int, height: float, dpi: int = 130) -> tuple[Any, list[Any]]:
    """A figure of its own, away from pyplot's global state, in the theme's colours; panels one above another."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, min(40.0, height)), dpi=dpi, facecolor=theme.paper, layout="constrained")
    every = [figure.add_subplot(rows, 1, n + 1, facecolor=theme.paper) for n in range(rows)]
    for axes in every:
        axes.tick_params(colors=theme.ink, labelsize=9)
        for spine in axes.spines.values():
            spine.set_visible(False)
        for text in (axes.xaxis.label, axes.yaxis.label):
            text.set_color(theme.ink)
        axes.grid(color=theme.grid, linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, every


def png(figure: Any) -> bytes:
    """The figure as the bytes of a PNG file."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


COLOURS = {
    "frozen": "#7f8794",
    "plain": "#f59e0b",
    "plain-compiled": "#d97706",
    "peft": "#3b82f6",
    "peft-float32": "#60a5fa",
    "unsloth": "#8b5cf6",
    "lorafusion": "#ec4899",
    "ours": "#10b981",
    "ours-torch": "#34d399",
    "ours-triton": "#059669",
    "ours-cuda": "#0d9488",
}
DASHES = ("-", "--", ":", "-.")
FASTER, SLOWER = "#10b981", "#ef4444"
MOST_PANELS = 6


@dataclass(frozen=True)
class Figure:
    """A figure under its file name: what it shows, and its PNG by theme."""

    name: str
    alt: str
    png: dict[str, bytes]


def draw_all(result: Result) -> list[Figure]:
    """Every figure that the result has data for."""
    plans: list[tuple[str, str, Any]] = [
        ("speedup", "Speed-up over the plain layers, geometric mean over the cases timed, logarithmic", _speedup),
        ("over-m", "Forward and backward relative to the frozen linears against M", _over_m),
        ("over-pre-num", "Forward and backward relative to the frozen linears against pre_num", _over_pre_num),
        ("memory", "Memory of the first case", _memory),
        ("roofline", "Share of the floor reached in every case", _roofline),
        ("error", "Error of dA and dx relative to plain PyTorch's", _error),
        ("growth", "A model's training step against what grows", _growth),
    ]
    figures = []
    for name, alt, draw in plans:
        drawn = {theme.name: draw(result, theme) for theme in THEMES}
        if all(drawn.values()):
            figures.append(Figure(name, alt, drawn))
    return figures


def _speedup(result: Result, theme: Theme) -> bytes | None:
    bars = mean_bars(result)
    if not bars:
        return None
    figure, (axes,) = new_figure(theme, 1, 1.4 + 0.3 * len(bars))
    for place, bar in enumerate(bars):
        value = math.log2(bar.speedup)
        opacity = 1.0 if bar.beyond_noise else 0.45
        axes.barh(place, value, color=FASTER if value >= 0 else SLOWER, height=0.7, alpha=opacity)
        axes.annotate(
            f"{bar.speedup:.2f}x", (value, place), xytext=(5 if value >= 0 else -5, 0), textcoords="offset points",
            va="center", ha="left" if value >= 0 else "right", color=theme.ink, fontsize=9,
        )  # fmt: skip
    reach = max(0.5, *(abs(math.log2(bar.speedup)) for bar in bars)) * 1.35
    axes.set_xlim(-reach, reach)  # a slowdown by a factor is as long as a speed-up by it
    axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
    axes.invert_yaxis()
    ticks = [t for t in (-3, -2, -1, 0, 1, 2, 3) if abs(t) <= reach]
    axes.set_xticks(ticks, [f"{2.0**t:g}x" for t in ticks])
    axes.axvline(0, color=theme.ink, linewidth=1)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("slower  |  faster than the plain layers; pale: within the noise")
    return png(figure)


def _over_m(result: Result, theme: Theme) -> bytes | None:
    return _lines(over_m(result), theme, "M", "time / frozen", log=True)


def _over_pre_num(result: Result, theme: Theme) -> bytes | None:
    return _lines(over_pre_num(result), theme, "earlier blocks", "time / frozen", log=False)


def _growth(result: Result, theme: Theme) -> bytes | None:
    return _lines(growth(result), theme, "", "ms per step", log=False)


def _lines(panels: Sequence[Panel], theme: Theme, x: str, y: str, log: bool) -> bytes | None:
    panels = panels[:MOST_PANELS]
    if not panels:
        return None
    figure, every = new_figure(theme, len(panels), 3.6 * len(panels))
    for axes, panel in zip(every, panels, strict=True):
        seen: dict[str, int] = {}
        for line in panel.lines:
            number = seen.setdefault(line.provider, 0)
            seen[line.provider] += 1
            axes.plot(
                *zip(*line.points, strict=True), marker="o", markersize=3.5, linewidth=1.8, label=line.label,
                color=COLOURS.get(line.provider, "#7f8794"), linestyle=DASHES[number % len(DASHES)],
            )  # fmt: skip
        if log:
            values = sorted({point[0] for line in panel.lines for point in line.points})
            axes.set_xscale("log", base=2)
            shown = values if len(values) <= 8 else [v for v in values if math.log2(v).is_integer()]
            axes.set_xticks(shown, [f"{v:g}" for v in shown])
            axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_title(panel.title, loc="left", fontsize=10, color=theme.ink)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.legend(frameon=False, labelcolor=theme.ink, fontsize=8, ncols=2)
    return png(figure)


def _memory(result: Result, theme: Theme) -> bytes | None:
    rows = [row for row in first_case(result) if row.peak_bytes is not None and row.saved_bytes is not None]
    if not rows:
        return None
    figure, (axes,) = new_figure(theme, 1, 1.6 + 0.36 * len(rows))
    for place, row in enumerate(rows):
        colour = COLOURS.get(row.provider, "#7f8794")
        axes.barh(place - 0.19, (row.peak_bytes or 0) / 2**20, color=colour, height=0.36)
        axes.barh(place + 0.19, (row.saved_bytes or 0) / 2**20, color=colour, height=0.36, alpha=0.45)
    axes.set_yticks(range(len(rows)), [label(row) for row in rows])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("MiB; full: peak of forward and backward, pale: saved for backward")
    axes.set_title(rows[0].case, loc="left", fontsize=10, color=theme.ink)
    return png(figure)


def _roofline(result: Result, theme: Theme) -> bytes | None:
    groups = by_case(timed(result))
    if not groups:
        return None
    figure, (axes,) = new_figure(theme, 1, 1.8 + 0.3 * len(groups))
    labelled = set()
    for place, rows in enumerate(groups.values()):
        for row in rows:
            reached = share(row, "both")
            if reached is None or row.method not in ("", "lora", "block-1"):
                continue
            name = row.provider if row.provider not in labelled else "_"
            labelled.add(row.provider)
            colour = COLOURS.get(row.provider, "#7f8794")
            axes.plot(100 * reached, place, marker="o", markersize=5, linestyle="", color=colour, label=name)
    axes.set_yticks(range(len(groups)), list(groups), fontsize=7)
    axes.invert_yaxis()
    axes.axvline(100, color=theme.ink, linewidth=1, linestyle="--")
    axes.set_xlim(left=0)
    axes.set_xlabel("% of the floor at this machine's own matmul rate and copy bandwidth")
    axes.legend(frameon=False, labelcolor=theme.ink, fontsize=8, ncols=3)
    return png(figure)


def _error(result: Result, theme: Theme) -> bytes | None:
    worst: dict[str, dict[str, float]] = {}
    for row in timed(result):
        for name in ("y", "dx", "dA", "dB"):
            if row.plain_error.get(name):
                quotient = row.error[name] / row.plain_error[name]
                errors = worst.setdefault(row.provider, {})
                errors[name] = max(errors.get(name, 0.0), quotient)
    if not worst:
        return None
    figure, (axes,) = new_figure(theme, 1, 1.8 + 0.4 * len(worst))
    for place, (provider, errors) in enumerate(worst.items()):
        for marker, name in zip("os^D", ("y", "dx", "dA", "dB"), strict=True):
            if name in errors:
                colour = COLOURS.get(provider, "#7f8794")
                axes.plot(errors[name], place, marker=marker, markersize=6, linestyle="", color=colour,
                          label=name if place == len(worst) - 1 else "_")  # fmt: skip
    axes.set_yticks(range(len(worst)), list(worst))
    axes.invert_yaxis()
    axes.axvline(2, color=SLOWER, linewidth=1, linestyle="--")
    axes.set_xlim(left=0)
    axes.set_xlabel("largest error against float64 / plain PyTorch's; refused right of the line")
    axes.legend(frameon=False, labelcolor=theme.ink, fontsize=8, ncols=4)
    return png(figure)


BASELINE = "plain"


@dataclass(frozen=True)
class Bar:
    """A speed-up over the plain layers of the same method: above 1 faster, below 1 slower; ``noise`` is relative."""

    label: str
    provider: str
    speedup: float
    noise: float

    @property
    def beyond_noise(self) -> bool:
        return abs(self.speedup - 1) > self.noise


@dataclass(frozen=True)
class Line:
    """One curve of a figure: (x, y) in order of x."""

    label: str
    provider: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Panel:
    """Curves over one quantity under one title."""

    title: str
    lines: tuple[Line, ...]


def timed(result: Result) -> list[Measurement]:
    return [row for row in result.measurements if row.status == TIMED and row.times_frozen]


def by_case(rows: Iterable[Measurement]) -> dict[str, list[Measurement]]:
    """Rows of each case, in order."""
    groups: dict[str, list[Measurement]] = {}
    for row in rows:
        groups.setdefault(row.case, []).append(row)
    return groups


def label(row: Measurement | ModelMeasurement) -> str:
    return f"{row.provider} {row.method}".strip()


def bars(rows: Iterable[Measurement], phase: str = "both") -> list[Bar]:
    """Speed-ups within one case over the plain layers of the same method."""
    rows = list(rows)
    plain = {row.method: row for row in rows if row.provider == BASELINE}
    found = []
    for row in rows:
        base = plain.get(row.method)
        if base is None or row.provider == BASELINE:
            continue
        noise = row.noise.get(phase, 0.0) + base.noise.get(phase, 0.0)
        speedup = base.times_frozen[phase] / row.times_frozen[phase]
        found.append(Bar(label(row), row.provider, speedup, noise))
    return found


def mean_bars(result: Result) -> list[Bar]:
    """Geometric mean of every provider's and method's speed-ups over the cases in which it was timed."""
    groups: dict[str, list[Bar]] = {}
    for rows in by_case(timed(result)).values():
        for bar in bars(rows):
            groups.setdefault(bar.label, []).append(bar)
    return [
        Bar(
            name,
            group[0].provider,
            math.exp(sum(math.log(bar.speedup) for bar in group) / len(group)),
            sum(bar.noise for bar in group) / len(group),
        )
        for name, group in sorted(groups.items())
    ]


def over_m(result: Result) -> list[Panel]:
    """Time relative to the frozen linears against M, one panel for each layer that was timed at two or more M."""
    panels: dict[str, dict[str, dict[float, float]]] = {}
    providers: dict[str, str] = {}
    for row in timed(result):
        shape = row.shape
        if row.method not in ("lora", "block-1") or shape["p"]:
            continue
        graph = ", graph" if shape["replay"] else ""
        title = f"{shape['k']} to {shape['n']}, r = {shape['r']}, {shape['dtype']}{graph}"
        if shape["layers"] != 4:
            continue
        panels.setdefault(title, {}).setdefault(label(row), {})[shape["m"]] = row.times_frozen["both"]
        providers[label(row)] = row.provider
    return _panels(panels, providers)


def over_pre_num(result: Result) -> list[Panel]:
    """Time relative to the frozen linears against the number of earlier blocks, for block and middle."""
    panels: dict[str, dict[str, dict[float, float]]] = {}
    providers: dict[str, str] = {}
    for row in timed(result):
        shape = row.shape
        if shape["shortcut"] not in ("block", "middle") or row.provider == "frozen":
            continue
        reach = shape["layers"] - 1 if shape["pre_num"] == -1 else shape["pre_num"]
        title = f"{shape['shortcut']}: {row.case}"
        panels.setdefault(title, {}).setdefault(row.provider, {})[reach] = row.times_frozen["both"]
        providers[row.provider] = row.provider
    return _panels(panels, providers)


def growth(result: Result) -> list[Panel]:
    """Milliseconds of a model's training step against what was swept."""
    panels: dict[str, dict[str, dict[float, float]]] = {}
    providers: dict[str, str] = {}
    for row in result.models:
        if row.status != TIMED or not row.swept:
            continue
        name = row.provider if row.method in ("", "lora") else f"{row.provider} {row.settings['shortcut']}"
        name = f"{name} LoRA" if row.method == "lora" else name
        panels.setdefault(f"step against {row.swept}", {}).setdefault(name, {})[row.value] = row.seconds[1] * 1e3
        providers[name] = row.provider
    return _panels(panels, providers)


def _panels(found: dict[str, dict[str, dict[float, float]]], providers: dict[str, str]) -> list[Panel]:
    panels = []
    for title, lines in found.items():
        drawn = [Line(n, providers[n], tuple(sorted(points.items()))) for n, points in lines.items() if len(points) > 1]
        if drawn:
            panels.append(Panel(title, tuple(drawn)))
    return panels


def first_case(result: Result) -> list[Measurement]:
    """The rows of the most important case: the first that was timed."""
    groups = by_case(timed(result))
    return next(iter(groups.values()), [])

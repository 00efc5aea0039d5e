"""Figures as PNG, for a light and for a dark page: what the benchmark's figures and the demo's have in common."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any


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

"""The figures as PNG, drawn once for a light and once for a dark page."""

from __future__ import annotations

from typing import Any

from reslora_kernels.bench.drawing import Theme, new_figure, png
from reslora_kernels.cli.demo.wording import added

COLOURS = {"none": "#7f8794", "input": "#3b82f6", "block": "#f59e0b", "middle": "#10b981"}
MARKERS = {"none": "o", "input": "s", "block": "^", "middle": "D"}


def loss_curves(report: dict[str, Any], theme: Theme) -> bytes:
    """Evaluation loss over steps, one line per run, with plain LoRA's last loss as a dashed line."""
    figure, (axes,) = new_figure(theme, 1, 4.2, dpi=170)
    for run in report["runs"]:
        shortcut, curve = run["shortcut"], run["curve"]
        axes.plot(
            curve["steps"],
            curve["losses"],
            color=COLOURS[shortcut],
            marker=MARKERS[shortcut],
            markersize=4,
            linewidth=2,
            label=f"{run['title']}  {run['last_loss']:.3f}",
        )
    lora = report["runs"][0]
    axes.axhline(lora["last_loss"], color=COLOURS["none"], linewidth=1, linestyle="--", zorder=1)
    axes.set_xlabel("fine-tuning step")
    axes.set_ylabel("loss, nats per byte")
    axes.set_xlim(0, lora["curve"]["steps"][-1] * 1.02)
    axes.set_title("Evaluation loss on held-out Python modules", loc="left", fontweight="bold", color=theme.ink)
    legend = axes.legend(title="run and last loss", frameon=False, labelcolor=theme.ink)
    legend.get_title().set_color(theme.ink)
    return png(figure)


def merge_costs(report: dict[str, Any], theme: Theme) -> bytes:
    """Loss added by every merge, one bar each."""
    rows = [(run, merge) for run in report["runs"] for merge in run["merges"]]
    figure, (axes,) = new_figure(theme, 1, 1.3 + 0.36 * len(rows), dpi=170)
    for place, (run, merge) in enumerate(rows):
        axes.barh(place, merge["loss_added"], color=COLOURS[run["shortcut"]], height=0.66)
        axes.annotate(
            added(merge["loss_added"]),
            (max(merge["loss_added"], 0.0), place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=theme.ink,
            fontsize=10,
        )
    axes.set_yticks(range(len(rows)), [f"{run['title']}: {merge['method']}" for run, merge in rows])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.18)
    axes.axvline(0, color=theme.ink, linewidth=1)
    axes.set_xlabel("loss added, nats per byte (0 is best)")
    axes.set_title("What merging adds to the evaluation loss", loc="left", fontweight="bold", color=theme.ink)
    return png(figure)

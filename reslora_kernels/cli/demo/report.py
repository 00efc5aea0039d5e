"""The results in words, as tables on the terminal, and as files: report.json, report.html and the figures."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import platform
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from reslora_kernels._version import __version__
from reslora_kernels.bench.figures import DARK, LIGHT, Theme, new_figure, png
from reslora_kernels.cli.demo.experiment import Results, Run
from reslora_kernels.cli.demo.fine_tuning import BASELINE, DEFINITION, HELD_OUT_MODULES, Settings
from reslora_kernels.config import Shortcut


def findings(results: Results) -> list[str]:
    """What happened, in sentences, in favour of nobody."""
    lora, others = results.runs[0], results.runs[1:]
    last = lora.curve.losses[-1]
    ranking = sorted(results.runs, key=lambda run: run.curve.losses[-1])
    said = [
        "Last evaluation loss, lowest first: "
        + ", ".join(f"{run.title} {run.curve.losses[-1]:.4f}" for run in ranking)
        + f" (before fine-tuning: {results.base.python_loss:.4f})."
    ]
    for run in others:
        difference = run.curve.losses[-1] - last
        verdict = f"ended {abs(difference):.4f} {'below' if difference < 0 else 'above'} plain LoRA"
        if run.steps_to_reach_lora is None:
            said.append(f"{name(run).capitalize()} {verdict} and did not reach its last loss.")
        else:
            said.append(
                f"{name(run).capitalize()} {verdict} and reached its last loss at step {run.steps_to_reach_lora:.0f} "
                f"of {lora.curve.steps[-1]}."
            )
    for run in results.runs:
        if len(run.merges) == 1:
            said.append(f"Merging {name(run)} is exact: the loss changed by {run.merges[0].loss_added:+.1e}.")
        elif run.merges:
            costs = ", ".join(f"{merge.method} {added(merge.loss_added)}" for merge in run.merges)
            said.append(f"Merging {name(run)} added to the loss: {costs}.")
    said.append("One seed on one small model: differences of a few thousandths are no ranking of the methods.")
    return said


def name(run: Run) -> str:
    return "plain LoRA" if run.shortcut == BASELINE else f"the {run.title} shortcut"


def added(difference: float) -> str:
    """A difference of losses with its sign and four decimals, and no sign where those are all zero."""
    rounded = round(difference, 4)
    return f"{rounded:+.4f}" if rounded else "0.0000"


def show_results(results: Results, console: Console) -> None:
    """Two tables and what they say in words."""
    console.print(training_table(results), merging_table(results), sep="\n")
    for finding in findings(results):
        console.print(f"- {finding}", highlight=False)


def training_table(results: Results) -> Table:
    table = Table(title="Fine-tuning: loss on held-out modules, nats per byte", title_justify="left")
    table.add_column("run", no_wrap=True)
    for title in ("pre_num", "trainable", "first loss", "last loss", "steps to LoRA's last", "step / frozen"):
        table.add_column(title, justify="right")
    for run in results.runs:
        reached, time = run.steps_to_reach_lora, run.step_time
        table.add_row(
            run.title,
            pre_num(results.settings, run.shortcut),
            f"{run.trainable_parameters:,}",
            f"{run.curve.losses[0]:.4f}",
            f"{run.curve.losses[-1]:.4f}",
            "not reached" if reached is None else f"{reached:.0f}",
            "-" if time is None else f"{time.relative:.2f}",
        )
    return table


def merging_table(results: Results) -> Table:
    table = Table(title="Merging, and the export in PEFT: rank, largest difference of a logit", title_justify="left")
    table.add_column("run", no_wrap=True)
    table.add_column("merge", no_wrap=True)
    for title in ("merged loss", "loss added", "PEFT rank", "PEFT logits", "PEFT loss"):
        table.add_column(title, justify="right")
    for run in results.runs:
        for merge in run.merges:
            peft = run.peft if run.peft is not None and run.peft.method == merge.method else None
            served = (
                (str(peft.max_lora_rank), f"{peft.logit_difference:.1e}", f"{peft.loss:.4f}") if peft else ("", "", "")
            )
            table.add_row(run.title, merge.method, f"{merge.loss:.4f}", added(merge.loss_added), *served)
    return table


def pre_num(settings: Settings, shortcut: Shortcut) -> str:
    """How many earlier blocks the shortcut uses, where that is a choice."""
    return str(settings.adapter_config(shortcut).pre_num) if shortcut in ("block", "middle") else "-"


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


REPORT_NAME = "report.json"
HTML_NAME = "report.html"
CURVES_NAME, MERGES_NAME = "loss_curves.png", "merging.png"
WRITTEN = (HTML_NAME, REPORT_NAME, CURVES_NAME, MERGES_NAME)
FORMAT = "reslora demo"
LIBRARIES = ("torch", "transformers", "peft", "safetensors")


def as_dict(results: Results) -> dict[str, Any]:
    """Everything the report shows, as plain values. Losses are nats per byte."""
    return {
        "format": FORMAT,
        "reslora_kernels": __version__,
        "settings": {
            **dataclasses.asdict(results.settings),
            "held_out_modules": list(HELD_OUT_MODULES),
            "adapters": {run.shortcut: results.settings.adapter_config(run.shortcut).to_dict() for run in results.runs},
        },
        "machine": machine(),
        "step_time_definition": DEFINITION,
        "base": dataclasses.asdict(results.base),
        "runs": [_run(run) for run in results.runs],
        "findings": findings(results),
        "seconds": {name: round(seconds, 2) for name, seconds in results.seconds.items()},
    }


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write the files ``WRITTEN`` to ``folder``."""
    from jinja2 import Environment

    figures = {}
    for name, draw in ((CURVES_NAME, loss_curves), (MERGES_NAME, merge_costs)):
        for theme in (LIGHT, DARK):
            figures[name, theme.name] = draw(report, theme)
        (folder / name).write_bytes(figures[name, LIGHT.name])
    (folder / REPORT_NAME).write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    source = files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["added"] = added
    template = environment.from_string(source)
    embedded = {
        name: {theme.name: base64.b64encode(figures[name, theme.name]).decode() for theme in (LIGHT, DARK)}
        for name in (CURVES_NAME, MERGES_NAME)
    }
    html = template.render(report=report, curves=embedded[CURVES_NAME], merges=embedded[MERGES_NAME])
    (folder / HTML_NAME).write_text(html, encoding="utf-8")


def is_report(path: Path) -> bool:
    """Whether a file is the report.json of a demo."""
    try:
        report = json.loads(path.read_bytes())
    except (FileNotFoundError, IsADirectoryError, ValueError):
        return False
    return isinstance(report, dict) and report.get("format") == FORMAT


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
    }


def _processor() -> str:
    """The processor's name as Linux tells it, else what Python knows."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _run(run: Run) -> dict[str, Any]:
    values = dataclasses.asdict(run)
    steps, losses = run.curve
    values |= {
        "title": run.title,
        "baseline": run.shortcut == BASELINE,
        "curve": {"steps": steps, "losses": losses},
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }
    return values

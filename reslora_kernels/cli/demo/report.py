"""The results as plain values, in words, and as files: report.json, report.html and the figures."""

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

from reslora_kernels._version import __version__
from reslora_kernels.bench.drawing import DARK, LIGHT
from reslora_kernels.cli.demo.data import HELD_OUT_MODULES
from reslora_kernels.cli.demo.experiment import Results, Run
from reslora_kernels.cli.demo.figures import loss_curves, merge_costs
from reslora_kernels.cli.demo.settings import BASELINE
from reslora_kernels.cli.demo.timing import DEFINITION
from reslora_kernels.cli.demo.wording import added, findings

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

"""A result as one HTML file that needs nothing else, and its figures as PNG."""

from __future__ import annotations

import base64
import importlib.util
import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from reslora_kernels.bench.comparison import duration, share
from reslora_kernels.bench.figures import Bar, bars, by_case, draw_all, mean_bars, timed
from reslora_kernels.bench.results import FAILED, REFUSED, TIMED, Measurement, Result

HTML_NAME = "report.html"
LONGEST_BAR = 2.0  # doublings that fill half the width; beyond them a bar is cut, its number is not


def write_report(result: Result, folder: Path) -> list[Path]:
    """Write report.html and one PNG for each figure; returns what was written.

    Raises:
        ImportError: matplotlib or jinja2 is missing.
    """
    missing = [name for name in ("matplotlib", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f'{" and ".join(missing)} not installed; run: pip install "reslora_kernels[plots]"')
    figures = draw_all(result)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for figure in figures:
        written.append(folder / f"{figure.name}.png")
        written[-1].write_bytes(figure.png["light"])
    page = folder / HTML_NAME
    page.write_text(render(result, figures), encoding="utf-8")
    return [page, *written]


def render(result: Result, figures: Sequence[Any]) -> str:
    """The page."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    source = files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8")
    embedded = [
        {"alt": figure.alt} | {theme: base64.b64encode(png).decode() for theme, png in figure.png.items()}
        for figure in figures
    ]
    rows = timed(result)
    cases = [{"case": case, "bars": [_bar(bar) for bar in bars(group)]} for case, group in _cases(rows)]
    return environment.from_string(source).render(
        result=result,
        machine=result.machine,
        figures=embedded,
        means=[_bar(bar) for bar in mean_bars(result)],
        cases=[entry for entry in cases if entry["bars"]],
        rows=[_cells(row) for row in result.measurements if row.status == TIMED],
        models=[_model_cells(row) for row in result.models if row.status == TIMED],
        refused=[row for row in result.rows() if row.status in (REFUSED, FAILED)],
        skipped=result.skipped(),
    )


def _cases(rows: Sequence[Measurement]) -> list[tuple[str, list[Measurement]]]:
    return list(by_case(rows).items())


def _bar(bar: Bar) -> dict[str, Any]:
    """Length in per cent of the width, from the middle; equal factors up and down are equally long."""
    length = min(1.0, abs(math.log2(bar.speedup)) / LONGEST_BAR) * 50
    return {
        "label": bar.label,
        "text": f"{bar.speedup:.2f}x",
        "noise": f"{bar.noise:.0%}",
        "length": round(length, 2),
        "faster": bar.speedup >= 1,
        "sure": bar.beyond_noise,
    }


def _cell(text: str, value: float | None = None) -> dict[str, Any]:
    return {"text": text, "value": value}


def _number(value: float | None, form: str) -> dict[str, Any]:
    return _cell("–" if value is None else form.format(value), value)


def _cells(row: Measurement) -> list[dict[str, Any]]:
    seconds = {phase: row.seconds[phase] for phase in ("forward", "backward", "both")}
    peak, saved = (None if b is None else b / 2**20 for b in (row.peak_bytes, row.saved_bytes))
    return [
        _cell(row.set),
        _cell(row.case),
        _cell(row.provider),
        _cell(row.method),
        *(_cell(duration(values[1]), values[1]) for values in seconds.values()),
        _cell(f"{duration(seconds['both'][0])} – {duration(seconds['both'][2])}", seconds["both"][2]),
        _number(row.times_frozen.get("both"), "{:.3f}"),
        _number(row.noise.get("both"), "{:.1%}"),
        _number(share(row, "both"), "{:.0%}"),
        _number(peak, "{:.1f}"),
        _number(saved, "{:.1f}"),
        *(_number(row.error.get(name), "{:.1e}") for name in ("y", "dx", "dA", "dB")),
    ]


def _model_cells(row: Any) -> list[dict[str, Any]]:
    return [
        _cell(row.key[0]),
        _cell(row.provider),
        _cell(row.method),
        _cell(duration(row.seconds[1]), row.seconds[1]),
        _number(row.per_second, "{:,.0f} " + row.unit),
        _number(row.times_frozen, "{:.3f}"),
        _number(row.noise, "{:.1%}"),
        _number(None if row.peak_bytes is None else row.peak_bytes / 2**20, "{:.1f}"),
        _number(row.error, "{:.1e}"),
    ]

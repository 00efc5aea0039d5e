"""A result as tables for a terminal and as one HTML file; and what got slower from one result to the next.

That is beyond what the noise of both explains. Times relative to the frozen linears in the same round are compared
where both results have them: they hold when the machine itself was faster or slower that day. Where frozen was not
timed, or is itself what is compared, nothing is said but how the machine changed.
"""

from __future__ import annotations

import base64
import importlib.util
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from reslora_kernels.bench.figures import Bar, bars, by_case, draw_all, mean_bars, timed
from reslora_kernels.bench.model_cases import PUBLISHED, frozen_products
from reslora_kernels.bench.results import FAILED, REFUSED, SKIPPED, TIMED, Measurement, ModelMeasurement, Result, share
from reslora_kernels.bench.timing import PHASES

Listed = TypeVar("Listed", Measurement, ModelMeasurement)


def duration(seconds: float) -> str:
    """In the unit that leaves two to four digits before the point."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size or unit == "us":
            return f"{seconds / size:.3g} {unit}"
    raise AssertionError


def size(count: int | None) -> str:
    """Bytes in MiB."""
    return "" if count is None else f"{count / 2**20:.1f}"


def show_result(result: Result, console: Console) -> None:
    """One table for each case, one for each model; then who was left out, and why."""
    for (set_name, case), rows in _grouped(result.measurements):
        table = host_table if any(row.least for row in rows) else case_table
        console.print(table(f"{set_name}: {case}", rows))
    for model, models in groupby(result.models, key=lambda row: row.key[0]):
        console.print(model_table(model, list(models)))
    for reason, names in result.skipped().items():
        console.print(f"Skipped {', '.join(names)}: {reason}", highlight=False, markup=False)
    if result.stopped:
        console.print(f"Stopped early: {result.stopped}", highlight=False, markup=False)


def _grouped(rows: Iterable[Measurement]) -> list[tuple[tuple[str, str], list[Measurement]]]:
    return [(key, list(group)) for key, group in groupby(rows, key=lambda row: (row.set, row.case))]


def plain_table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for n, heading in enumerate(headings):
        table.add_column(heading, justify="left" if n == 0 else "right", no_wrap=n > 0, overflow="fold")
    return table


def _close(table: Table, silent: dict[str, list[str]]) -> Table:
    if silent:
        table.caption = escape("\n".join(f"{', '.join(names)} {reason}".strip() for reason, names in silent.items()))
        table.caption_justify = "left"
    return table


def _timed(rows: Sequence[Listed], silent: dict[str, list[str]]) -> Iterator[tuple[str, Listed]]:
    """What was timed, by name; what was refused or failed goes to ``silent``, by reason."""
    for row in rows:
        name = f"{row.provider} {row.method}".strip()
        if row.status == TIMED:
            yield name, row
        elif row.status != SKIPPED:
            silent.setdefault(f"{row.status}: {row.reason}", []).append(name)


def case_table(title: str, rows: Sequence[Measurement]) -> Table:
    """Times of all layers; relative to the frozen linears' in the same round, with the noise; share of the floor."""
    table = plain_table(title, ("provider", "forward", "backward", "/frozen", "noise", "floor", "peak MiB", "error dA"))
    silent: dict[str, list[str]] = {}
    for name, row in _timed(rows, silent):
        error = row.error.get("dA", row.error.get("y"))
        table.add_row(
            name,
            duration(row.seconds["forward"][1]),
            duration(row.seconds["backward"][1]),
            f"{row.times_frozen['both']:.3f}" if "both" in row.times_frozen else "",
            f"{row.noise['both']:.1%}" if "both" in row.noise else "",
            "" if (reached := share(row, "both")) is None else f"{reached:.0%}",
            size(row.peak_bytes),
            f"{error:.1e}" if error is not None else "",
        )
    return _close(table, silent)


def host_table(title: str, rows: Sequence[Measurement]) -> Table:
    """Microseconds of one layer, the least of all rounds; both passes also relative to each of LoRA's other forms."""
    table = plain_table(f"{title}, least us a layer", ("provider", "forward", "backward", "both", "/hand", "/peft"))
    silent: dict[str, list[str]] = {}
    least = {row.provider: row.least["both"] for row in rows if row.least}
    for name, row in _timed(rows, silent):
        phases = (f"{row.least[phase] / row.shape['layers'] * 1e6:.1f}" for phase in ("forward", "backward", "both"))
        others = (least.get(provider) for provider in ("hand-written", "peft"))
        table.add_row(name, *phases, *(f"{row.least['both'] / other:.2f}" if other else "" for other in others))
    return _close(table, silent)


def model_table(title: str, rows: Sequence[ModelMeasurement]) -> Table:
    """A training step; relative to the frozen model's forward and backward; what others publish for such a model."""
    table = plain_table(title, ("provider", "step", "per second", "TFLOP/s", "/frozen", "noise", "peak MiB", "error"))
    silent: dict[str, list[str]] = {}
    counted = False
    for name, row in _timed(rows, silent):
        products = frozen_products(row.settings)
        counted = counted or products is not None
        table.add_row(
            name,
            duration(row.seconds[1]),
            f"{row.per_second or 0:,.0f} {row.unit}",
            f"{products * (row.per_second or 0) / 1e12:.0f}" if products is not None else "",
            f"{row.times_frozen:.3f}" if row.times_frozen is not None else "",
            f"{row.noise:.1%}" if row.noise is not None else "",
            size(row.peak_bytes),
            f"{row.error:.1e}" if row.error is not None else "",
        )
    if counted:
        silent[f"TFLOP/s of the frozen products alone; {PUBLISHED['llama']}"] = []
    return _close(table, silent)


MACHINE = ("gpu", "cpu", "threads", "torch", "driver", "triton")


@dataclass(frozen=True)
class Change:
    """A figure relative to the frozen linears', before and after; ``noise`` is what both may be off by, together."""

    where: str
    provider: str
    phase: str
    old: float
    new: float
    noise: float

    @property
    def change(self) -> float:
        return self.new / self.old - 1


@dataclass
class Comparison:
    """``broken``: what was timed before and is now refused or fails, with the reason."""

    slower: list[Change] = field(default_factory=list)
    faster: list[Change] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    unlike: list[str] = field(default_factory=list)
    compared: int = 0
    machine: float | None = None
    origin: str = ""

    @property
    def worse(self) -> bool:
        return bool(self.slower or self.broken)


def compare_results(old: Result, new: Result, threshold: float = 0.03) -> Comparison:
    """Compare what both results hold.

    Args:
        threshold: the least relative change that counts.

    Raises:
        ValueError: they have nothing in common.
    """
    found = Comparison(origin=f"{_name(old)} to {_name(new)}")
    for name in MACHINE:
        if old.machine.get(name) != new.machine.get(name):
            found.unlike.append(f"{name}: {old.machine.get(name)} then, {new.machine.get(name)} now")
    _compare_rows(found, _by_key(old.measurements), _by_key(new.measurements), threshold)
    _compare_rows(found, _by_key(old.models), _by_key(new.models), threshold)
    if not found.compared and not found.broken:
        raise ValueError("the two results have no measurement in common: no case, provider and method is in both")
    found.slower.sort(key=lambda change: -change.change)
    found.faster.sort(key=lambda change: change.change)
    found.machine = _machine(old, new)
    return found


def _name(result: Result) -> str:
    return f"{result.date} {(result.commit or 'unknown commit')[:10]}"


Row = Measurement | ModelMeasurement


def _by_key(rows: Iterable[Row]) -> dict[tuple[str, str, str], Row]:
    return {row.key: row for row in rows}


def _compare_rows(
    found: Comparison, old: dict[tuple[str, str, str], Row], new: dict[tuple[str, str, str], Row], threshold: float
) -> None:
    for key, before in old.items():
        after = new.get(key)
        if after is None or before.status != TIMED or after.status == SKIPPED:
            continue
        where, name = key[0], f"{key[1]} {key[2]}".strip()
        if after.status != TIMED:
            found.broken.append(f"{where}, {name}: {after.status} now, {after.reason}")
            continue
        ratios, later = _ratios(before), _ratios(after)
        for phase in ratios.keys() & later.keys():
            if before.provider == "frozen":
                continue
            (a, noise_a), (b, noise_b) = ratios[phase], later[phase]
            change = Change(where, name, phase, a, b, noise_a + noise_b)
            found.compared += 1
            beyond = max(threshold, change.noise)
            if change.change > beyond:
                found.slower.append(change)
            elif change.change < -beyond:
                found.faster.append(change)


def _ratios(row: Row) -> dict[str, tuple[float, float]]:
    """(time relative to frozen, noise) by phase."""
    if isinstance(row, Measurement):
        return {phase: (row.times_frozen[phase], row.noise[phase]) for phase in PHASES if phase in row.times_frozen}
    return {"step": (row.times_frozen, row.noise or 0.0)} if row.times_frozen is not None else {}


def _machine(old: Result, new: Result) -> float | None:
    """Median quotient of the frozen linears' own times, new by old."""
    before = {row.key: row for row in old.measurements if row.provider == "frozen" and row.status == TIMED}
    quotients = [
        row.seconds["both"][1] / before[row.key].seconds["both"][1]
        for row in new.measurements
        if row.status == TIMED and row.key in before
    ]
    return statistics.median(quotients) if quotients else None


def show_comparison(found: Comparison, console: Console) -> None:
    """The changes that count, slower ones first."""
    console.print(f"Times relative to the frozen layers', {found.origin}", highlight=False, markup=False)
    for line in found.unlike:
        console.print(f"Not the same machine or versions: {line}", highlight=False, markup=False)
    if found.machine is not None:
        console.print(f"The frozen layers themselves took {found.machine:.2f} times as long.", highlight=False)
    for title, changes in (("Slower", found.slower), ("Faster", found.faster)):
        if changes:
            console.print(_changes(title, changes))
    for line in found.broken:
        console.print(f"Broken: {line}", highlight=False, markup=False)
    console.print(
        f"{found.compared} figures compared: {len(found.slower)} slower beyond the noise, {len(found.faster)} faster, "
        f"{len(found.broken)} broken",
        highlight=False,
    )


def _changes(title: str, changes: list[Change]) -> Table:
    table = plain_table(title, ("case", "provider", "phase", "old", "new", "change", "noise"))
    for c in changes:
        table.add_row(
            c.where, c.provider, c.phase, f"{c.old:.3f}", f"{c.new:.3f}", f"{c.change:+.1%}", f"{c.noise:.1%}"
        )
    return table


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

"""A result as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from reslora_kernels.bench.model_cases import PUBLISHED, frozen_products
from reslora_kernels.bench.results import SKIPPED, TIMED, Measurement, ModelMeasurement, Result

Row = TypeVar("Row", Measurement, ModelMeasurement)


def duration(seconds: float) -> str:
    """In the unit that leaves two to four digits before the point."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size or unit == "us":
            return f"{seconds / size:.3g} {unit}"
    raise AssertionError


def size(count: int | None) -> str:
    """Bytes in MiB."""
    return "" if count is None else f"{count / 2**20:.1f}"


def share(row: Measurement, phase: str) -> float | None:
    """Of the floor that the row reached: floor / median."""
    return row.floor_seconds[phase] / row.seconds[phase][1] if phase in row.seconds else None


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


def _timed(rows: Sequence[Row], silent: dict[str, list[str]]) -> Iterator[tuple[str, Row]]:
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
            f"{share(row, 'both') or 0:.0%}",
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

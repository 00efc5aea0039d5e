"""What got slower from one result to the next, beyond what the noise of both explains.

Times relative to the frozen linears in the same round are compared where both results have them: they hold when the
machine itself was faster or slower that day. Where frozen was not timed, or is itself what is compared, nothing is said
but how the machine changed.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from reslora_kernels.bench.results import SKIPPED, TIMED, Measurement, ModelMeasurement, Result
from reslora_kernels.bench.tables import plain_table
from reslora_kernels.bench.timing import PHASES

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


def compare(old: Result, new: Result, threshold: float = 0.03) -> Comparison:
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


def show(found: Comparison, console: Console) -> None:
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

"""The numbers behind the report's figures and bars, picked from a result."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from reslora_kernels.bench.results import TIMED, Measurement, ModelMeasurement, Result

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

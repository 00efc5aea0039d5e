"""A run: every provider through every case, checked, then timed side by side; results are handed on as they come."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from reslora_kernels.bench import capture, timing
from reslora_kernels.bench.accuracy import Judge
from reslora_kernels.bench.capture import peak_bytes, saved_bytes
from reslora_kernels.bench.cases import Case, Method
from reslora_kernels.bench.clocks import Clock, DeviceLostError, Rates, check_alive, clock_of, floor_seconds, one_line
from reslora_kernels.bench.providers import FROZEN, Provider
from reslora_kernels.bench.results import FAILED, REFUSED, SKIPPED, TIMED, Measurement
from reslora_kernels.bench.workload import Workload, cache_bytes, draw, input_sets

AGAIN = "frozen, a second time"


@dataclass(frozen=True)
class Bench:
    """Where and how long to measure. ``deadline`` is of ``time.monotonic``."""

    device: torch.device
    clock: Clock
    plan: timing.Plan
    rates: Rates
    deadline: float = math.inf

    @classmethod
    def on(cls, device: torch.device, plan: timing.Plan, rates: Rates, deadline: float = math.inf) -> Bench:
        return cls(device, clock_of(device), plan, rates, deadline)


@dataclass
class Entry:
    """A provider with a method in a case, on its way from check to figures."""

    provider: Provider
    method: Method
    row: Measurement
    passes: list[capture.Pass]

    @property
    def name(self) -> str:
        return FROZEN if self.provider.name == FROZEN else f"{self.provider.name} {self.method}"


def run_case(
    bench: Bench, set_name: str, case: Case, providers: Sequence[Provider], note: Callable[[str], None] = lambda _: None
) -> list[Measurement]:
    """Every provider and method of a case: the figures, or why there are none.

    Args:
        note: told what is going on, for a progress bar.

    Raises:
        DeviceLostError: the GPU answers no more. Figures of this case are lost, those before it are not.
    """
    with case.precision():
        entries = list(_entries(bench, set_name, case, providers))
        possible = [entry for entry in entries if entry.row.status == TIMED]
        try:
            count = input_sets(case, cache_bytes(bench.device))
            workloads = [draw(case, bench.device, seed) for seed in range(count)]
        except (RuntimeError, MemoryError) as error:  # no memory for the tensors
            check_alive(bench.device)
            for entry in possible:
                entry.row.status, entry.row.reason = FAILED, one_line(error)
            return [entry.row for entry in entries]
        _check(bench, workloads[0], possible, note)
        _build(bench, workloads, possible)
        _time(bench, possible, count, note)
    _free(bench.device, case, possible)
    return [entry.row for entry in entries]


def _entries(bench: Bench, set_name: str, case: Case, providers: Sequence[Provider]) -> Iterator[Entry]:
    for provider in providers:
        for method in provider.methods(case):
            label = "" if provider.name == FROZEN else str(method)
            reason = provider.missing(case, method, bench.device)
            row = Measurement(set_name, str(case), provider.name, label, SKIPPED if reason else TIMED, reason)
            row.shape = _shape(case, method)
            row.floor_seconds = floor_seconds(case, None if provider.name == FROZEN else method, bench.rates)
            yield Entry(provider, method, row, [])


def _shape(case: Case, method: Method) -> dict[str, Any]:
    names = ("m", "k", "n", "r", "dtype", "p", "layers", "replay")
    return {name: value for name, value in asdict(case).items() if name in names} | asdict(method)


def _attempt(bench: Bench, entry: Entry, action: Callable[[], None]) -> None:
    """Run a step of an entry; what it raises becomes the entry's reason."""
    try:
        action()
    except DeviceLostError:
        raise
    except Exception as error:  # a provider's failure is a finding about it, not the end of the run
        entry.row.status, entry.row.reason = FAILED, one_line(error)
        check_alive(bench.device)


def _check(bench: Bench, workload: Workload, entries: Sequence[Entry], note: Callable[[str], None]) -> None:
    judge = Judge(workload)

    def check(entry: Entry) -> None:
        verdict = judge.check(entry.provider, entry.method)
        entry.row.error, entry.row.plain_error = verdict.error, verdict.plain_error
        if verdict.refusal is not None:
            entry.row.status, entry.row.reason = REFUSED, f"wrong result: {verdict.refusal}"

    for entry in sorted(entries, key=lambda e: (str(e.method), e.provider.same_mask)):
        note(f"checking {entry.name}")
        _attempt(bench, entry, partial(check, entry))


def _build(bench: Bench, workloads: Sequence[Workload], entries: Sequence[Entry]) -> None:
    """Layers on every input set, warmed up; memory is measured on the second pass."""

    def build(entry: Entry) -> None:
        entry.passes = [capture.Pass(entry.provider.build(workload, entry.method), workload) for workload in workloads]
        first = entry.passes[0]
        first.results()
        entry.row.peak_bytes = peak_bytes(first.results, bench.device)
        entry.row.saved_bytes = saved_bytes(first)

    for entry in entries:
        if entry.row.status == TIMED:
            _attempt(bench, entry, partial(build, entry))


def _subject(bench: Bench, entry: Entry) -> timing.Subject | None:
    """What is timed: replayed where the case asks for it and there is a GPU, and launched from Python elsewhere."""
    if not (entry.passes[0].workload.case.replay and bench.device.type == "cuda"):
        return capture.eager(entry.name, entry.passes)
    try:
        return capture.replayed(entry.name, entry.passes)
    except Exception as error:  # a provider that cannot be captured has no figure here
        entry.row.status, entry.row.reason = FAILED, f"cannot be captured as a CUDA graph: {one_line(error)}"
        check_alive(bench.device)
        return None


def _time(bench: Bench, entries: Sequence[Entry], count: int, note: Callable[[str], None]) -> None:
    made = (_subject(bench, entry) for entry in entries if entry.row.status == TIMED)
    subjects = [subject for subject in made if subject is not None]
    for floor in [subject for subject in subjects if subject.name == FROZEN]:
        subjects.append(timing.Subject(AGAIN, floor.forward, floor.backward))
    note(f"timing {len(subjects)} side by side")
    replay = any(entry.row.shape["replay"] for entry in entries)
    plan = timing.Plan(**(asdict(bench.plan) | {"input_sets": count, "hold": replay}))
    samples = timing.measure(subjects, bench.clock, plan, lambda: check_alive(bench.device), bench.deadline)
    frozen, again = samples.get(FROZEN, timing.Samples()), samples.get(AGAIN, timing.Samples())
    for entry in entries:
        if entry.row.status != TIMED:
            continue
        own = samples[entry.name]
        if own.failure is not None:
            entry.row.status, entry.row.reason = FAILED, own.failure
            continue
        fill(entry.row, own, frozen, again)


def fill(row: Measurement, own: timing.Samples, frozen: timing.Samples, again: timing.Samples) -> None:
    """The figures of one subject from its rounds, those of the frozen linears, and those of the same a second time."""
    row.rounds = len(own.forward)
    for phase in timing.PHASES:
        row.seconds[phase] = list(timing.percentiles(own.of(phase)))
        if len(frozen.forward) != len(own.forward):
            continue
        ratio = timing.relative(own.of(phase), frozen.of(phase))
        row.times_frozen[phase] = ratio.median
        row.noise[phase] = ratio.noise
        if len(again.forward) == len(frozen.forward):
            row.noise[phase] = max(ratio.noise, abs(timing.relative(again.of(phase), frozen.of(phase)).median - 1))


def _free(device: torch.device, case: Case, entries: Sequence[Entry]) -> None:
    """Let go of layers and graphs before the next case is drawn; torch.compile keeps few versions of a function."""
    for entry in entries:
        entry.passes = []
    if case.compiled:
        torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

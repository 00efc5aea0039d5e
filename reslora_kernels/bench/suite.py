"""A run: every provider through every case, checked against float64, then timed side by side; rows are handed on.

A provider whose results are not what it says it computes is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from reslora_kernels import dropout, reference
from reslora_kernels.bench import timing
from reslora_kernels.bench.cases import Case, Method
from reslora_kernels.bench.providers import FROZEN, Provider, scaling_of
from reslora_kernels.bench.results import FAILED, REFUSED, SKIPPED, TIMED, Measurement
from reslora_kernels.bench.timing import Clock, DeviceLostError, Rates, check_alive, clock_of, floor_seconds, one_line
from reslora_kernels.bench.workload import (
    Pass,
    Workload,
    cache_bytes,
    draw,
    eager,
    input_sets,
    peak_bytes,
    replayed,
    saved_bytes,
)
from reslora_kernels.testing import assert_close_to_truth, relative_error

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
    passes: list[Pass]

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
        entry.passes = [Pass(entry.provider.build(workload, entry.method), workload) for workload in workloads]
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
        return eager(entry.name, entry.passes)
    try:
        return replayed(entry.name, entry.passes)
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


SEED = 20240403


@dataclass(frozen=True)
class Verdict:
    """Largest relative error of a layer for y, dx, dA and dB, plain PyTorch's beside it; why it is refused, if so."""

    error: dict[str, float]
    plain_error: dict[str, float]
    refusal: str | None


class Judge:
    """Checks providers on one workload.

    What float64 and plain PyTorch compute for a method is kept until another one is asked for: ask method by method.
    """

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self._known: dict[tuple[str, float], tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]] = {}

    def check(self, provider: Provider, method: Method) -> Verdict:
        """Run the provider once, at the case's dropout if its masks are known and else without dropout, and compare.

        The rule is the one of ``testing.assert_close_to_truth``: at most twice the error of plain PyTorch in the case's
        dtype, in which adapters are compared whatever dtype the provider keeps them in.
        """
        case = self.workload.case
        p = case.p if provider.same_mask else 0.0
        run_at = max(p, provider.least_p)
        twin = Workload(case.replace(p=run_at), *_tensors(self.workload))
        one = Pass(provider.build(twin, method), twin)
        torch.manual_seed(SEED)
        found = one.results()
        return judge(found, *self._references(provider, method, p))

    def _references(
        self, provider: Provider, method: Method, p: float
    ) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
        name = FROZEN if provider.name == FROZEN else str(method)
        if (name, p) not in self._known:
            self._known.clear()
            used = None if name == FROZEN else method
            truth = reference_results(self.workload, used, p, torch.float64)
            plain = reference_results(self.workload, used, p, self.workload.case.torch_dtype)
            self._known = {(name, p): (truth, plain)}
        return self._known[name, p]


def judge(found: dict[str, list[Tensor]], truth: dict[str, list[Tensor]], plain: dict[str, list[Tensor]]) -> Verdict:
    """Errors of all results; a refusal if any is beyond the rule or missing."""
    error, plain_error, refusal = {}, {}, None
    for name, expected in truth.items():
        got = [t.to(p.dtype) for t, p in zip(found[name], plain[name], strict=True)] if name in found else []
        if len(got) != len(expected):
            refusal = refusal or f"gives {len(got)} {name} for {len(expected)} layers"
            continue
        error[name] = max(relative_error(g, e) for g, e in zip(got, expected, strict=True))
        plain_error[name] = max(relative_error(p, e) for p, e in zip(plain[name], expected, strict=True))
        for n, (g, e, p) in enumerate(zip(got, expected, plain[name], strict=True)):
            try:
                assert_close_to_truth(g, e, p, f"{name} of layer {n}")
            except AssertionError as fault:
                refusal = refusal or str(fault)
    return Verdict(error, plain_error, refusal)


def reference_results(
    workload: Workload, method: Method | None, p: float, dtype: torch.dtype
) -> dict[str, list[Tensor]]:
    """y, dx, dA, dB by the package's reference in ``dtype``; without a method those of the frozen linears."""
    case = workload.case
    xs, a, b = ([t.detach().to(dtype).requires_grad_() for t in group] for group in _trained(workload))
    weights = [t.to(dtype) for t in workload.weights]
    masks = _masks(case, p, xs[0].device) if p and method else None

    def drop(n: int, x: Tensor) -> Tensor:
        assert masks is not None
        return dropout.apply_mask(x, masks[n], p)

    if method is None:
        ys, leaves = [torch.nn.functional.linear(x, w) for x, w in zip(xs, weights, strict=True)], xs
    else:
        leaves = [*xs, *a, *b]
        ys = reference.chain_forward(
            method.shortcut, method.pre_num, scaling_of(case), xs, weights, [None] * case.layers, a, b,
            drop if masks else None,
        )  # fmt: skip
    gradients = torch.autograd.grad(ys, leaves, [t.to(dtype) for t in workload.dys])
    count = case.layers
    found = {"y": [y.detach() for y in ys], "dx": list(gradients[:count])}
    if method is not None:
        found |= {"dA": list(gradients[count : 2 * count]), "dB": list(gradients[2 * count :])}
    return found


def _masks(case: Case, p: float, device: torch.device) -> list[Tensor]:
    """The masks that layers draw, first to execute first, from torch's generator as ``Judge.check`` leaves it."""
    torch.manual_seed(SEED)
    return [dropout.keep_mask(dropout.new_seed(device), case.m, case.k, p) for _ in range(case.layers)]


def _trained(workload: Workload) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return workload.xs, workload.a, workload.b


def _tensors(workload: Workload) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    return workload.weights, workload.a, workload.b, workload.xs, workload.dys

"""Clocks by device, rates measured with them, and interleaved rounds: in each, every subject runs once.

The order is drawn anew for each round, so that a ratio is of one moment: a machine that slows down, heats up or is
shared slows all subjects of a round alike. What is reported of a subject is percentiles of its times, and the median
over the rounds of its time relative to the floor's in the same round, with the half-width of that median's 95 %
confidence interval. Clocks are so thin that all logic runs under one that a test moves. The floor of a case is the time
that its arithmetic or its bytes take at the rates that were measured on this machine, now.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from reslora_kernels.bench.cases import DTYPES, Case, Method

GPU_CYCLES_PER_SECOND = 1.8e9  # about


class Clock(Protocol):
    """Marks in the order of the device's work, and the seconds between two of them once that work is done."""

    def mark(self) -> Any:
        """Now, for the device: costs nothing to speak of and waits for nothing."""

    def hold(self, seconds: float) -> None:
        """Keep the device busy for so long, so that what is launched meanwhile starts without waiting for Python."""

    def drain(self) -> None:
        """Wait until the device has passed every mark. Called outside what is timed only."""

    def seconds(self, start: Any, stop: Any) -> float:
        """Between two marks; after ``drain``."""


class CpuClock:
    """The processor's own time: work on it is done when the call returns."""

    def mark(self) -> int:
        return time.perf_counter_ns()

    def hold(self, seconds: float) -> None:
        return

    def drain(self) -> None:
        return

    def seconds(self, start: int, stop: int) -> float:
        return (stop - start) * 1e-9


class CudaClock:
    """CUDA events in the current stream."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def hold(self, seconds: float) -> None:
        torch.cuda._sleep(int(seconds * GPU_CYCLES_PER_SECOND))  # type: ignore[no-untyped-call]

    def drain(self) -> None:
        torch.cuda.synchronize()

    def seconds(self, start: torch.cuda.Event, stop: torch.cuda.Event) -> float:
        return float(start.elapsed_time(stop)) * 1e-3


def clock_of(device: torch.device) -> Clock:
    return CudaClock() if device.type == "cuda" else CpuClock()


class DeviceLostError(RuntimeError):
    """The GPU answers no more: nothing further can be measured in this process."""


def check_alive(device: torch.device) -> None:
    """Raise a DeviceLostError if the device does not answer."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize()
        torch.ones(1, device=device).item()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
    except RuntimeError as error:
        raise DeviceLostError(f"the GPU is lost: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """An exception as one short line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


@dataclass(frozen=True)
class Rates:
    """FLOP per second of a large matmul by dtype; bytes per second of a copy, those read and those written counted."""

    matmul: dict[str, float]
    copy: float


def measure_rates(dtypes: list[str], device: torch.device, clock: Clock) -> Rates:
    """Median of several large matmuls [size, size] in each dtype, and of copies that no cache holds."""
    gpu = device.type == "cuda"
    matmul = {}
    for name in dtypes:
        size = (8192 if DTYPES[name].itemsize == 2 else 4096) if gpu else 1024
        a, b = (torch.randn(size, size, device=device).to(DTYPES[name]) for _ in range(2))
        out = torch.empty_like(a)
        with Case(1, 1, 1, dtype=name).precision():
            matmul[name] = 2.0 * size**3 / _median_seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), clock)
        del a, b, out
    elements = (1 << 30 if gpu else 1 << 27) // 4
    source, target = torch.randn(elements, device=device), torch.zeros(elements, device=device)
    copy = 2.0 * source.numel() * 4 / _median_seconds(lambda: target.copy_(source), clock)
    return Rates(matmul, copy)


def _median_seconds(run: object, clock: Clock, repeats: int = 15) -> float:
    assert callable(run)
    for _ in range(3):
        run()
    clock.drain()
    marks = []
    for _ in range(repeats):
        start = clock.mark()
        run()
        marks.append((start, clock.mark()))
    clock.drain()
    return statistics.median(clock.seconds(start, stop) for start, stop in marks)


def stacked_ranks(case: Case, method: Method | None) -> tuple[int, int]:
    """(Σ R_a, Σ R_b) over the layers: rows of A and columns of B that the method multiplies by; none without one."""
    if method is None:
        return 0, 0
    count = case.layers
    if method.shortcut == "block":
        reach = count if method.pre_num == -1 else method.pre_num
        total = sum(min(reach, n) + 1 for n in range(count))
        return total * case.r, total * case.r
    ahead = count - 1 if method.shortcut == "input" else 0
    return (count + ahead) * case.r, count * case.r


def floor_seconds(case: Case, method: Method | None, rates: Rates) -> dict[str, float]:
    """Seconds of all layers, forward, backward and both: what takes longer, arithmetic or bytes.

    Arithmetic is 2MKN + 2M(R_a K + R_b N) FLOP forward, with twice the second term backward. Bytes are those of
    x, W, y, A, B forward, and of dy, W, x, dx, u, A, B, dA, dB backward, each read or written once.
    """
    size, layers = case.torch_dtype.itemsize, case.layers
    r_a, r_b = stacked_ranks(case, method)
    m, k, n = case.m, case.k, case.n
    low_rank_flops, low_rank_size = 2.0 * m * (r_a * k + r_b * n), float(r_a * k + r_b * n)
    matmul_flops = 2.0 * layers * m * k * n
    flops = {"forward": matmul_flops + low_rank_flops, "backward": matmul_flops + 2 * low_rank_flops}
    x_again = m * k * layers if method is not None else 0  # dA reads x once more
    moved = {
        "forward": layers * (m * k + n * k + m * n) + low_rank_size,
        "backward": layers * (m * n + n * k + m * k) + x_again + m * r_b + 2 * low_rank_size,
    }
    rate = rates.matmul[case.dtype]
    found = {phase: max(flops[phase] / rate, moved[phase] * size / rates.copy) for phase in flops}
    return found | {"both": found["forward"] + found["backward"]}


PHASES = ("forward", "backward", "both")
LAUNCH_SECONDS = 1e-4  # that Python takes at most for the marks and graph launches of a subject
CHUNK = 10  # rounds between two waits for the device


@dataclass(frozen=True)
class Subject:
    """Something to be timed. ``forward(i)`` runs on input set i; ``backward(i, outputs)`` on what it returned."""

    name: str
    forward: Callable[[int], Any]
    backward: Callable[[int, Any], Any] | None = None


@dataclass(frozen=True)
class Plan:
    """How long to measure: ``most`` rounds, fewer where they would take more than ``seconds``, at least ``least``.

    ``hold``: what is timed is launched while the device is kept busy before each round, so that the time which Python
    takes to launch it is not in the figures: for captured graphs of a few microseconds. ``launch_seconds`` is what it
    takes at most for the marks and launches of one subject.
    """

    most: int = 200
    least: int = 10
    seconds: float = 10.0
    warmup: int = 3
    hold: bool = False
    launch_seconds: float = LAUNCH_SECONDS
    input_sets: int = 1
    seed: int = 0


@dataclass
class Samples:
    """Seconds of every round, by phase; ``failure`` says why a subject was given up."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    failure: str | None = None

    def of(self, phase: str) -> list[float]:
        if phase == "forward":
            return self.forward
        if phase == "backward":
            return self.backward
        return [f + b for f, b in zip(self.forward, self.backward, strict=True)]


@dataclass(frozen=True)
class Relative:
    """A median of quotients, and the half-width of its 95 % confidence interval as a share of it."""

    median: float
    noise: float


def measure(
    subjects: Sequence[Subject],
    clock: Clock,
    plan: Plan,
    on_failure: Callable[[], None] = lambda: None,
    deadline: float = math.inf,
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, Samples]:
    """Time the subjects in interleaved rounds.

    Args:
        on_failure: called after a subject raised and was given up; raises where nothing can be measured any more.
        deadline: of ``time.monotonic``; no chunk of rounds begins after it, once ``plan.least`` rounds are done.
        on_round: called after each round, those of the warm-up included.

    Returns:
        the samples by subject; those of a round are at the same place in every subject that did not fail.
    """
    running = list(subjects)
    samples = {subject.name: Samples() for subject in subjects}
    order = random.Random(plan.seed)
    collected = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        spent = 0.0
        for n in range(plan.warmup):
            _hold(clock, plan, running)
            marks = _round(running, clock, n % plan.input_sets, samples, on_failure)
            clock.drain()
            on_round()
            spent = sum(clock.seconds(first, last) for first, _, last in marks.values())
        fitting = int(plan.seconds / spent) if spent > 0 else plan.most
        rounds = min(plan.most, max(plan.least, fitting))
        done = 0
        while done < rounds and running and (done < plan.least or time.monotonic() < deadline):
            chunk = []
            for n in range(done, min(done + CHUNK, rounds)):
                order.shuffle(running)
                _hold(clock, plan, running)
                chunk.append(_round(running, clock, n % plan.input_sets, samples, on_failure))
                on_round()
            clock.drain()
            for marks in chunk:
                for name, (start, middle, stop) in marks.items():
                    samples[name].forward.append(clock.seconds(start, middle))
                    samples[name].backward.append(clock.seconds(middle, stop))
            done += len(chunk)
            gc.collect(0)
    finally:
        if collected:
            gc.enable()
    return samples


def _hold(clock: Clock, plan: Plan, running: Sequence[Subject]) -> None:
    if plan.hold:
        clock.hold(plan.launch_seconds * len(running))


def _round(
    running: list[Subject], clock: Clock, index: int, samples: dict[str, Samples], on_failure: Callable[[], None]
) -> dict[str, tuple[Any, Any, Any]]:
    """The marks of every subject; one that raises leaves ``running``."""
    marks = {}
    for subject in list(running):
        try:
            start = clock.mark()
            outputs = subject.forward(index)
            middle = clock.mark()
            if subject.backward is not None:
                subject.backward(index, outputs)
            stop = clock.mark()
            del outputs
        except Exception as error:  # whatever a library raises: the others go on
            running.remove(subject)
            samples[subject.name] = Samples(failure=one_line(error))
            on_failure()
        else:
            marks[subject.name] = (start, middle, stop)
    return marks


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[-1]


def relative(values: Sequence[float], floor: Sequence[float]) -> Relative:
    """Median of the quotients of a round."""
    quotients = sorted(value / low for value, low in zip(values, floor, strict=True))
    median = statistics.median(quotients)
    low, high = confidence(quotients)
    return Relative(median, (high - low) / 2 / median)


def confidence(ordered: Sequence[float]) -> tuple[float, float]:
    """The 95 % confidence interval of the median: order statistics, whatever the distribution; all there is below 6."""
    n = len(ordered)
    tail, rank = 0.0, 0
    for k in range(n // 2):
        tail += math.comb(n, k) / 2**n
        if tail > 0.025:
            break
        rank = k
    return ordered[rank], ordered[n - 1 - rank]

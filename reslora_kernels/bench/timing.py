"""Interleaved rounds: in each, every subject runs once, in an order drawn anew, so that a ratio is of one moment.

A machine that slows down, heats up or is shared slows all subjects of a round alike. What is reported of a subject is
percentiles of its times, and the median over the rounds of its time relative to the floor's in the same round, with the
half-width of that median's 95 % confidence interval.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from reslora_kernels.bench.clocks import Clock, one_line

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

"""Time that tests move, and results made with it."""

from __future__ import annotations

import random
from collections.abc import Callable

from reslora_kernels.bench import timing
from reslora_kernels.bench.cases import LORA, Case, Method
from reslora_kernels.bench.results import TIMED, Measurement, Result
from reslora_kernels.bench.suite import AGAIN, fill

CASE = Case(8192, 4096, 4096)
MACHINE = {"gpu": None, "cpu": "test", "threads": 1, "torch": "2", "driver": None, "triton": None}
MACHINE |= {"reslora_kernels": "0", "gpu_l2_bytes": None}


class FakeClock:
    """Advances when work is done on it, and by a bit at each mark. ``speed`` is the machine's, and may drift."""

    def __init__(self, seed: int = 0, jitter: float = 0.0, drift: float = 0.0) -> None:
        self.now, self.drained, self.held, self.speed = 0.0, 0, 0.0, 1.0
        self.jitter, self.drift, self.random = jitter, drift, random.Random(seed)

    def mark(self) -> float:
        return self.now

    def hold(self, seconds: float) -> None:
        self.held += seconds

    def drain(self) -> None:
        self.drained += 1

    def seconds(self, start: float, stop: float) -> float:
        return stop - start

    def work(self, seconds: float) -> None:
        self.speed *= 1 + self.drift
        self.now += seconds * self.speed * (1 + self.jitter * self.random.random())

    def subject(self, name: str, forward: float, backward: float) -> timing.Subject:
        return timing.Subject(name, lambda i: self.work(forward), lambda i, outputs: self.work(backward))


def result(times: dict[str, float], clock: FakeClock, rounds: int = 60) -> Result:
    """Providers of plain LoRA that take so many seconds forward and twice as many backward; "frozen" among them."""
    subjects = [clock.subject(name, seconds, 2 * seconds) for name, seconds in times.items()]
    subjects.append(clock.subject(AGAIN, times["frozen"], 2 * times["frozen"]))
    samples = timing.measure(subjects, clock, timing.Plan(most=rounds, least=rounds, seconds=1e9))
    made = Result(dict(MACHINE), "0" * 40, False, "2026-01-02", {}, {name: "" for name in times})
    made.rates = {"matmul": {CASE.dtype: 1e14}, "copy": 1e12}
    for name in times:
        made.measurements.append(row(name, LORA, lambda r, name=name: fill(
            r, samples[name], samples["frozen"], samples[AGAIN])))  # fmt: skip
    return made


def row(provider: str, method: Method, fill_in: Callable[[Measurement], None]) -> Measurement:
    label = "" if provider == "frozen" else str(method)
    made = Measurement("standard", str(CASE), provider, label, TIMED)
    made.shape = {"m": CASE.m, "k": CASE.k, "n": CASE.n, "r": CASE.r, "dtype": CASE.dtype, "p": 0.0, "layers": 4}
    made.shape |= {"replay": False, "shortcut": method.shortcut, "pre_num": method.pre_num}
    made.floor_seconds = {"forward": 0.5, "backward": 1.0, "both": 1.5}
    made.error = made.plain_error = {"y": 1e-3, "dx": 1e-3, "dA": 2e-3, "dB": 2e-3}
    made.peak_bytes, made.saved_bytes = 3 << 20, 1 << 20
    fill_in(made)
    return made

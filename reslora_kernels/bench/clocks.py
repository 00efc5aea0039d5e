"""What tells the time, by device, so thin that all logic runs under a clock that a test moves; rates measured with it.

The floor of a case is the time that its arithmetic or its bytes take at those rates, measured on this machine, now.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
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

"""What tells the time, by device: as thin as it can be, so that all logic runs under a clock that a test moves."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch

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

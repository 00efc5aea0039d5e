"""Times of several ways to compute the same thing, in turn, on the device alone: captured graphs on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

Work = Callable[[int], object]  # computes on one of several sets of inputs, so that no cache holds them


def interleaved_seconds(
    works: dict[str, Work], sets: int, rounds: int, device: torch.device
) -> dict[str, tuple[float, float, float]]:
    """Seconds of one call, by name: median, 20 % and 80 % of the rounds, in each of which every work has its turn.

    A turn is one replay of a graph that holds a call on each set of inputs (on a CPU, the calls themselves).
    """
    turns = {name: _replay(work, sets) if device.type == "cuda" else _loop(work, sets) for name, work in works.items()}
    samples: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, turn in turns.items():
            samples[name].append(turn() / sets)
    return {name: _percentiles(taken) for name, taken in samples.items()}


def _percentiles(samples: Sequence[float]) -> tuple[float, float, float]:
    ranked = sorted(samples)
    return median(ranked), ranked[len(ranked) // 5], ranked[(4 * len(ranked)) // 5]


def _loop(work: Work, sets: int) -> Callable[[], float]:
    def turn() -> float:
        start = time.perf_counter()
        for index in range(sets):
            work(index)
        return time.perf_counter() - start

    turn()
    return turn


def _replay(work: Work, sets: int) -> Callable[[], float]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for index in (*range(sets), 0):
            work(index)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(sets):
            work(index)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def turn() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3

    for _ in range(3):
        turn()
    return turn


def matmul_rate(device: torch.device, size: int = 8192, dtype: torch.dtype = torch.bfloat16) -> float:
    """FLOP per second of this machine's library matmul of two random square matrices."""
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    seconds = interleaved_seconds({"matmul": lambda _: a @ b}, 1, 10, device)["matmul"][0]
    return float(2 * size**3 / seconds)


def copy_bandwidth(device: torch.device, size: int = 1 << 30) -> float:
    """Bytes per second, read and written, of a copy of ``size`` bytes."""
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    seconds = interleaved_seconds({"copy": lambda _: target.copy_(source)}, 1, 10, device)["copy"][0]
    return float(2 * size / seconds)

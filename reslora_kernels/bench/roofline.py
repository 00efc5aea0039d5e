"""The floor of a case: the time that its arithmetic or its bytes take at rates measured on this machine, now."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from reslora_kernels.bench.cases import DTYPES, Case, Method
from reslora_kernels.bench.clocks import Clock


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

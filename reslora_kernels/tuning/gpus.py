"""What is known of a GPU: its sizes, its rates, and what was measured, which a choice consults before the cost model.

The rates rank candidates only, and those of sm_90 are an H200's.

``measured.json``, which ``make tune`` writes, maps a GPU generation to {"machine", "versions", "commit"}, to "rates",
which maps a device's name to [16-bit FLOP of a matmul, bytes copied] a second, and to rows of each kind:

- "matmuls": dtype, m, n, k, rank, one_pass (whether x A_catᵀ could be had in one pass), and the fastest form and tile
  of the Triton backend with its seconds.
- "cuda_matmuls": form, dtype, m, n, k, rank and the microseconds of y [m, n] = x w + scale t b, x [m, k], by each
  kernel of the CUDA backend that was right: "portable" and variants of ``backends.hopper``, where the forms are too. A
  form in one pass also has "two passes", the fastest projection and matmul together.
- "cuda_projections": form, dtype, m, n, k and the microseconds of x aᵀ [m, n] by "portable" and "streaming".
- "calls" and "calls with dropout": dtype, m, n, k, rank and the microseconds that forward and backward took in each
  backend.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from math import log2
from typing import Any

import torch


@dataclass(frozen=True)
class Gpu:
    """What the choice of tiles needs to know of a GPU. Rates are per second: 16-bit FLOP of a matmul, bytes copied."""

    generation: str
    processors: int
    shared_bytes: int  # one program may use
    tma: bool
    shared_operands: bool  # the matrix unit reads shared memory itself; elsewhere operands pass through registers
    flops: float
    bandwidth: float
    share: float  # of the vendor library's matmul rate that a Triton matmul is taken to reach

    def rate(self, dtype: torch.dtype, precision: str) -> float:
        """FLOP per second of a library matmul in this dtype."""
        if dtype == torch.float32:
            return self.flops / (2 if precision == "tf32" else 12)
        return self.flops


GENERATIONS = {
    "sm_80": Gpu("sm_80", 108, 166_912, False, False, 250e12, 1.7e12, 0.95),
    "sm_89": Gpu("sm_89", 128, 101_376, False, False, 150e12, 0.9e12, 0.95),
    "sm_90": Gpu("sm_90", 132, 232_448, True, True, 790e12, 4.3e12, 0.88),
    "sm_100": Gpu("sm_100", 148, 232_448, True, True, 1500e12, 7.0e12, 0.88),
    "sm_120": Gpu("sm_120", 170, 101_376, True, False, 200e12, 1.6e12, 0.92),
    "gfx942": Gpu("gfx942", 304, 65_536, False, False, 700e12, 4.0e12, 0.85),
    "default": Gpu("default", 64, 65_536, False, False, 100e12, 0.5e12, 0.85),
    "interpreter": Gpu("interpreter", 4, 232_448, True, True, 1e9, 1e8, 1.0),
}


# FLOP and bytes a second, as above, of devices that have a word of their name to themselves.
RATES = {"H100": (798e12, 3.0e12), "H200": (790e12, 4.3e12)}
_SIMILAR = {"sm_86": "sm_89", "sm_87": "sm_80", "sm_103": "sm_100", "sm_121": "sm_120", "gfx940": "gfx942"}


_assumed: list[Gpu] = []


def is_assumed() -> bool:
    """Whether choices are made for a GPU that was named, whatever this machine has."""
    return bool(_assumed)


@contextmanager
def assume_gpu(gpu: Gpu) -> Iterator[None]:
    """Choose for ``gpu``, whatever this machine has."""
    _assumed.append(gpu)
    try:
        yield
    finally:
        _assumed.pop()


def gpu_of(device: torch.device) -> Gpu:
    """The GPU as the choice of tiles sees it; Triton's CPU interpreter for a CPU device."""
    if _assumed:
        return _assumed[-1]
    return GENERATIONS["interpreter"] if device.type == "cpu" else _probe(device.index or 0)


@cache
def _probe(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        name = str(properties.gcnArchName).split(":")[0]
    else:
        name = f"sm_{properties.major}{properties.minor}"
    generation = GENERATIONS.get(_SIMILAR.get(name, name), GENERATIONS["default"])
    return replace(with_rates(generation, properties.name), processors=properties.multi_processor_count)


def with_rates(gpu: Gpu, name: str) -> Gpu:
    """The same with the rates of the device of this name: those that were measured, else known, else as they are."""
    found = table().get(gpu.generation, {}).get("rates", {}).get(name)
    if found is None:
        found = next((rates for word, rates in RATES.items() if word in name.split()), (gpu.flops, gpu.bandwidth))
    flops, bandwidth = found
    return replace(gpu, flops=flops, bandwidth=bandwidth)


NEAR = 2.0  # a row answers for shapes whose sizes differ from its own by a factor of 4 in all


@cache
def table() -> dict[str, dict[str, Any]]:
    """The whole table, by generation; empty before anything was measured."""
    file = resources.files(__package__) / "measured.json"
    content: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return content


def calls_of(dropout: bool) -> str:
    """The kind of the rows of whole calls."""
    return "calls with dropout" if dropout else "calls"


def nearest(generation: str, kind: str, sizes: dict[str, int], exact: dict[str, str | bool]) -> dict[str, Any] | None:
    """The measured row of ``kind`` closest to ``sizes`` (all positive) among those equal in ``exact``; None if far."""
    best, least = None, NEAR
    for row in table().get(generation, {}).get(kind, ()):
        if any(row[name] != value for name, value in exact.items()):
            continue
        distance = sum(abs(log2(size / row[name])) for name, size in sizes.items())
        if distance <= least:
            best, least = row, distance
    return best

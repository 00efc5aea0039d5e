"""The choice among what is possible: what was measured fastest, else a cost model that can explain itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil

import torch

from .gpus import Gpu, assume_gpu, nearest
from .tiles import MatmulTile, grads_tile, matmul_tiles, outer_tile, with_rank

_assumed: list[tuple[tuple[str, ...], MatmulTile | None]] = []
LAUNCH_SECONDS = 3e-6  # from one kernel to a dependent next one, its ramp-up included


def is_assumed() -> bool:
    """Whether someone has said what is to be chosen."""
    return bool(_assumed)


@contextmanager
def assume(gpu: Gpu, forms: tuple[str, ...] = (), tile: MatmulTile | None = None) -> Iterator[None]:
    """Choose for ``gpu``, the first of ``forms`` that is possible, and this tile, whatever is known of speeds.

    For compiling without a GPU, for tests and for measuring one form or tile against another.
    """
    _assumed.append((forms, tile))
    try:
        with assume_gpu(gpu):
            yield
    finally:
        _assumed.pop()


def reads_dy_once(gpu: Gpu, m: int, n: int, k: int, rank: int, own: int, dtype: torch.dtype) -> bool:
    """Whether du, dB and dA cost fewer bytes with one read of dy and all the parts that this leaves to add up.

    One read: du in parts by column, dB and dA in parts of few rows. Two reads: du is whole, dB and dA have few parts.
    """
    over_dy, over_x = grads_tile(gpu, m, n, own, dtype), grads_tile(gpu, m, k, rank, dtype)
    row_parts = [0 if m <= tile.block_m else ceil(m / tile.block_m) for tile in (over_dy, over_x)]
    once = over_dy.parts(n) * m * own + row_parts[0] * n * own + row_parts[1] * k * rank
    parts = outer_tile(gpu, m, n + k, rank, dtype).parts(m)
    twice = (parts if parts > 1 else 0) * (n * own + k * rank)
    return 8 * once <= 8 * twice + dtype.itemsize * m * n


@dataclass(frozen=True)
class FormChoice:
    """How an augmented matmul is computed: ``form`` and tile, what it is expected to take, and why."""

    form: str  # "one_pass", "two_pass" or "library"
    tile: MatmulTile | None
    seconds: float
    reason: str


def matmul_seconds(
    gpu: Gpu, tile: MatmulTile, m: int, n: int, k: int, dtype: torch.dtype, precision: str, one_pass: bool
) -> float:
    """Whole waves of tiles at the tile's share of the matmul rate, or the bytes of the operands, whichever is longer.

    A tile of 128 x 256 is taken to reach ``gpu.share`` of the library's rate, a smaller one the square root of its
    arithmetic intensity's share of that tile's. One pass multiplies ``block_r`` more columns.
    """
    intensity = tile.block_m * tile.block_n / (tile.block_m + tile.block_n)
    efficiency = gpu.share * min(1.0, intensity / (128 * 256 / 384)) ** 0.5
    waves = ceil(ceil(m / tile.block_m) * ceil(n / tile.block_n) / gpu.processors)
    columns = tile.block_n + (tile.block_r if one_pass else 0)
    flops = 2.0 * tile.block_m * columns * k * waves * gpu.processors
    size = dtype.itemsize * (m * k + k * n + m * n)
    return float(max(flops / (gpu.rate(dtype, precision) * efficiency), size / gpu.bandwidth) + LAUNCH_SECONDS)


def library_seconds(gpu: Gpu, m: int, n: int, k: int, rank: int, dtype: torch.dtype, precision: str) -> float:
    """The low-rank product written first, then the library's matmul on top of it, which reads it under cover."""
    size = dtype.itemsize * (m * k + k * n + m * n)
    product = max(2.0 * m * n * k / gpu.rate(dtype, precision), size / gpu.bandwidth)
    return product + m * n * dtype.itemsize / gpu.bandwidth + 2 * LAUNCH_SECONDS


def choose(
    gpu: Gpu,
    m: int,
    n: int,
    k: int,
    rank: int,
    dtype: torch.dtype,
    precision: str,
    forms: tuple[str, ...],
    aligned: bool = True,
) -> FormChoice:
    """The form and tile that were fastest where this was measured, else those with the shortest expected time.

    Args:
        forms: what is possible. "one_pass": x A_catᵀ is computed in the main loop, and the other forms cost a pass over
            x beside it. Without it their t is there already. "library": the vendor library's matmul on top of the
            low-rank product.
    """
    wanted, tile = _assumed[-1] if _assumed else ((), None)
    narrowed = tuple(form for form in wanted if form in forms)[:1] or forms
    return _choose(gpu, m, n, k, rank, dtype, precision, forms, aligned, narrowed, tile)


@lru_cache(maxsize=4096)
def _choose(
    gpu: Gpu,
    m: int,
    n: int,
    k: int,
    rank: int,
    dtype: torch.dtype,
    precision: str,
    possible: tuple[str, ...],
    aligned: bool,
    forms: tuple[str, ...],
    wanted_tile: MatmulTile | None,
) -> FormChoice:
    if forms == possible and wanted_tile is None and aligned:
        sizes = {"m": m, "n": n, "k": k, "rank": rank}
        row = nearest(gpu.generation, "matmuls", sizes, {"dtype": str(dtype), "one_pass": "one_pass" in possible})
        if row and row["form"] in possible:
            tile = MatmulTile(**row["tile"]) if row["tile"] else None
            if tile is not None:
                tile = with_rank(tile, gpu, rank, row["form"] == "one_pass")
            return FormChoice(row["form"], tile, row["seconds"], f"{row['form']}, measured fastest near this shape")
    pass_over_x = dtype.itemsize * m * k / gpu.bandwidth + LAUNCH_SECONDS if "one_pass" in possible else 0.0
    candidates = []
    for form in forms:
        before = 0.0 if form == "one_pass" else pass_over_x
        if form == "library":
            seconds = library_seconds(gpu, m, n, k, rank, dtype, precision)
            candidates.append(FormChoice(form, None, before + seconds, ""))
            continue
        tiles = matmul_tiles(gpu, m, rank, dtype, precision, form == "one_pass", aligned)
        for tile in [with_rank(wanted_tile, gpu, rank, form == "one_pass")] if wanted_tile else tiles:
            seconds = matmul_seconds(gpu, tile, m, n, k, dtype, precision, form == "one_pass")
            candidates.append(FormChoice(form, tile, before + seconds, ""))
    ranked = sorted(candidates, key=lambda choice: choice.seconds)
    best = ranked[0]
    others = {choice.form: choice for choice in reversed(ranked) if choice.form != best.form}
    against = ", ".join(f"{form} {choice.seconds * 1e6:.1f}" for form, choice in others.items())
    reason = f"{best.form} by the cost model of {gpu.generation}: {best.seconds * 1e6:.1f} us"
    return replace(best, reason=f"{reason} against {against}" if against else reason)

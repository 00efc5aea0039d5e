"""Which blocks a kernel works in: frozen configurations for each GPU generation, a validity predicate, a cost model.

Nothing is tuned at run time: processes of one job must choose alike, and a choice must hold inside a captured graph.
The rates below only rank candidates. They are data-sheet figures times what large matmuls commonly reach, except for
sm_90, whose rates were measured on an H200.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from math import ceil

import torch

from .measured import nearest

MAX_RANK = 1024
LAUNCH_SECONDS = 3e-6  # from one kernel to a dependent next one, its ramp-up included


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
_SIMILAR = {"sm_86": "sm_89", "sm_87": "sm_80", "sm_103": "sm_100", "sm_121": "sm_120", "gfx940": "gfx942"}
_assumed: list[tuple[Gpu, tuple[str, ...], MatmulTile | None]] = []


@contextmanager
def assume(gpu: Gpu, forms: tuple[str, ...] = (), tile: MatmulTile | None = None) -> Iterator[None]:
    """Choose for ``gpu``, the first of ``forms`` that is possible, and this tile, whatever is known of speeds.

    For compiling without a GPU, for tests and for measuring one form or tile against another.
    """
    _assumed.append((gpu, forms, tile))
    try:
        yield
    finally:
        _assumed.pop()


def gpu_of(device: torch.device) -> Gpu:
    """The GPU as the choice of tiles sees it; Triton's CPU interpreter for a CPU device."""
    if _assumed:
        return _assumed[-1][0]
    return GENERATIONS["interpreter"] if device.type == "cpu" else _probe(device.index or 0)


@cache
def _probe(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        name = str(properties.gcnArchName).split(":")[0]
    else:
        name = f"sm_{properties.major}{properties.minor}"
    generation = GENERATIONS.get(_SIMILAR.get(name, name), GENERATIONS["default"])
    return replace(generation, processors=properties.multi_processor_count)


@dataclass(frozen=True)
class MatmulTile:
    """Blocks of the augmented matmul. ``halves``: the epilogue stores a tile in that many column blocks."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    halves: int = 1
    block_r: int = 16
    group_m: int = 8
    persistent: bool = False
    tma: bool = False

    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    def shared_bytes(self, itemsize: int, one_pass: bool = False) -> int:
        """Operand stages, and the epilogue's staging where the store goes through TMA."""
        columns = self.block_m + self.block_n + (self.block_r if one_pass else 0)
        staging = self.block_m * self.block_n // self.halves if self.tma else 0
        return (self.num_stages * columns * self.block_k + staging) * itemsize

    def accumulators(self, one_pass: bool = False) -> int:
        """Float32 accumulators of each thread."""
        return self.block_m * (self.block_n + (self.block_r if one_pass else 0)) // (32 * self.num_warps)


@dataclass(frozen=True)
class ProjectTile:
    """Blocks of the projection; K is reduced in at most ``splits`` parts."""

    block_m: int
    block_k: int
    block_r: int
    splits: int
    num_warps: int
    num_stages: int
    tma: bool = False

    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    def split_k(self, k: int) -> int:
        """Length of a part, a multiple of ``block_k``."""
        return max(1, ceil(k / (self.splits * self.block_k))) * self.block_k

    def parts(self, k: int) -> int:
        return max(1, ceil(k / self.split_k(k)))


@dataclass(frozen=True)
class GradsTile:
    """Blocks of the gradient passes: ``block_m`` rows stay with a program, blocks of ``block_c`` columns stream by."""

    block_m: int
    block_c: int
    block_r: int
    chunks: int
    num_warps: int
    num_stages: int
    tma: bool = False
    stream_first: bool = False

    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    def chunk(self, columns: int) -> int:
        """Columns of a program, a multiple of ``block_c``."""
        return max(1, ceil(columns / (self.chunks * self.block_c))) * self.block_c

    def parts(self, columns: int) -> int:
        return max(1, ceil(columns / self.chunk(columns)))


@dataclass(frozen=True)
class OuterTile:
    """Blocks of the outer products: ``block_c`` columns stay with a program, the rows come in ``splits`` parts."""

    block_m: int
    block_c: int
    block_r: int
    splits: int
    num_warps: int
    num_stages: int
    tma: bool = False
    stream_first: bool = False

    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    def rows(self, m: int) -> int:
        """Rows of a part, a multiple of ``block_m``."""
        return max(1, ceil(m / (self.splits * self.block_m))) * self.block_m

    def parts(self, m: int) -> int:
        return max(1, ceil(m / self.rows(m)))


_LARGE = {
    "sm_80": (
        MatmulTile(128, 256, 32, 8, 4),
        MatmulTile(128, 128, 32, 4, 4),
        MatmulTile(64, 128, 64, 4, 3),
        MatmulTile(64, 64, 64, 4, 4),
    ),
    "sm_89": (MatmulTile(128, 128, 32, 4, 4), MatmulTile(64, 128, 32, 4, 4), MatmulTile(64, 64, 64, 4, 4)),
    "sm_90": (
        MatmulTile(128, 256, 64, 8, 3, halves=2, persistent=True, tma=True),
        MatmulTile(128, 128, 64, 8, 4, persistent=True, tma=True),
        MatmulTile(64, 128, 64, 4, 4, tma=True),
        MatmulTile(64, 64, 128, 4, 4, tma=True),
    ),
    "sm_100": (
        MatmulTile(128, 256, 64, 8, 3, halves=2, persistent=True, tma=True),
        MatmulTile(128, 128, 64, 8, 4, persistent=True, tma=True),
        MatmulTile(64, 128, 64, 4, 4, tma=True),
    ),
    "sm_120": (
        MatmulTile(128, 128, 32, 8, 3, halves=2, tma=True),
        MatmulTile(64, 128, 32, 4, 4, tma=True),
        MatmulTile(64, 64, 64, 4, 4, tma=True),
    ),
    "gfx942": (MatmulTile(128, 128, 64, 8, 2), MatmulTile(64, 128, 64, 4, 2), MatmulTile(64, 64, 64, 4, 2)),
    "default": (MatmulTile(64, 64, 32, 4, 2),),
    "interpreter": (MatmulTile(32, 64, 32, 4, 2, halves=2, group_m=2, persistent=True, tma=True),),
}
_SMALL = {  # at most 64 rows: bound by reading the weight
    "sm_80": (MatmulTile(16, 64, 128, 4, 5), MatmulTile(32, 64, 128, 4, 4), MatmulTile(16, 32, 256, 4, 4)),
    "sm_89": (MatmulTile(16, 64, 128, 4, 4), MatmulTile(32, 64, 128, 4, 3), MatmulTile(16, 32, 128, 4, 5)),
    "sm_90": (
        MatmulTile(16, 64, 128, 4, 5, tma=True),
        MatmulTile(32, 64, 128, 4, 5, tma=True),
        MatmulTile(16, 32, 256, 4, 5, tma=True),
    ),
    "sm_100": (MatmulTile(16, 64, 128, 4, 5, tma=True), MatmulTile(32, 64, 128, 4, 5, tma=True)),
    "sm_120": (MatmulTile(16, 64, 128, 4, 4, tma=True), MatmulTile(32, 64, 128, 4, 3, tma=True)),
    "gfx942": (MatmulTile(16, 64, 128, 4, 2), MatmulTile(32, 64, 128, 4, 2)),
    "default": (MatmulTile(16, 64, 64, 4, 2),),
    "interpreter": (MatmulTile(16, 32, 32, 4, 2, tma=True),),
}


def next_power_of_two(size: int) -> int:
    """The smallest power of two from 16 on that is at least ``size``."""
    return max(16, 1 << (size - 1).bit_length())


def rank_block(rank: int, limit: int) -> int:
    """Ranks in a block, at most ``limit``."""
    return min(limit, next_power_of_two(rank))


def with_rank(tile: MatmulTile, gpu: Gpu, rank: int, one_pass: bool) -> MatmulTile:
    """The tile with blocks for this rank: all of it in one pass, fewer at a time where operands take registers."""
    limit = 64 if one_pass or gpu.shared_operands else 16 if tile.accumulators() >= 128 else 32
    return replace(tile, block_r=rank_block(rank, limit))


def fits(tile: MatmulTile, gpu: Gpu, itemsize: int, one_pass: bool = False) -> bool:
    """Whether the tile's stages fit the shared memory and its accumulators the registers, beside the operands."""
    if gpu.generation == "sm_100" and one_pass and tile.block_n > 128:
        return False  # its two accumulators leave no tensor memory
    registers = 160 if gpu.shared_operands else 136
    return tile.shared_bytes(itemsize, one_pass) <= gpu.shared_bytes and tile.accumulators(one_pass) <= registers


def matmul_tiles(
    gpu: Gpu, m: int, rank: int, dtype: torch.dtype, precision: str, one_pass: bool, aligned: bool = True
) -> list[MatmulTile]:
    """The candidates for m rows, fitted to dtype and rank; never empty.

    ``aligned``: rows start at multiples of 16 bytes. Others are loaded element by element through registers.
    """
    table = _SMALL if m <= 64 else _LARGE
    scalar = dtype == torch.float32 and precision == "ieee"  # no matrix unit does that
    fitted = []
    for tile in table[gpu.generation]:
        tile = replace(with_rank(tile, gpu, rank, one_pass), tma=tile.tma and gpu.tma)
        if dtype == torch.float32:
            block_k = min(tile.block_k, 32) if precision == "tf32" else 16
            tile = replace(tile, block_k=block_k)
        if not aligned or scalar:  # operands pass through registers
            small = (min(tile.block_m, 64), min(tile.block_n, 32 if scalar else 64), min(tile.block_k, 32))
            tile = replace(tile, block_m=small[0], block_n=small[1], block_k=small[2], num_warps=4, halves=1)
        while not fits(tile, gpu, dtype.itemsize, one_pass) and (tile.num_stages > 2 or tile.block_k > 16):
            stages = tile.num_stages - 1 if tile.num_stages > 2 else tile.num_stages
            block_k = tile.block_k if tile.num_stages > 2 else tile.block_k // 2
            tile = replace(tile, num_stages=stages, block_k=block_k)
        if fits(tile, gpu, dtype.itemsize, one_pass):
            fitted.append(tile)
    return fitted


def project_tile(gpu: Gpu, m: int, k: int, rank: int, dtype: torch.dtype) -> ProjectTile:
    """64 rows a program, 32 or 16 where those leave processors idle; then K is split until every one has a program."""
    small = gpu.generation == "interpreter"
    block_r = rank_block(rank, 128)
    block_m = 16 if small else next((rows for rows in (64, 32) if ceil(m / rows) >= 0.75 * gpu.processors), 16)
    block_k = 32 if small else (64 if block_r > 64 else 128) * 2 // dtype.itemsize
    if gpu.shared_bytes < 100_000:
        block_k //= 2
    programs = ceil(m / block_m) * ceil(rank / block_r)
    splits = max(1, min(16, gpu.processors // max(1, programs), k // (4 * block_k)))
    warps = 8 if block_r > 64 else 4
    return ProjectTile(block_m, block_k, block_r, splits, warps, 2 if gpu.generation == "gfx942" else 4, gpu.tma)


def grads_tile(gpu: Gpu, m: int, columns: int, rank: int, dtype: torch.dtype) -> GradsTile:
    """Up to 256 rows a program, fewer at high rank; at most 16 chunks of columns, to keep every processor busy."""
    small = gpu.generation == "interpreter"
    block_r = rank_block(rank, 128)
    held = 32 if small else 64 if dtype.itemsize == 4 else 256 if gpu.shared_operands else 128
    if block_r > (64 if gpu.shared_operands else 32):
        held //= 2
    block_m = min(held, next_power_of_two(m))
    block_c = 32 if small or dtype.itemsize == 4 else 64
    row_chunks = ceil(m / block_m) * ceil(rank / block_r)
    chunks = max(1, min(16, gpu.processors // max(1, row_chunks), ceil(columns / block_c)))
    stages = 2 if gpu.generation == "gfx942" else 3
    warps = 8 if block_m >= 128 or block_r >= 128 else 4
    return GradsTile(block_m, block_c, block_r, chunks, warps, stages, gpu.tma, gpu.shared_operands)


def outer_tile(gpu: Gpu, m: int, columns: int, rank: int, dtype: torch.dtype) -> OuterTile:
    """128 columns a program, ``columns`` those of x and dy together; rows in as many parts as fill the processors."""
    small = gpu.generation == "interpreter"
    block_r = rank_block(rank, 256 if gpu.shared_operands and dtype.itemsize == 2 else 128)
    block_c = 32 if small or dtype.itemsize == 4 else 128 if block_r <= 64 and gpu.shared_operands else 64
    block_m = min(
        32 if small else 64 if gpu.shared_bytes < 110_000 or dtype.itemsize == 4 else 128, next_power_of_two(m)
    )
    splits = max(1, gpu.processors // max(1, ceil(columns / block_c)))
    warps = 8 if block_r >= 128 or block_c >= 128 else 4
    stages = 2 if gpu.generation == "gfx942" else 3
    return OuterTile(block_m, block_c, block_r, splits, warps, stages, gpu.tma, gpu.shared_operands)


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
class Choice:
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
) -> Choice:
    """The form and tile that were fastest where this was measured, else those with the shortest expected time.

    Args:
        forms: what is possible. "one_pass": x A_catᵀ is computed in the main loop, and the other forms cost a pass over
            x beside it. Without it their t is there already. "library": the vendor library's matmul on top of the
            low-rank product.
    """
    _, wanted, tile = _assumed[-1] if _assumed else (gpu, (), None)
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
) -> Choice:
    if forms == possible and wanted_tile is None and aligned:
        sizes = {"m": m, "n": n, "k": k, "rank": rank}
        row = nearest(gpu.generation, "matmuls", sizes, {"dtype": str(dtype), "one_pass": "one_pass" in possible})
        if row and row["form"] in possible:
            tile = MatmulTile(**row["tile"]) if row["tile"] else None
            if tile is not None:
                tile = with_rank(tile, gpu, rank, row["form"] == "one_pass")
            return Choice(row["form"], tile, row["seconds"], f"{row['form']}, measured fastest near this shape")
    pass_over_x = dtype.itemsize * m * k / gpu.bandwidth + LAUNCH_SECONDS if "one_pass" in possible else 0.0
    candidates = []
    for form in forms:
        before = 0.0 if form == "one_pass" else pass_over_x
        if form == "library":
            seconds = library_seconds(gpu, m, n, k, rank, dtype, precision)
            candidates.append(Choice(form, None, before + seconds, ""))
            continue
        tiles = matmul_tiles(gpu, m, rank, dtype, precision, form == "one_pass", aligned)
        for tile in [with_rank(wanted_tile, gpu, rank, form == "one_pass")] if wanted_tile else tiles:
            seconds = matmul_seconds(gpu, tile, m, n, k, dtype, precision, form == "one_pass")
            candidates.append(Choice(form, tile, before + seconds, ""))
    ranked = sorted(candidates, key=lambda choice: choice.seconds)
    best = ranked[0]
    others = {choice.form: choice for choice in reversed(ranked) if choice.form != best.form}
    against = ", ".join(f"{form} {choice.seconds * 1e6:.1f}" for form, choice in others.items())
    reason = f"{best.form} by the cost model of {gpu.generation}: {best.seconds * 1e6:.1f} us"
    return replace(best, reason=f"{reason} against {against}" if against else reason)

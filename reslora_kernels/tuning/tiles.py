"""Which blocks a kernel can work in: frozen configurations for each GPU generation, and a validity predicate.

Nothing is tuned at run time: processes of one job must choose alike, and a choice must hold inside a captured graph.
The rates below only rank candidates. They are data-sheet figures times what large matmuls commonly reach, except for
sm_90, whose rates were measured on an H200.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import TypeVar

import torch

from .gpus import Gpu
from .launch import on_matrix_unit

MAX_RANK = 1024


def launch_options(num_warps: int, num_stages: int, registers: int) -> dict[str, int]:
    """What Triton is told of a launch. ``registers``: the most of a thread, or 0 for what ptxas makes of it.

    Left alone, ptxas spills a few values where that makes room for one block more on a multiprocessor, which shared
    memory may have no room for. Told how many registers there are, it does not.
    """
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return options | {"maxnreg": registers} if registers else options


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
    registers: int = 0

    def options(self) -> dict[str, int]:
        return launch_options(self.num_warps, self.num_stages, self.registers)

    def shared_bytes(self, itemsize: int, one_pass: bool = False) -> int:
        """Operand stages, and the epilogue's staging where the store goes through TMA.

        In one pass over x with more than 16 ranks another x and A wait beside the stages, as compiled kernels show, and
        without TMA a third A.
        """
        columns = self.block_m + self.block_n + (self.block_r if one_pass else 0)
        waiting = self.block_m + (1 if self.tma else 2) * self.block_r if one_pass and self.block_r > 16 else 0
        staging = self.block_m * self.block_n // self.halves if self.tma else 0
        return ((self.num_stages * columns + waiting) * self.block_k + staging) * itemsize

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

    def shared_bytes(self, itemsize: int) -> int:
        """Operand stages, one more where masked operands wait for their product, one where eight warps trade sums."""
        stages = self.num_stages + (2 if self.num_warps > 4 else 1)
        return stages * (self.block_m + self.block_r) * self.block_k * itemsize

    def split_k(self, k: int) -> int:
        """Length of a part, a multiple of ``block_k``."""
        return max(1, ceil(k / (self.splits * self.block_k))) * self.block_k

    def parts(self, k: int) -> int:
        return max(1, ceil(k / self.split_k(k)))


@dataclass(frozen=True)
class StreamTile:
    """Blocks of a reduction over rows: ``block_m`` of them, ``block_c`` columns of the stream, in ``splits`` parts."""

    block_m: int
    block_c: int
    block_r: int
    splits: int
    num_warps: int
    num_stages: int
    tma: bool = False
    stream_first: bool = False
    registers: int = 0

    def options(self) -> dict[str, int]:
        return launch_options(self.num_warps, self.num_stages, self.registers)

    def _part(self, size: int, block: int) -> int:
        return max(1, ceil(size / (self.splits * block))) * block


@dataclass(frozen=True)
class GradsTile(StreamTile):
    """Of the gradient passes: the rows stay with a program, blocks of columns stream by, in parts of columns."""

    def shared_bytes(self, itemsize: int) -> int:
        """Stages of the stream and of B, and what stays."""
        stream = self.num_stages * (self.block_m + self.block_r) * self.block_c
        return (stream + 2 * self.block_m * self.block_r) * itemsize

    def chunk(self, columns: int) -> int:
        """Columns of a program, a multiple of ``block_c``."""
        return self._part(columns, self.block_c)

    def parts(self, columns: int) -> int:
        return max(1, ceil(columns / self.chunk(columns)))


@dataclass(frozen=True)
class OuterTile(StreamTile):
    """Of the outer products: the columns stay with a program, the rows come in parts."""

    def shared_bytes(self, itemsize: int) -> int:
        """Operand stages, and one more of the stream where it is masked."""
        stages = self.num_stages * (self.block_c + self.block_r) + self.block_c
        return stages * self.block_m * itemsize

    def rows(self, m: int) -> int:
        """Rows of a part, a multiple of ``block_m``."""
        return self._part(m, self.block_m)

    def parts(self, m: int) -> int:
        return max(1, ceil(m / self.rows(m)))


_LARGE = {
    "sm_80": (
        MatmulTile(128, 256, 32, 8, 5),  # with 4 stages three registers too many are wanted
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
        MatmulTile(64, 128, 64, 4, 3, tma=True),
    ),
    "sm_120": (
        MatmulTile(128, 128, 32, 8, 3, halves=2, tma=True),
        MatmulTile(64, 128, 32, 4, 4, tma=True, registers=255),
        MatmulTile(64, 64, 64, 4, 4, tma=True),
    ),
    "gfx942": (MatmulTile(128, 128, 64, 8, 2), MatmulTile(64, 128, 64, 4, 2), MatmulTile(64, 64, 64, 4, 2)),
    "default": (MatmulTile(64, 64, 32, 4, 2),),
    "interpreter": (MatmulTile(32, 64, 32, 4, 2, halves=2, group_m=2, persistent=True, tma=True),),
}
_SMALL = {  # at most 64 rows: bound by reading the weight
    "sm_80": (MatmulTile(16, 64, 128, 4, 5), MatmulTile(32, 64, 128, 4, 4), MatmulTile(16, 32, 128, 4, 5)),
    "sm_89": (MatmulTile(16, 64, 128, 4, 4), MatmulTile(32, 64, 128, 4, 3), MatmulTile(16, 32, 128, 4, 5)),
    "sm_90": (
        MatmulTile(16, 64, 128, 4, 5, tma=True, registers=255),
        MatmulTile(32, 64, 128, 4, 5, tma=True),
        MatmulTile(16, 32, 256, 4, 5, tma=True, registers=255),
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
    """The tile with blocks for this rank: all of it in one pass, fewer at a time where operands take registers.

    There the sums of 128 x 128 leave half of the registers that two blocks of threads share: 16 columns, not 32.
    """
    limit = 64 if one_pass or gpu.shared_operands else 16 if tile.block_m * tile.block_n >= 128 * 128 else 32
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
    scalar = not on_matrix_unit(dtype, precision)
    fitted = []
    for tile in table[gpu.generation]:
        tile = replace(with_rank(tile, gpu, rank, one_pass), tma=tile.tma and gpu.tma)
        if dtype == torch.float32:
            block_k = min(tile.block_k, 32) if precision == "tf32" else 16
            tile = replace(tile, block_k=block_k)
        if not aligned or scalar:  # operands pass through registers
            small = (min(tile.block_m, 64), min(tile.block_n, 32 if scalar else 64), min(tile.block_k, 32))
            tile = replace(tile, block_m=small[0], block_n=small[1], block_k=small[2], num_warps=4, halves=1)
            registers = 168 if gpu.generation == "sm_100" and not scalar else 0
            tile = replace(tile, num_stages=min(tile.num_stages, 3), registers=registers)
        while not fits(tile, gpu, dtype.itemsize, one_pass) and (tile.num_stages > 2 or tile.block_k > 16):
            stages = tile.num_stages - 1 if tile.num_stages > 2 else tile.num_stages
            block_k = tile.block_k if tile.num_stages > 2 else tile.block_k // 2
            tile = replace(tile, num_stages=stages, block_k=block_k)
        if fits(tile, gpu, dtype.itemsize, one_pass):
            fitted.append(tile)
    return fitted


SkinnyTile = TypeVar("SkinnyTile", ProjectTile, GradsTile, OuterTile)


def with_stages_that_fit(tile: SkinnyTile, gpu: Gpu, dtype: torch.dtype) -> SkinnyTile:
    """The tile with as many of its stages as shared memory holds."""
    while tile.num_stages > 1 and tile.shared_bytes(dtype.itemsize) > gpu.shared_bytes:
        tile = replace(tile, num_stages=tile.num_stages - 1)
    return tile


def project_tile(gpu: Gpu, m: int, k: int, rank: int, dtype: torch.dtype) -> ProjectTile:
    """64 rows a program, 32 or 16 where those leave processors idle; then K is split until every one has a program."""
    small = gpu.generation == "interpreter"
    block_r = rank_block(rank, 64 if gpu.shared_bytes < 70_000 else 128)
    block_m = 16 if small else next((rows for rows in (64, 32) if ceil(m / rows) >= 0.75 * gpu.processors), 16)
    block_k = 32 if small else (64 if block_r > 64 else 128) * 2 // dtype.itemsize
    if gpu.shared_bytes < 100_000:
        block_k //= 2
    programs = ceil(m / block_m) * ceil(rank / block_r)
    splits = max(1, min(16, gpu.processors // max(1, programs), k // (4 * block_k)))
    warps = 8 if block_r > 64 else 4
    tile = ProjectTile(block_m, block_k, block_r, splits, warps, 2 if gpu.generation == "gfx942" else 4, gpu.tma)
    return with_stages_that_fit(tile, gpu, dtype)


def grads_tile(gpu: Gpu, m: int, columns: int, rank: int, dtype: torch.dtype, aligned: bool = True) -> GradsTile:
    """Up to 256 rows a program, fewer at high rank; at most 16 chunks of columns, to keep every processor busy.

    ``aligned`` as for ``matmul_tiles``.
    """
    small = gpu.generation == "interpreter"
    block_r = rank_block(rank, 64 if rank % 8 or gpu.shared_bytes < 70_000 else 128)
    held = 32 if small else 64 if dtype.itemsize == 4 else 256 if gpu.shared_operands else 128
    if block_r > (64 if gpu.shared_operands else 32):
        held //= 2
    block_m = _few_heights(m, held if aligned else min(held, 64))
    block_c = 32 if small or dtype.itemsize == 4 or not aligned else 64
    row_chunks = ceil(m / block_m) * ceil(rank / block_r)
    chunks = max(1, min(16, gpu.processors // max(1, row_chunks), ceil(columns / block_c)))
    stages = 2 if gpu.generation == "gfx942" else 3
    warps = 8 if block_m >= 128 or block_r >= 128 else 4
    tile = GradsTile(block_m, block_c, block_r, chunks, warps, stages, gpu.tma, gpu.shared_operands)
    return with_stages_that_fit(tile, gpu, dtype)


def _few_heights(m: int, most: int) -> int:
    """Rows of a block for m of them: one of two, so that few kernels are compiled however m varies."""
    return min(64, most) if m <= 64 else most


def outer_tile(gpu: Gpu, m: int, columns: int, rank: int, dtype: torch.dtype, aligned: bool = True) -> OuterTile:
    """128 columns a program, ``columns`` those of x and dy together; rows in as many parts as fill the processors."""
    small = gpu.generation == "interpreter" or not aligned or dtype.itemsize == 4
    widest = 256 if gpu.shared_operands and not small else 128
    block_r = rank_block(rank, 64 if rank % 8 or gpu.shared_bytes < 70_000 else widest)
    block_c = 32 if small else 128 if block_r <= 64 and gpu.shared_operands else 64
    block_m = _few_heights(m, 32 if small else 64 if gpu.shared_bytes < 110_000 else 128)
    splits = max(1, gpu.processors // max(1, ceil(columns / block_c)))
    warps = 8 if block_r >= 128 or block_c >= 128 else 4
    stages = 2 if gpu.generation == "gfx942" else 3
    registers = 255 if gpu.generation == "sm_100" and warps == 8 else 0
    tile = OuterTile(block_m, block_c, block_r, splits, warps, stages, gpu.tma, gpu.shared_operands, registers)
    return with_stages_that_fit(tile, gpu, dtype)

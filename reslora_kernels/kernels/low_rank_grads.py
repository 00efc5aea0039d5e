"""dh, dA_cat and dB_cat: one pass over dy, one over x, both tall reductions over tokens.

A program holds BLOCK_M rows of the rank-r operand and lets its chunk of the columns of dy (or x) stream by: each block
gives a block of the outer product, and dy's also adds to du = dy B_cat of those rows. Products over a part of the rows
or columns go to float32 workspaces; whoever needs a sum adds the parts in order. No atomics.

The pass over x draws the dropout mask of x once more and leaves it as packed bits for the matmul that makes dx.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning.launch import Launch, Sum, fits_tma, precision, workspace
from ..tuning.tiles import GradsTile
from .device import (
    TRITON_DTYPE,
    add_partials,
    descriptor,
    keep_bytes,
    load_block,
    outer_product,
    side_channel,
    store_product,
    sum_products,
    unpack_bits,
)


@triton.jit(do_not_specialize=["m", "chunk_blocks"])
def pass_over_dy_kernel(
    dy,
    b,
    u,
    du_partial,
    db_partial,
    m,
    n,
    rank,
    dy_row,
    dy_column,
    b_row,
    b_column,
    u_row,
    chunk_blocks,
    db_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TMA: tl.constexpr,
    STREAM_FIRST: tl.constexpr,
    WHOLE_N: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """BLOCK_M rows of dy [m, n] over ``chunk_blocks`` blocks of columns: du_partial [parts, m, rank] = dy b for b
    [n, rank], and db_partial [row blocks, n, rank] = db_scale dyᵀ u for u [m, rank].
    """
    row = tl.program_id(0) * BLOCK_M
    part = tl.program_id(1)
    chunk = chunk_blocks * BLOCK_C
    column = tl.program_id(2) * BLOCK_R
    j = column + tl.arange(0, BLOCK_R)
    du = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if db_partial is not None:
        u_block = load_block(u, row, column, m, rank, u_row, 1, BLOCK_M, BLOCK_R, False, False)
        db_rows = db_partial + tl.program_id(0).to(tl.int64) * n * rank
    for start in range(part * chunk, min(n, (part + 1) * chunk), BLOCK_C):
        dy_block = load_block(dy, row, start, m, n, dy_row, dy_column, BLOCK_M, BLOCK_C, TMA, WHOLE_N)
        if du_partial is not None:
            b_block = load_block(b, start, column, n, rank, b_row, b_column, BLOCK_C, BLOCK_R, False, False)
            du = tl.dot(dy_block, b_block.to(DTYPE), du, input_precision=PRECISION)
        if db_partial is not None:
            c = start + tl.arange(0, BLOCK_C)
            db = outer_product(dy_block, u_block, None, STREAM_FIRST, PRECISION) * db_scale
            store_product(db_rows, db, c, j, n, rank, rank, 1, STREAM_FIRST)
    if du_partial is not None:
        i = row + tl.arange(0, BLOCK_M)
        at = du_partial + (part.to(tl.int64) * m + i[:, None]) * rank + j[None, :]
        tl.store(at, du, mask=(i < m)[:, None] & (j < rank)[None, :])


@triton.jit(do_not_specialize=["m", "du_parts", "chunk_blocks"])
def pass_over_x_kernel(
    x,
    seed,
    du_partial,
    dhanded,
    dh,
    dresidual,
    da_partial,
    bits,
    m,
    k,
    rank,
    du_rank,
    du_parts,
    x_row,
    x_column,
    dhanded_row,
    dhanded_column,
    hand_start,
    hand_stop,
    factor,
    scaling,
    threshold,
    bits_row,
    chunk_blocks,
    da_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TMA: tl.constexpr,
    STREAM_FIRST: tl.constexpr,
    WHOLE_K: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """BLOCK_M rows of x [m, k] over ``chunk_blocks`` blocks of columns: dh [m, rank] from dhanded and du_partial
    [du_parts, m, du_rank], dresidual [m, du_rank], bits [m, bits_row] of the mask, and da_partial
    [row blocks, rank, k] = da_scale dhᵀ D(x).
    """
    row = tl.program_id(0) * BLOCK_M
    part = tl.program_id(1)
    chunk = chunk_blocks * BLOCK_C
    column = tl.program_id(2) * BLOCK_R
    i = row + tl.arange(0, BLOCK_M)
    j = column + tl.arange(0, BLOCK_R)
    du = sum_products(du_partial, row, column, m, du_rank, du_parts, BLOCK_M, BLOCK_R)
    value = side_channel(
        du, row, column, m, factor * scaling, dhanded, dhanded_row, dhanded_column, hand_start, hand_stop,
        dh, rank, dresidual, scaling, 0, du_rank, part == 0, BLOCK_M, BLOCK_R,
    )  # fmt: skip
    if seed is not None:
        seed_value = tl.load(seed)
    if (da_partial is not None) or (seed is not None):
        t_block = value.to(DTYPE)
        if da_partial is not None:
            da_rows = da_partial + tl.program_id(0).to(tl.int64) * k * rank
        for start in range(part * chunk, min(k, (part + 1) * chunk), BLOCK_C):
            if da_partial is not None:
                x_block = load_block(x, row, start, m, k, x_row, x_column, BLOCK_M, BLOCK_C, TMA, WHOLE_K)
            if seed is not None:
                group = start // 8 + tl.arange(0, BLOCK_C // 8)
                keep = keep_bytes(seed_value, i, group, threshold)
                if bits is not None:
                    at = bits + i[:, None].to(tl.int64) * bits_row + group[None, :]
                    inside = (i < m)[:, None] & (group < bits_row)[None, :] & (tl.program_id(2) == 0)
                    tl.store(at, keep.to(tl.uint8), mask=inside)
                if da_partial is not None:
                    x_block = tl.where(unpack_bits(keep, BLOCK_M, BLOCK_C // 8, 8), x_block, 0.0)
            if da_partial is not None:
                c = start + tl.arange(0, BLOCK_C)
                da = outer_product(x_block, t_block, None, STREAM_FIRST, PRECISION) * da_scale
                store_product(da_rows, da, c, j, k, rank, 1, k, STREAM_FIRST)


@triton.jit(do_not_specialize=["da_parts", "db_parts"])
def finish_kernel(da_partial, da, db_partial, db, da_parts, da_size, da_scale, db_parts, db_size, db_scale):
    """da [da_size] = da_scale times the sum of da_partial [da_parts, da_size], float32; db likewise."""
    if da_partial is not None:
        for block in range(tl.program_id(0), tl.cdiv(da_size, 1024), tl.num_programs(0)):
            add_partials(block, da_partial, da, da_parts, da_size, da_scale, 1024)
    if db_partial is not None:
        for block in range(tl.program_id(0), tl.cdiv(db_size, 1024), tl.num_programs(0)):
            add_partials(block, db_partial, db, db_parts, db_size, db_scale, 1024)


def pass_over_dy(
    dy: Tensor, b: Tensor, u: Tensor | None, db: Tensor | None, *, scaling: float, need_du: bool, tile: GradsTile
) -> tuple[Launch, Tensor | None, Sum | None]:
    """The launch, du in parts [parts, M, R_b] without the factor s, and what is left to add up for db [N, R_b].

    Args:
        dy: [M, N], any strides.
        b: B_cat [N, R_b], any floating dtype and strides.
        u: [M, R_b] with contiguous rows, and ``db`` [N, R_b], where dB is wanted; else None.
    """
    (m, n), rank = dy.shape, b.shape[1]
    grid = (triton.cdiv(m, tile.block_m), tile.parts(n), triton.cdiv(rank, tile.block_r))
    du_partial = workspace(dy, grid[1], m, rank, dtype=torch.float32) if need_du else None
    left = None
    if db is not None and grid[0] > 1:
        left = Sum(workspace(db, grid[0], n, rank, dtype=torch.float32), db, scaling)
    tma = tile.tma and fits_tma(dy)
    launch = Launch(
        "pass_over_dy",
        pass_over_dy_kernel,
        grid,
        {
            "dy": descriptor(dy, tile.block_m, tile.block_c) if tma else dy,
            "b": b if need_du else None,
            "u": u,
            "du_partial": du_partial,
            "db_partial": left.partial if left else db,
            "m": m,
            "n": n,
            "rank": rank,
            "dy_row": dy.stride(0),
            "dy_column": dy.stride(1),
            "b_row": b.stride(0),
            "b_column": b.stride(1),
            "u_row": 0 if u is None else u.stride(0),
            "chunk_blocks": tile.chunk(n) // tile.block_c,
            "db_scale": 1.0 if left else scaling,
            "BLOCK_M": tile.block_m,
            "BLOCK_C": tile.block_c,
            "BLOCK_R": tile.block_r,
            "TMA": tma,
            "STREAM_FIRST": tile.stream_first,
            "WHOLE_N": n % tile.block_c == 0,
            "PRECISION": precision(dy.dtype),
            "DTYPE": TRITON_DTYPE[dy.dtype],
        },
        tile.options(),
    )
    return launch, du_partial, left


def pass_over_x(
    x: Tensor,
    seed: Tensor | None,
    du_partial: Tensor,
    dhanded: Tensor | None,
    dh: Tensor | None,
    dresidual: Tensor | None,
    da: Tensor | None,
    bits: Tensor | None,
    *,
    shape: tuple[int, int],
    rank: int,
    hand_start: int,
    c: float,
    scaling: float,
    threshold: int,
    keep_scale: float,
    tile: GradsTile,
) -> tuple[Launch, Sum | None]:
    """The launch that fills dh [M, R_a], dresidual [M, R_b] and bits, and what is left to add up for da [R_a, K].

    Args:
        x: [M, K], any strides; read only where ``da`` is wanted, and may be empty where it is not.
        du_partial: float32 [parts, M, R_b], without the factor s.
        dhanded: gradient [M, hand] of the columns of h from ``hand_start`` on, or None.
        bits: uint8 [M, bytes] for the keep bits of x, lowest bit first, or None without dropout.
        shape: (M, K).
        rank: R_a.
    """
    m, k = shape
    parts, _, du_rank = du_partial.shape
    streams = da is not None or seed is not None
    grid = (triton.cdiv(m, tile.block_m), tile.parts(k) if streams else 1, triton.cdiv(rank, tile.block_r))
    left = None
    if da is not None and grid[0] > 1:
        left = Sum(workspace(da, grid[0], rank, k, dtype=torch.float32), da, keep_scale)
    tma = tile.tma and da is not None and fits_tma(x)
    launch = Launch(
        "pass_over_x",
        pass_over_x_kernel,
        grid,
        {
            "x": None if da is None else descriptor(x, tile.block_m, tile.block_c) if tma else x,
            "seed": seed,
            "du_partial": du_partial,
            "dhanded": dhanded,
            "dh": dh,
            "dresidual": dresidual,
            "da_partial": left.partial if left else da,
            "bits": bits,
            "m": m,
            "k": k,
            "rank": rank,
            "du_rank": du_rank,
            "du_parts": parts,
            "x_row": x.stride(0) if da is not None else 0,
            "x_column": x.stride(1) if da is not None else 0,
            "dhanded_row": 0 if dhanded is None else dhanded.stride(0),
            "dhanded_column": 0 if dhanded is None else dhanded.stride(1),
            "hand_start": hand_start,
            "hand_stop": hand_start + (0 if dhanded is None else dhanded.shape[1]),
            "factor": c,
            "scaling": scaling,
            "threshold": threshold,
            "bits_row": 0 if bits is None else bits.shape[1],
            "chunk_blocks": tile.chunk(k) // tile.block_c,
            "da_scale": 1.0 if left else keep_scale,
            "BLOCK_M": tile.block_m,
            "BLOCK_C": tile.block_c,
            "BLOCK_R": tile.block_r,
            "TMA": tma,
            "STREAM_FIRST": tile.stream_first,
            "WHOLE_K": k % tile.block_c == 0,
            "PRECISION": precision(x.dtype),
            "DTYPE": TRITON_DTYPE[x.dtype],
        },
        tile.options(),
    )
    return launch, left


def finish(da: Sum | None, db: Sum | None, *, processors: int) -> Launch:
    """The launch that adds up what the passes left, where no matmul follows that could."""
    blocks = sum(triton.cdiv(left.out.numel(), 1024) for left in (da, db) if left)
    return Launch(
        "finish",
        finish_kernel,
        (min(blocks, processors),),
        {
            "da_partial": da and da.partial,
            "da": da and da.out,
            "db_partial": db and db.partial,
            "db": db and db.out,
            "da_parts": da.partial.shape[0] if da else 0,
            "da_size": da.out.numel() if da else 0,
            "da_scale": da.scale if da else 1.0,
            "db_parts": db.partial.shape[0] if db else 0,
            "db_size": db.out.numel() if db else 0,
            "db_scale": db.scale if db else 1.0,
        },
        {"num_warps": 4},
    )

"""dA_cat = D(x)ᵀ dh and dB_cat = s dyᵀ u in one launch, from a dh that is there already.

A program holds a block of columns of x (or dy) and walks over a part of the rows, so that little is left to add up:
the other way round than ``low_rank_grads``, which reads dy once less and leaves the more to add up the higher the rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning.launch import Launch, Sum, fits_tma, precision, workspace
from ..tuning.tiles import OuterTile
from .device import descriptor, keep_bytes, load_block, outer_product, store_product, unpack_bits


@triton.jit
def reduce_rows(
    program,
    stream,
    held,
    out,
    seed,
    bits,
    m,
    columns,
    rank,
    stream_row,
    stream_column,
    threshold,
    bits_row,
    rows,
    scale,
    rank_stride,
    column_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TMA: tl.constexpr,
    WHOLE: tl.constexpr,
    STREAM_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of scale * D(stream)ᵀ held over ``rows`` rows: into ``out``, which holds one such sum for each part."""
    blocks = tl.cdiv(columns, BLOCK_C)
    start = (program % blocks) * BLOCK_C
    part = program // blocks
    column = tl.program_id(1) * BLOCK_R
    total = tl.zeros((BLOCK_C, BLOCK_R) if STREAM_FIRST else (BLOCK_R, BLOCK_C), tl.float32)
    if seed is not None:
        seed_value = tl.load(seed)
    for row in range(part * rows, min(m, (part + 1) * rows), BLOCK_M):
        block = load_block(stream, row, start, m, columns, stream_row, stream_column, BLOCK_M, BLOCK_C, TMA, WHOLE)
        if seed is not None:
            i = row + tl.arange(0, BLOCK_M)
            group = start // 8 + tl.arange(0, BLOCK_C // 8)
            keep = keep_bytes(seed_value, i, group, threshold)
            if bits is not None:
                at = bits + i[:, None].to(tl.int64) * bits_row + group[None, :]
                inside = (i < m)[:, None] & (group < bits_row)[None, :] & (tl.program_id(1) == 0)
                tl.store(at, keep.to(tl.uint8), mask=inside)
            block = tl.where(unpack_bits(keep, BLOCK_M, BLOCK_C // 8, 8), block, 0.0)
        held_block = load_block(held, row, column, m, rank, rank, 1, BLOCK_M, BLOCK_R, False, False)
        total = outer_product(block, held_block, total, STREAM_FIRST, PRECISION)
    c = start + tl.arange(0, BLOCK_C)
    j = column + tl.arange(0, BLOCK_R)
    out += part.to(tl.int64) * columns * rank
    store_product(out, total * scale, c, j, columns, rank, column_stride, rank_stride, STREAM_FIRST)


@triton.jit(do_not_specialize=["m", "rows", "da_programs"])
def outer_products_kernel(
    x,
    dh,
    da,
    seed,
    bits,
    dy,
    u,
    db,
    m,
    k,
    n,
    a_rank,
    b_rank,
    x_row,
    x_column,
    dy_row,
    dy_column,
    threshold,
    bits_row,
    rows,
    da_programs,
    da_scale,
    db_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    X_TMA: tl.constexpr,
    DY_TMA: tl.constexpr,
    WHOLE_K: tl.constexpr,
    WHOLE_N: tl.constexpr,
    STREAM_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Programs below ``da_programs``: da [parts, a_rank, k] = da_scale dhᵀ D(x) for x [m, k], dh [m, a_rank], and bits
    [m, bits_row] of the mask; the others: db [parts, n, b_rank] = db_scale dyᵀ u for dy [m, n], u [m, b_rank].
    """
    program = tl.program_id(0)
    if program < da_programs:
        if da is not None:
            reduce_rows(
                program, x, dh, da, seed, bits, m, k, a_rank, x_row, x_column, threshold, bits_row, rows, da_scale,
                k, 1, BLOCK_M, BLOCK_C, BLOCK_R, X_TMA, WHOLE_K, STREAM_FIRST, PRECISION,
            )  # fmt: skip
    else:
        if db is not None:
            reduce_rows(
                program - da_programs, dy, u, db, None, None, m, n, b_rank, dy_row, dy_column, 0, 0, rows, db_scale,
                1, b_rank, BLOCK_M, BLOCK_C, BLOCK_R, DY_TMA, WHOLE_N, STREAM_FIRST, PRECISION,
            )  # fmt: skip


def outer_products(
    x: Tensor,
    dh: Tensor,
    da: Tensor | None,
    seed: Tensor | None,
    bits: Tensor | None,
    dy: Tensor,
    u: Tensor,
    db: Tensor | None,
    *,
    threshold: int,
    keep_scale: float,
    scaling: float,
    tile: OuterTile,
) -> tuple[Launch, Sum | None, Sum | None]:
    """The launch, and what is left to add up for da [R_a, K] and db [N, R_b]; one of the two may be None.

    Args:
        x: [M, K] and ``dy`` [M, N], any strides; one whose gradient is not wanted may be empty.
        dh: [M, R_a] and ``u`` [M, R_b], contiguous.
        bits: uint8 [M, bytes] for the keep bits of x, lowest bit first, or None.
    """
    m = dh.shape[0]
    sides = []
    for stream, out, scale in ((x, da, keep_scale), (dy, db, scaling)):
        columns = 0 if out is None else stream.shape[1]
        parts = tile.parts(m)
        left = None
        if out is not None and parts > 1:
            left = Sum(workspace(out, parts, *out.shape, dtype=torch.float32), out, scale)
        tma = tile.tma and out is not None and fits_tma(stream)
        sides.append((columns, parts * triton.cdiv(columns, tile.block_c), left, tma))
    (k, da_programs, da_left, x_tma), (n, db_programs, db_left, dy_tma) = sides
    rank = max(0 if da is None else dh.shape[1], 0 if db is None else u.shape[1])
    launch = Launch(
        "outer_products",
        outer_products_kernel,
        (da_programs + db_programs, triton.cdiv(rank, tile.block_r)),
        {
            "x": None if da is None else descriptor(x, tile.block_m, tile.block_c) if x_tma else x,
            "dh": None if da is None else dh,
            "da": da_left.partial if da_left else da,
            "seed": None if da is None else seed,
            "bits": None if da is None else bits,
            "dy": None if db is None else descriptor(dy, tile.block_m, tile.block_c) if dy_tma else dy,
            "u": None if db is None else u,
            "db": db_left.partial if db_left else db,
            "m": m,
            "k": k,
            "n": n,
            "a_rank": dh.shape[1],
            "b_rank": 0 if db is None else u.shape[1],
            "x_row": 0 if da is None else x.stride(0),
            "x_column": 0 if da is None else x.stride(1),
            "dy_row": 0 if db is None else dy.stride(0),
            "dy_column": 0 if db is None else dy.stride(1),
            "threshold": threshold,
            "bits_row": 0 if bits is None else bits.shape[1],
            "rows": tile.rows(m),
            "da_programs": da_programs,
            "da_scale": 1.0 if da_left else keep_scale,
            "db_scale": 1.0 if db_left else scaling,
            "BLOCK_M": tile.block_m,
            "BLOCK_C": tile.block_c,
            "BLOCK_R": tile.block_r,
            "X_TMA": x_tma,
            "DY_TMA": dy_tma,
            "WHOLE_K": k % tile.block_c == 0,
            "WHOLE_N": n % tile.block_c == 0,
            "STREAM_FIRST": tile.stream_first,
            "PRECISION": precision(dh.dtype),
        },
        tile.options(),
    )
    return launch, da_left, db_left

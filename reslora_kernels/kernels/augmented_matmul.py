"""y = x W + bias + keep ∘ (scale t B): a matmul whose accumulator also takes a rank-r product.

Two passes: t [M, R] is given (u in the forward pass, dh in the backward pass). Its product is the first thing in the
accumulator, scaled and masked there in float32, and the main loop adds x W on top. One pass: the main loop also
accumulates x A_catᵀ, which becomes t in the epilogue; the programs of the first tile column store it.

Programs walk over tiles, so the grid may be smaller than the number of tiles. AHEAD: what an accumulator begins with is
loaded before the main loop of the tile before, so that no tile waits for memory twice. What is left to add up from
``low_rank_grads`` is done by the same launch, spread over its programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ..tuning.gpus import Gpu
from ..tuning.launch import Launch, Sum, fits_tma, precision
from ..tuning.tiles import MatmulTile
from .device import TRITON_DTYPE, add_partials, descriptor, grouped_tile, load_block, side_channel, unpack_bits

AHEAD_RANK = 16  # more of the next tile than that would spill beside a tile's accumulators


@triton.jit
def low_rank_product(
    t_block,
    b,
    start,
    column,
    n,
    rank,
    b_rank,
    b_column,
    acc,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + t_block [BLOCK_M, BLOCK_R] · b[start : start + BLOCK_R, column : column + BLOCK_N]."""
    b_block = load_block(b, start, column, rank, n, b_rank, b_column, BLOCK_R, BLOCK_N, False, False)
    return tl.dot(t_block, b_block.to(t_block.dtype), acc, input_precision=PRECISION)


@triton.jit
def first_ranks(
    t,
    b,
    tile,
    m,
    n,
    rank,
    t_row,
    b_rank,
    b_column,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The first BLOCK_R ranks of t [BLOCK_M, BLOCK_R] and b [BLOCK_R, BLOCK_N] of a tile; of the last one behind it."""
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    tile_m, tile_n = grouped_tile(min(tile, tiles_m * tiles_n - 1), tiles_m, tiles_n, GROUP_M)
    t_block = load_block(t, tile_m * BLOCK_M, 0, m, rank, t_row, 1, BLOCK_M, BLOCK_R, False, False)
    b_block = load_block(b, 0, tile_n * BLOCK_N, rank, n, b_rank, b_column, BLOCK_R, BLOCK_N, False, False)
    return t_block, b_block.to(DTYPE)


@triton.jit(do_not_specialize=["m", "da_parts", "db_parts"])
def augmented_matmul_kernel(
    x,
    w,
    bias,
    t,
    a,
    b,
    bits,
    y,
    extra,
    inner,
    raw,
    da_partial,
    da,
    db_partial,
    db,
    m,
    n,
    k,
    t_rank,
    a_rank,
    scale,
    x_row,
    x_column,
    w_k,
    w_n,
    t_row,
    a_row,
    a_column,
    b_row,
    b_column,
    words,
    factor,
    extra_row,
    extra_column,
    inner_stop,
    raw_start,
    raw_stop,
    da_parts,
    da_size,
    da_scale,
    db_parts,
    db_size,
    db_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    ONE_PASS: tl.constexpr,
    AHEAD: tl.constexpr,
    X_TMA: tl.constexpr,
    W_TMA: tl.constexpr,
    Y_TMA: tl.constexpr,
    K_MAJOR: tl.constexpr,
    WHOLE_K: tl.constexpr,
    HALVES: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """y [m, n] = x [m, k] w [k, n] + bias [n] + keep ∘ (scale t [m, rank] b [rank, n]), BLOCK_M x BLOCK_N at a time.

    ONE_PASS: t is x aᵀ, a [rank, k]; inner [m, inner_stop] gets factor t + extra, raw its columns to hand on. bits:
    keep as packed bits [m, words], int32. da_partial [da_parts, da_size] is added up to da, scaled, and so is db's.
    """
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    if AHEAD:
        t_first, b_first = first_ranks(
            t, b, tl.program_id(0), m, n, t_rank, t_row, b_row, b_column, BLOCK_M, BLOCK_N, BLOCK_R, GROUP_M, DTYPE
        )
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = grouped_tile(tile, tiles_m, tiles_n, GROUP_M)
        row = tile_m * BLOCK_M
        column = tile_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if ONE_PASS:
            product = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        else:
            if AHEAD:
                acc = tl.dot(t_first, b_first, acc, input_precision=PRECISION)
            for start in tl.range(BLOCK_R if AHEAD else 0, t_rank, BLOCK_R, num_stages=1):
                t_block = load_block(t, row, start, m, t_rank, t_row, 1, BLOCK_M, BLOCK_R, False, False)
                acc = low_rank_product(
                    t_block, b, start, column, n, t_rank, b_row, b_column, acc, BLOCK_N, BLOCK_R, PRECISION
                )
            acc *= scale
            if bits is not None:
                packed = load_block(bits, row, column // 32, m, words, words, 1, BLOCK_M, BLOCK_N // 32, False, False)
                acc = tl.where(unpack_bits(packed, BLOCK_M, BLOCK_N // 32, 32), acc, 0.0)
            if AHEAD:  # under way while the main loop runs
                following = tile + tl.num_programs(0)
                t_first, b_first = first_ranks(
                    t, b, following, m, n, t_rank, t_row, b_row, b_column, BLOCK_M, BLOCK_N, BLOCK_R, GROUP_M, DTYPE
                )
        for start in range(0, k, BLOCK_K):
            x_block = load_block(x, row, start, m, k, x_row, x_column, BLOCK_M, BLOCK_K, X_TMA, WHOLE_K)
            if K_MAJOR:
                w_block = tl.trans(load_block(w, column, start, n, k, w_n, w_k, BLOCK_N, BLOCK_K, W_TMA, WHOLE_K))
            else:
                w_block = load_block(w, start, column, k, n, w_k, w_n, BLOCK_K, BLOCK_N, W_TMA, False)
            acc = tl.dot(x_block, w_block, acc, input_precision=PRECISION)
            if ONE_PASS:
                a_block = load_block(a, 0, start, a_rank, k, a_row, a_column, BLOCK_R, BLOCK_K, False, WHOLE_K)
                product = tl.dot(x_block, tl.trans(a_block.to(x_block.dtype)), product, input_precision=PRECISION)
        if ONE_PASS:
            value = side_channel(
                product, row, 0, m, factor, extra, extra_row, extra_column, 0, inner_stop,
                inner, inner_stop, raw, 1.0, raw_start, raw_stop, tile_n == 0, BLOCK_M, BLOCK_R,
            )  # fmt: skip
            t_block = (value * scale).to(DTYPE)
            acc = low_rank_product(
                t_block, b, 0, column, n, inner_stop, b_row, b_column, acc, BLOCK_N, BLOCK_R, PRECISION
            )
        j = column + tl.arange(0, BLOCK_N)
        if bias is not None:
            acc += tl.load(bias + j, mask=j < n, other=0.0).to(tl.float32)[None, :]
        if Y_TMA:
            if HALVES == 2:
                halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
                left, right = tl.split(halves)
                y.store([row, column], left.to(DTYPE))
                y.store([row, column + BLOCK_N // 2], right.to(DTYPE))
            else:
                y.store([row, column], acc.to(DTYPE))
        else:
            i = row + tl.arange(0, BLOCK_M)
            at = y + i[:, None].to(tl.int64) * n + j[None, :]
            tl.store(at, acc.to(DTYPE), mask=(i < m)[:, None] & (j < n)[None, :])
    if da_partial is not None:
        for block in range(tl.program_id(0), tl.cdiv(da_size, 1024), tl.num_programs(0)):
            add_partials(block, da_partial, da, da_parts, da_size, da_scale, 1024)
    if db_partial is not None:
        for block in range(tl.program_id(0), tl.cdiv(db_size, 1024), tl.num_programs(0)):
            add_partials(block, db_partial, db, db_parts, db_size, db_scale, 1024)


@dataclass(frozen=True)
class OnePass:
    """What the one-pass form computes beside y: u = c x A_catᵀ + residual, and the columns of x A_catᵀ to hand on."""

    a: Tensor  # A_cat [R_a, K], any floating dtype
    c: float
    residual: Tensor | None  # [M, R_b]
    u: Tensor  # [M, R_b]
    handed: Tensor | None
    hand_start: int


def augmented_matmul(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    t: Tensor | OnePass,
    b: Tensor,
    y: Tensor,
    *,
    scale: float,
    gpu: Gpu,
    tile: MatmulTile,
    bits: Tensor | None = None,
    sums: Sequence[Sum | None] = (None, None),
) -> Launch:
    """The launch that fills y [M, N] = x w + bias + keep ∘ (scale t b).

    Args:
        x: [M, K], any strides.
        w: [K, N], any strides; its descriptor needs one of them to be 1.
        bias: [N] or None.
        t: [M, R] with contiguous rows, or what to compute it from in the same pass.
        b: [R, N], any floating dtype and strides.
        y: [M, N], contiguous.
        bits: int32 [M, words], bit j % 32 of word j // 32 says whether column j of the low-rank product is kept.
        sums: two sums that the programs finish after their tiles.
    """
    (m, k), n = x.shape, w.shape[1]
    one_pass, given = (t, None) if isinstance(t, OnePass) else (None, t)
    k_major = w.stride(0) == 1
    stored = w.T if k_major else w  # the way the rows are contiguous
    w_block = (tile.block_n, tile.block_k) if k_major else (tile.block_k, tile.block_n)
    x_tma, w_tma, y_tma = (tile.tma and fits_tma(matrix) for matrix in (x, stored, y))
    tiles = triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n)
    residual = one_pass.residual if one_pass else None
    handed = one_pass.handed if one_pass else None
    hand_start = one_pass.hand_start if one_pass else 0
    da, db = sums
    return Launch(
        "augmented_matmul",
        augmented_matmul_kernel,
        (min(tiles, gpu.processors) if tile.persistent else tiles,),
        {
            "x": descriptor(x, tile.block_m, tile.block_k) if x_tma else x,
            "w": descriptor(stored, *w_block) if w_tma else w,
            "bias": bias,
            "t": given,
            "a": one_pass.a if one_pass else None,
            "b": b,
            "bits": bits,
            "y": descriptor(y, tile.block_m, tile.block_n // tile.halves) if y_tma else y,
            "extra": residual,
            "inner": one_pass.u if one_pass else None,
            "raw": handed,
            "da_partial": da and da.partial,
            "da": da and da.out,
            "db_partial": db and db.partial,
            "db": db and db.out,
            "m": m,
            "n": n,
            "k": k,
            "t_rank": b.shape[0],
            "a_rank": one_pass.a.shape[0] if one_pass else 0,
            "scale": scale,
            "x_row": x.stride(0),
            "x_column": x.stride(1),
            "w_k": w.stride(0),
            "w_n": w.stride(1),
            "t_row": 0 if given is None else given.stride(0),
            "a_row": one_pass.a.stride(0) if one_pass else 0,
            "a_column": one_pass.a.stride(1) if one_pass else 0,
            "b_row": b.stride(0),
            "b_column": b.stride(1),
            "words": 0 if bits is None else bits.shape[1],
            "factor": one_pass.c if one_pass else 1.0,
            "extra_row": 0 if residual is None else residual.stride(0),
            "extra_column": 0 if residual is None else residual.stride(1),
            "inner_stop": one_pass.u.shape[1] if one_pass else 0,
            "raw_start": hand_start,
            "raw_stop": hand_start + (0 if handed is None else handed.shape[1]),
            "da_parts": da.partial.shape[0] if da else 0,
            "da_size": da.out.numel() if da else 0,
            "da_scale": da.scale if da else 1.0,
            "db_parts": db.partial.shape[0] if db else 0,
            "db_size": db.out.numel() if db else 0,
            "db_scale": db.scale if db else 1.0,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "BLOCK_R": tile.block_r,
            "GROUP_M": tile.group_m,
            "ONE_PASS": one_pass is not None,
            "AHEAD": tile.persistent and one_pass is None and tile.block_r <= AHEAD_RANK,
            "X_TMA": x_tma,
            "W_TMA": w_tma,
            "Y_TMA": y_tma,
            "K_MAJOR": k_major,
            "WHOLE_K": k % tile.block_k == 0,
            "HALVES": tile.halves,
            "PRECISION": precision(x.dtype),
            "DTYPE": TRITON_DTYPE[x.dtype],
        },
        tile.options(),
    )

"""Products of rows with the matrix of the expert that each was sent to, the low-rank product in the same accumulator.

Rows come sorted by expert, as positions: a program gathers its tokens as it loads them, and stores its sums where they
belong, so that no sorted copy of the tokens is made. What a program works on is looked up in a table that is made on
the device from the router's offsets: the host never waits to learn how many tokens an expert got.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning.launch import Launch, on_matrix_unit, precision

BLOCK_M, BLOCK_N, BLOCK_K = 64, 64, 32  # of no GPU in particular: these kernels have not been measured on one


@triton.jit
def _gathered(source, at, inside, column, columns, row_stride, column_stride, COLUMNS: tl.constexpr):
    """source[at, column : column + COLUMNS], zeros where not ``inside`` and past the last column."""
    j = column + tl.arange(0, COLUMNS)
    where = source + at[:, None].to(tl.int64) * row_stride + j[None, :].to(tl.int64) * column_stride
    return tl.load(where, mask=inside[:, None] & (j < columns)[None, :], other=0.0)


@triton.jit
def grouped_matmul_kernel(
    x, rows, weight, u, b, y, table,
    k, n, rank,
    x_row, x_column, weight_expert, weight_row, weight_column, b_expert, b_row, b_column, y_row, scale,
    SORTED_X: tl.constexpr, SORTED_Y: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A block [BLOCK_M, BLOCK_N] of y = scale x W_eᵀ + u B_eᵀ: ``table`` [3, tiles] has its expert (-1: none), rows.

    x [., k] and y [., n] are read and written at ``rows``, or in order where SORTED; u [., rank] is in order.
    """
    tile, column = tl.program_id(0), tl.program_id(1) * BLOCK_N
    tiles = tl.num_programs(0)
    e = tl.load(table + tile).to(tl.int64)
    first, stop = tl.load(table + tiles + tile), tl.load(table + 2 * tiles + tile)
    if e >= 0:
        i = first + tl.arange(0, BLOCK_M)
        inside = i < stop
        at = i if rows is None else tl.load(rows + i, mask=inside, other=0)
        j = column + tl.arange(0, BLOCK_N)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, k, BLOCK_K):
            x_block = _gathered(x, i if SORTED_X else at, inside, start, k, x_row, x_column, BLOCK_K)
            w_block = _gathered(
                weight + e * weight_expert, j, j < n, start, k, weight_row, weight_column, BLOCK_K
            )  # fmt: skip
            total = tl.dot(x_block, tl.trans(w_block.to(x_block.dtype)), total, input_precision=PRECISION)
        total *= scale
        if u is not None:
            for start in range(0, rank, BLOCK_R):
                u_block = _gathered(u, i, inside, start, rank, rank, 1, BLOCK_R)
                b_block = _gathered(b + e * b_expert, j, j < n, start, rank, b_row, b_column, BLOCK_R)
                total = tl.dot(u_block, tl.trans(b_block.to(u_block.dtype)), total, input_precision=PRECISION)
        to = y + (i if SORTED_Y else at)[:, None].to(tl.int64) * y_row + j[None, :]
        tl.store(to, total.to(y.dtype.element_ty), mask=inside[:, None] & (j < n)[None, :])


@triton.jit
def grouped_outer_products_kernel(
    left, right, rows, out, offsets,
    p, q,
    left_row, left_column, right_row, right_column,
    SORTED_LEFT: tl.constexpr, SORTED_RIGHT: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of out_e = Σ leftᵀ right [p, q] over the rows of expert e: one program adds them all up, in order."""
    e = tl.program_id(0)
    p_start, q_start = tl.program_id(1) * BLOCK_P, tl.program_id(2) * BLOCK_Q
    first = tl.load(offsets + e - 1, mask=e > 0, other=0)
    stop = tl.load(offsets + e)
    total = tl.zeros((BLOCK_P, BLOCK_Q), tl.float32)
    for start in range(first, stop, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        inside = i < stop
        at = i if rows is None else tl.load(rows + i, mask=inside, other=0)
        l_block = _gathered(left, i if SORTED_LEFT else at, inside, p_start, p, left_row, left_column, BLOCK_P)
        r_block = _gathered(right, i if SORTED_RIGHT else at, inside, q_start, q, right_row, right_column, BLOCK_Q)
        total = tl.dot(tl.trans(l_block), r_block.to(l_block.dtype), total, input_precision=PRECISION)
    i, j = p_start + tl.arange(0, BLOCK_P), q_start + tl.arange(0, BLOCK_Q)
    to = out + (e.to(tl.int64) * p + i[:, None]) * q + j[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=(i < p)[:, None] & (j < q)[None, :])


def tile_table(offsets: Tensor, rows: int) -> Tensor:
    """int32 [3, tiles]: the expert, first row and end of rows of every tile; experts are -1 where a tile is not needed.

    There are as many tiles as any split of ``rows`` rows over the experts needs at most.
    """
    count = offsets.shape[0]
    starts = torch.cat([offsets.new_zeros(1), offsets[:-1]])
    ends = ((offsets - starts + BLOCK_M - 1) // BLOCK_M).cumsum(0)
    tiles = torch.arange(triton.cdiv(rows, BLOCK_M) + count, device=offsets.device)
    e = torch.searchsorted(ends, tiles, right=True).clamp(max=count - 1)
    first = starts[e] + (tiles - (ends[e] - (offsets[e] - starts[e] + BLOCK_M - 1) // BLOCK_M)) * BLOCK_M
    return torch.stack([torch.where(tiles < ends[-1], e, -1), first, offsets[e]]).to(torch.int32)


def grouped_matmul(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    table: Tensor,
    rows: Tensor | None,
    u: Tensor | None = None,
    b: Tensor | None = None,
    *,
    scale: float = 1.0,
    sorted_x: bool = False,
    sorted_y: bool = False,
) -> Launch:
    """y = scale x W_eᵀ + u B_eᵀ for the rows of every expert e.

    Args:
        x: [., K], any strides.
        weight: [E, N, K], any strides, any floating dtype: it is taken in x's.
        y: [., N], contiguous.
        table: from ``tile_table``.
        rows: [S], where sorted rows are in x and y, None where they are in order; ``sorted_x`` and ``sorted_y``: that
            one is in order in any case.
        u: [S, R], contiguous, in order, and ``b`` [E, N, R]; both None: no low-rank product.
    """
    n, k = weight.shape[1:]
    rank, products = 0 if u is None else u.shape[1], precision(x.dtype)
    block_n = BLOCK_N if on_matrix_unit(x.dtype, products) else BLOCK_N // 2
    return Launch(
        "grouped_matmul",
        grouped_matmul_kernel,
        (table.shape[1], triton.cdiv(n, block_n)),
        {
            "x": x, "rows": rows, "weight": weight, "u": u, "b": b, "y": y, "table": table,
            "k": k, "n": n, "rank": rank,
            "x_row": x.stride(0), "x_column": x.stride(1),
            "weight_expert": weight.stride(0), "weight_row": weight.stride(1), "weight_column": weight.stride(2),
            "b_expert": 0 if b is None else b.stride(0), "b_row": 0 if b is None else b.stride(1),
            "b_column": 0 if b is None else b.stride(2), "y_row": y.stride(0), "scale": scale,
            "SORTED_X": sorted_x or rows is None, "SORTED_Y": sorted_y or rows is None,
            "BLOCK_M": BLOCK_M, "BLOCK_N": block_n, "BLOCK_K": BLOCK_K,
            "BLOCK_R": max(16, min(64, triton.next_power_of_2(rank))), "PRECISION": products,
        },
        {"num_warps": 4, "num_stages": 3},
    )  # fmt: skip


def grouped_outer_products(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    offsets: Tensor,
    rows: Tensor | None,
    *,
    sorted_left: bool = False,
    sorted_right: bool = False,
) -> Launch:
    """out [E, P, Q], contiguous: Σ leftᵀ right over the rows of every expert, zero for one without rows.

    Args:
        left: [., P] and ``right`` [., Q], any strides, at ``rows`` or in order as for ``grouped_matmul``.
        offsets: int32 [E], where the experts' rows end.
    """
    count, p, q = out.shape
    block_p, block_q = (max(16, min(64, triton.next_power_of_2(size))) for size in (p, q))
    block_m = 64 if block_p * block_q <= 1024 else 32  # with 32 rows ptxas spills for one more block of few sums
    return Launch(
        "grouped_outer_products",
        grouped_outer_products_kernel,
        (count, triton.cdiv(p, block_p), triton.cdiv(q, block_q)),
        {
            "left": left, "right": right, "rows": rows, "out": out, "offsets": offsets, "p": p, "q": q,
            "left_row": left.stride(0), "left_column": left.stride(1),
            "right_row": right.stride(0), "right_column": right.stride(1),
            "SORTED_LEFT": sorted_left or rows is None, "SORTED_RIGHT": sorted_right or rows is None,
            "BLOCK_P": block_p, "BLOCK_Q": block_q, "BLOCK_M": block_m, "PRECISION": precision(left.dtype),
        },
        {"num_warps": 4, "num_stages": 3},
    )  # fmt: skip

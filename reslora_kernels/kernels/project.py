"""h = D(x) A_catᵀ, u = c h[:, :R_b] + residual: one pass over x, bound by bandwidth.

Few rows leave most of the GPU idle, so then the reduction over K is split; the parts are added in a fixed order by
``finish_projection``. No atomics.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning.launch import Launch, fits_tma, precision, workspace
from ..tuning.tiles import ProjectTile
from .device import descriptor, keep_bytes, load_block, side_channel, sum_products, unpack_bits


@triton.jit(do_not_specialize=["m", "split_blocks"])
def project_kernel(
    x,
    a,
    seed,
    residual,
    u,
    handed,
    partial,
    m,
    k,
    rank,
    x_row,
    x_column,
    a_row,
    a_column,
    residual_row,
    residual_column,
    residual_start,
    residual_stop,
    u_rank,
    hand_start,
    hand_stop,
    threshold,
    factor,
    keep_scale,
    split_blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    X_TMA: tl.constexpr,
    WHOLE_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A block [BLOCK_M, BLOCK_R] of h = D(x) aᵀ, x [m, k], a [rank, k], over ``split_blocks`` blocks of columns of x.

    The whole sum goes to u [m, u_rank] (float32 factor, residual [m, .] added) and handed [m, hand_stop - hand_start];
    a part of it to partial [parts, m, rank], float32.
    """
    row = tl.program_id(0) * BLOCK_M
    column = tl.program_id(1) * BLOCK_R
    part = tl.program_id(2)
    split_k = split_blocks * BLOCK_K
    if seed is not None:
        seed_value = tl.load(seed)
    h = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(part * split_k, min(k, (part + 1) * split_k), BLOCK_K):
        x_block = load_block(x, row, start, m, k, x_row, x_column, BLOCK_M, BLOCK_K, X_TMA, WHOLE_K)
        if seed is not None:
            group = start // 8 + tl.arange(0, BLOCK_K // 8)
            keep = keep_bytes(seed_value, row + tl.arange(0, BLOCK_M), group, threshold)
            x_block = tl.where(unpack_bits(keep, BLOCK_M, BLOCK_K // 8, 8), x_block, 0.0)
        a_block = load_block(a, column, start, rank, k, a_row, a_column, BLOCK_R, BLOCK_K, False, WHOLE_K)
        h = tl.dot(x_block, tl.trans(a_block.to(x_block.dtype)), h, input_precision=PRECISION)
    if partial is not None:
        i = row + tl.arange(0, BLOCK_M)
        j = column + tl.arange(0, BLOCK_R)
        at = partial + (part.to(tl.int64) * m + i[:, None]) * rank + j[None, :]
        tl.store(at, h, mask=(i < m)[:, None] & (j < rank)[None, :])
    else:
        side_channel(
            h, row, column, m, factor * keep_scale, residual, residual_row, residual_column, residual_start,
            residual_stop, u, u_rank, handed, keep_scale, hand_start, hand_stop, True, BLOCK_M, BLOCK_R,
        )  # fmt: skip


@triton.jit(do_not_specialize=["m", "parts"])
def finish_projection_kernel(
    partial,
    residual,
    u,
    handed,
    m,
    rank,
    parts,
    residual_row,
    residual_column,
    residual_start,
    residual_stop,
    u_rank,
    hand_start,
    hand_stop,
    factor,
    keep_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Adds partial [parts, m, rank] up and does what ``project_kernel`` does with a whole h [m, rank]."""
    row = tl.program_id(0) * BLOCK_M
    column = tl.program_id(1) * BLOCK_R
    h = sum_products(partial, row, column, m, rank, parts, BLOCK_M, BLOCK_R)
    side_channel(
        h, row, column, m, factor * keep_scale, residual, residual_row, residual_column, residual_start,
        residual_stop, u, u_rank, handed, keep_scale, hand_start, hand_stop, True, BLOCK_M, BLOCK_R,
    )  # fmt: skip


def project(
    x: Tensor,
    a: Tensor,
    residual: Tensor | None,
    seed: Tensor | None,
    u: Tensor,
    handed: Tensor | None,
    hand_start: int,
    *,
    threshold: int,
    keep_scale: float,
    c: float,
    tile: ProjectTile,
    residual_start: int = 0,
) -> Iterator[Launch]:
    """The launches that fill u [M, R_b] and handed [M, hand_stop - hand_start].

    The backward pass projects too: dh = c s dy B_cat + dh_out. There ``x`` is dy, ``a`` is B_catᵀ, ``u`` is dh, maybe
    wider than B_cat, and ``handed`` is the gradient of the residual, s dy B_cat.

    Args:
        x: [M, K], any strides.
        a: A_cat [R_a, K], any floating dtype and strides.
        residual: added to the columns of u from ``residual_start`` on, [M, R_b], or None.
        seed: int64, one element, or None for no dropout. An element is kept iff its 16 bits are at least
            ``threshold``, and counts ``keep_scale`` times.
        tile: blocks, and into how many parts K is split.
    """
    (m, k), rank = x.shape, a.shape[0]
    x_tma = tile.tma and fits_tma(x)
    parts = tile.parts(k)
    partial = workspace(x, parts, m, rank, dtype=torch.float32) if parts > 1 else None
    epilogue = {
        "residual": residual,
        "u": u,
        "handed": handed,
        "m": m,
        "rank": rank,
        "residual_row": 0 if residual is None else residual.stride(0),
        "residual_column": 0 if residual is None else residual.stride(1),
        "residual_start": residual_start,
        "residual_stop": residual_start + (0 if residual is None else residual.shape[1]),
        "u_rank": u.shape[1],
        "hand_start": hand_start,
        "hand_stop": hand_start + (0 if handed is None else handed.shape[1]),
        "factor": c,
        "keep_scale": keep_scale,
    }
    grid = (triton.cdiv(m, tile.block_m), triton.cdiv(max(rank, u.shape[1]), tile.block_r))
    yield Launch(
        "project",
        project_kernel,
        (*grid, parts),
        epilogue
        | {
            "x": descriptor(x, tile.block_m, tile.block_k) if x_tma else x,
            "a": a,
            "seed": seed,
            "partial": partial,
            "k": k,
            "x_row": x.stride(0),
            "x_column": x.stride(1),
            "a_row": a.stride(0),
            "a_column": a.stride(1),
            "threshold": threshold,
            "split_blocks": tile.split_k(k) // tile.block_k,
            "BLOCK_M": tile.block_m,
            "BLOCK_K": tile.block_k,
            "BLOCK_R": tile.block_r,
            "X_TMA": x_tma,
            "WHOLE_K": k % tile.block_k == 0,
            "PRECISION": precision(x.dtype),
        },
        tile.options(),
    )
    if partial is not None:
        blocks = {"partial": partial, "parts": parts, "BLOCK_M": tile.block_m, "BLOCK_R": tile.block_r}
        yield Launch("finish_projection", finish_projection_kernel, grid, epilogue | blocks, {"num_warps": 4})

"""What the Triton kernels share: descriptors, block loads, the dropout mask, the side channel's epilogue.

The mask is there as a tensor, too, made by one kernel: for library calls, which cannot draw it where they need it. In
PyTorch's own operations it takes some ninety kernels over the whole of x, see ``dropout.keep_mask``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import dropout as masks
from ..tuning.launch import Launch

MASK_ROWS, MASK_GROUPS = 4, 128  # of a program that draws a mask; a group has eight columns
TRITON_DTYPE = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def descriptor(matrix: Tensor, rows: int, columns: int) -> Any:
    """A TMA descriptor for blocks [rows, columns] of a contiguous-row matrix, made on the host."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


@triton.jit
def load_block(
    source,
    row,
    column,
    rows,
    columns,
    row_stride,
    column_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TMA: tl.constexpr,
    WHOLE_COLUMNS: tl.constexpr,
):
    """source[row : row + ROWS, column : column + COLUMNS] of a [rows, columns] matrix, zeros outside it.

    ``source`` is a tensor descriptor (TMA) or a pointer. WHOLE_COLUMNS: no block reaches past the last column.
    """
    if TMA:
        block = source.load([row, column])
    else:
        i = row + tl.arange(0, ROWS)
        j = column + tl.arange(0, COLUMNS)
        at = source + i[:, None].to(tl.int64) * row_stride + j[None, :].to(tl.int64) * column_stride
        inside = (i < rows)[:, None]
        if not WHOLE_COLUMNS:
            inside = inside & (j < columns)[None, :]
        block = tl.load(at, mask=inside, other=0.0)
    return block


@triton.jit
def grouped_tile(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row, column) of a tile, in an order that walks GROUP_M tile rows at a time, so that both operands stay in L2."""
    per_group = GROUP_M * tiles_n
    first = (tile // per_group) * GROUP_M
    height = min(tiles_m - first, GROUP_M)
    return first + (tile % per_group) % height, (tile % per_group) // height


@triton.jit
def keep_bytes(seed, row, group, threshold):
    """int32 [len(row), len(group)]: bit i of an entry says whether column 8 * group + i of that row is kept.

    Philox 4x32-7 with counter (group, row, 0, 0) and the seed as key, 16 bits an element: see ``dropout``.
    """
    c0 = (group[None, :] + tl.zeros_like(row)[:, None]).to(tl.uint32)
    c1 = (row[:, None] + tl.zeros_like(group)[None, :]).to(tl.uint32)
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(7):
        high0 = tl.umulhi(c0, 0xD2511F53)
        high2 = tl.umulhi(c2, 0xCD9E8D57)
        low0 = c0 * 0xD2511F53
        low2 = c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    keep = _two_bits(c0, threshold)
    keep |= _two_bits(c1, threshold) << 2
    keep |= _two_bits(c2, threshold) << 4
    keep |= _two_bits(c3, threshold) << 6
    return keep


@triton.jit
def _two_bits(word, threshold):
    """int32, as word: bit 0 says whether its low half is at least ``threshold``, bit 1 whether its high half is."""
    low = ((word & 0xFFFF).to(tl.int32) >= threshold).to(tl.int32)
    return low | (((word >> 16).to(tl.int32) >= threshold).to(tl.int32) << 1)


@triton.jit
def unpack_bits(words, ROWS: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr):
    """bool [ROWS, WORDS * BITS] from int32 [ROWS, WORDS], lowest bit first."""
    bits = (words[:, :, None] >> tl.arange(0, BITS)[None, None, :]) & 1
    return tl.reshape(bits, (ROWS, WORDS * BITS)) != 0


@triton.jit
def side_channel(
    product,
    row,
    column,
    m,
    factor,
    extra,
    extra_row,
    extra_column,
    extra_start,
    extra_stop,
    inner,
    inner_stop,
    raw,
    raw_factor,
    raw_start,
    raw_stop,
    store,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Returns factor * product + extra of a rank-r product, in float32; stores it, and raw_factor * product.

    Forward: product is x A_catᵀ, the result u, extra the residual, raw what is handed on. Backward: product is
    dy B_cat, the result dh, extra the gradient of what was handed on, raw the gradient of the residual.
    ``product`` covers columns column.. of the rank; each of extra, inner and raw covers its own [start, stop) of it and
    may be None. ``inner`` and ``raw`` are contiguous. The result is zero from ``inner_stop`` on.
    """
    i = row + tl.arange(0, ROWS)
    j = column + tl.arange(0, COLUMNS)
    rows = i.to(tl.int64)[:, None]
    value = product * factor
    if extra is not None:
        inside = (i < m)[:, None] & ((j >= extra_start) & (j < extra_stop))[None, :]
        at = extra + rows * extra_row + (j - extra_start)[None, :].to(tl.int64) * extra_column
        value += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    value = tl.where((j < inner_stop)[None, :], value, 0.0)
    if inner is not None:
        inside = (i < m)[:, None] & (j < inner_stop)[None, :] & store
        tl.store(inner + rows * inner_stop + j[None, :], value.to(inner.dtype.element_ty), mask=inside)
    if raw is not None:
        inside = (i < m)[:, None] & ((j >= raw_start) & (j < raw_stop))[None, :] & store
        at = raw + rows * (raw_stop - raw_start) + (j - raw_start)[None, :]
        tl.store(at, (product * raw_factor).to(raw.dtype.element_ty), mask=inside)
    return value


@triton.jit
def add_partials(block, partial, out, parts, size, scale, BLOCK: tl.constexpr):
    """out[e] = scale * (partial[0, e] + partial[1, e] + ...) for the BLOCK elements e of ``block``, in that order."""
    e = (block + tl.zeros((), tl.int64)) * BLOCK + tl.arange(0, BLOCK)
    inside = e < size
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(parts):
        total += tl.load(partial + e, mask=inside, other=0.0)
        partial += size
    tl.store(out + e, (total * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit
def sum_products(partial, row, column, m, rank, parts, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows row.. and columns column.. of partial[0] + partial[1] + ..., each float32 [m, rank], in that order."""
    i = row + tl.arange(0, ROWS)
    j = column + tl.arange(0, COLUMNS)
    inside = (i < m)[:, None] & (j < rank)[None, :]
    at = partial + i[:, None].to(tl.int64) * rank + j[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for _ in range(parts):
        total += tl.load(at, mask=inside, other=0.0)
        at += (rank + tl.zeros((), tl.int64)) * m
    return total


@triton.jit
def outer_product(stream, held, acc, STREAM_FIRST: tl.constexpr, PRECISION: tl.constexpr):
    """acc + streamᵀ held [columns of stream, columns of held], or the transpose of that; acc may be None.

    Hopper and Blackwell multiply straight from shared memory, 64 rows at least: the stream comes first. Others load the
    second operand more cheaply, and 16 rows are enough.
    """
    if STREAM_FIRST:
        product = tl.dot(tl.trans(stream), held, acc, input_precision=PRECISION)
    else:
        product = tl.dot(tl.trans(held), stream, acc, input_precision=PRECISION)
    return product


@triton.jit
def store_product(out, product, c, j, columns, rank, column_stride, rank_stride, STREAM_FIRST: tl.constexpr):
    """Put the product of columns c and ranks j where they belong."""
    value = product.to(out.dtype.element_ty)
    if STREAM_FIRST:
        at = out + c[:, None].to(tl.int64) * column_stride + j[None, :].to(tl.int64) * rank_stride
        tl.store(at, value, mask=(c < columns)[:, None] & (j < rank)[None, :])
    else:
        at = out + c[None, :].to(tl.int64) * column_stride + j[:, None].to(tl.int64) * rank_stride
        tl.store(at, value, mask=(c < columns)[None, :] & (j < rank)[:, None])


@triton.jit(do_not_specialize=["rows"])
def keep_mask_kernel(mask, seed, rows, columns, threshold, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """mask [rows, columns], uint8: 1 where the element is kept."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = tl.program_id(1) * GROUPS * 8 + tl.arange(0, GROUPS * 8)
    keep = unpack_bits(keep_bytes(tl.load(seed), row, group, threshold), ROWS, GROUPS, 8)
    at = mask + row[:, None].to(tl.int64) * columns + column[None, :]
    tl.store(at, keep.to(tl.uint8), mask=(row < rows)[:, None] & (column < columns)[None, :])


def keep_mask_launch(mask: Tensor, seed: Tensor, p: float) -> Launch:
    """Fills mask, bool [M, K], as ``dropout.keep_mask`` does."""
    rows, columns = mask.shape
    return Launch(
        "keep_mask",
        keep_mask_kernel,
        (triton.cdiv(rows, MASK_ROWS), triton.cdiv(columns, 8 * MASK_GROUPS)),
        {
            "mask": mask.view(torch.uint8),
            "seed": seed,
            "rows": rows,
            "columns": columns,
            "threshold": masks.threshold(p),
            "ROWS": MASK_ROWS,
            "GROUPS": MASK_GROUPS,
        },
        {"num_warps": 4},
    )


def keep_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """``dropout.keep_mask`` by one launch; ``seed`` is on the GPU that draws."""
    mask = seed.new_empty(rows, columns, dtype=torch.bool)
    if mask.numel():
        keep_mask_launch(mask, seed, p).run()
    return mask

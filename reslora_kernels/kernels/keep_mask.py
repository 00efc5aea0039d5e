"""The dropout mask as a tensor, in one kernel: for library calls, which cannot draw it where they need it.

In PyTorch's own operations it takes some ninety kernels over the whole of x, see ``dropout.keep_mask``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import dropout as masks
from ..tuning.launch import Launch
from .device import keep_bytes, unpack_bits

ROWS, GROUPS = 4, 128  # of a program; a group has eight columns


@triton.jit(do_not_specialize=["rows"])
def keep_mask_kernel(mask, seed, rows, columns, threshold, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """mask [rows, columns], uint8: 1 where the element is kept."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = tl.program_id(1) * GROUPS * 8 + tl.arange(0, GROUPS * 8)
    keep = unpack_bits(keep_bytes(tl.load(seed), row, group, threshold), ROWS, GROUPS, 8)
    at = mask + row[:, None].to(tl.int64) * columns + column[None, :]
    tl.store(at, keep.to(tl.uint8), mask=(row < rows)[:, None] & (column < columns)[None, :])


def launch(mask: Tensor, seed: Tensor, p: float) -> Launch:
    """Fills mask, bool [M, K], as ``dropout.keep_mask`` does."""
    rows, columns = mask.shape
    return Launch(
        "keep_mask",
        keep_mask_kernel,
        (triton.cdiv(rows, ROWS), triton.cdiv(columns, 8 * GROUPS)),
        {
            "mask": mask.view(torch.uint8),
            "seed": seed,
            "rows": rows,
            "columns": columns,
            "threshold": masks.threshold(p),
            "ROWS": ROWS,
            "GROUPS": GROUPS,
        },
        {"num_warps": 4},
    )


def keep_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """``dropout.keep_mask`` by one launch; ``seed`` is on the GPU that draws."""
    mask = seed.new_empty(rows, columns, dtype=torch.bool)
    if mask.numel():
        launch(mask, seed, p).run()
    return mask

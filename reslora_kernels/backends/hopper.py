"""When csrc/augmented_matmul_sm90.cu and csrc/project_sm90.cu work for the cuda backend: where asked for and able.

They have not been measured, so nobody gets them unasked: ``RESLORA_CUDA_HOPPER`` names a variant of the former, and
with any of them come the latter and, for one pass, csrc/augmented_matmul_one_pass_sm90.cu.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

OPT_IN = "RESLORA_CUDA_HOPPER"
VARIANTS = {"cooperative": 1, "cooperative-pair": 2, "ping-pong": 3, "ping-pong-pair": 4}  # as in csrc/params.h
LEAST_ROWS = 64  # below, most of a tile of 128 rows would be of no use
PROJECTED = 128  # columns of x aᵀ that a block has in registers
ALIGNMENT = 16  # bytes: of a base and of a stride, for the copy engine


def asked_for() -> str | None:
    """The variant that the environment names, if any.

    Raises:
        ValueError: there is none of that name.
    """
    name = os.environ.get(OPT_IN) or "off"
    if name != "off" and name not in VARIANTS:
        raise ValueError(f"{OPT_IN} must be 'off' or one of {', '.join(map(repr, VARIANTS))}, got {name!r}")
    return None if name == "off" else name


def variant_of(extension: Any, x: Tensor, *others: Tensor, columns: int) -> int:
    """The variant's number in the extension that multiplies x [M, K] and ``others`` to [M, columns]; 0 for none."""
    name = asked_for()
    return 0 if name is None or unsupported_reason(extension, x, *others, columns=columns) else VARIANTS[name]


def unsupported_reason(extension: Any, x: Tensor, *others: Tensor, columns: int) -> str | None:
    """Why it cannot: the portable kernel serves such a call instead."""
    if not getattr(extension, "HAS_SM90", False):
        return "this build has no code for sm_90a"
    if x.is_cuda and _capability(x.device.index) != (9, 0):
        return "the GPU is not of compute capability 9.0"
    if x.dtype not in (torch.float16, torch.bfloat16) or any(other.dtype != x.dtype for other in others):
        return "it multiplies float16 or bfloat16"
    if x.shape[0] < LEAST_ROWS:
        return f"x has fewer than {LEAST_ROWS} rows"
    if columns % (ALIGNMENT // x.element_size()):
        return f"the rows of the result are not a multiple of {ALIGNMENT} bytes"
    if x.stride(1) != 1 or not all(map(_can_be_copied, (x, *others))):
        return f"a matrix is not aligned to {ALIGNMENT} bytes"
    return None


def in_order(w: Tensor, b: Tensor, t: Tensor | None, a: Tensor | None) -> bool:
    """Whether w [K, N] and b [R, N] lie as a kernel takes them: in one pass, with ``a`` for t, column by column."""
    first, second = w.stride(0), b.stride(0)
    by_columns, by_rows = first == second == 1, 1 not in (first, second)
    if a is not None:
        return by_columns and a.stride(1) == 1 and b.shape[0] <= a.shape[0]
    return (by_columns or by_rows) and t is not None and t.stride(1) == 1


def projects(extension: Any, x: Tensor, a: Tensor, *, columns: int, dropout: bool) -> bool:
    """Whether csrc/project_sm90.cu makes x aᵀ, of which ``columns`` are filled, from x [M, K] and a [R, K]."""
    return asked_for() is not None and unprojected_reason(extension, x, a, columns=columns, dropout=dropout) is None


def unprojected_reason(extension: Any, x: Tensor, a: Tensor, *, columns: int, dropout: bool) -> str | None:
    """Why it does not: the portable kernel serves such a call instead."""
    if dropout:
        return "it draws no mask"
    if columns > PROJECTED:
        return f"the result has more than {PROJECTED} columns"
    return unsupported_reason(extension, x, a, columns=0)


def _can_be_copied(matrix: Tensor) -> bool:
    rows, columns = matrix.stride()
    step = rows if columns == 1 else columns
    one = min(rows, columns) == 1 and step > 0
    return one and step * matrix.element_size() % ALIGNMENT == 0 and matrix.data_ptr() % ALIGNMENT == 0


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)

"""Which calls of the cuda backend the Hopper kernels, csrc/*_sm90.cu, serve: those that they were measured fastest for.

``RESLORA_CUDA_HOPPER`` is "auto" where it is not set: the table of ``tuning.gpus`` names the fastest kernel near
the call's shape, and where it knows none the portable kernel serves. "off" is the portable kernel for all. A variant
of csrc/augmented_matmul_sm90.cu is asked for by name, for two passes, with one pass where y is narrow; a variant of
csrc/augmented_matmul_one_pass_sm90.cu for one pass wherever it is able. Both bring csrc/project_sm90.cu along.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..tuning import gpus
from . import kinds

VARIABLE = "RESLORA_CUDA_HOPPER"
AUTO, OFF = "auto", "off"
# As in csrc/params.h: in two passes, those first that are expected to be fastest, and in one.
VARIANTS = {"cooperative-pair": 2, "cooperative": 1, "ping-pong": 3}
ONE_PASS_VARIANTS = {"one-pass": 4}
NUMBERS = VARIANTS | ONE_PASS_VARIANTS
# What else the table compares: the kernels for all GPUs, two launches instead of one pass, project_sm90.cu.
PORTABLE, TWO_PASSES, STREAMING = "portable", "two passes", "streaming"
FORWARD, DX, DX_MASKED = "forward", "dx", "dx with dropout"  # forms of the matmul in the table
ONE_PASS, DX_AND_DH = "one pass", "dx and dh"  # and those that make t, too: forward, and backward without dropout
H, DH = "h", "dh"  # and of the projection: a row by row, or column by column
GENERATION = "sm_90"
LEAST_ROWS = 64  # below, most of a tile of 128 rows would be of no use
PROJECTED = 128  # columns of x aᵀ that a block has in registers
ONE_PASS_WIDTHS = (16, 32, 64)  # the same, beside those of y
ONE_PASS_RANK = ONE_PASS_WIDTHS[-1]
NARROW = 512  # columns of y up to which one pass is better than two, whatever the kernel
TILE_ROWS, TILE_COLUMNS = 128, 256  # of y that a block makes at a time, in one pass
STRIP_TERMS = 12000  # a block reads a column while another multiplies so many terms for each; as measured
ALIGNMENT = 16  # bytes: of a base and of a stride, for the copy engine


class KernelChoice(NamedTuple):
    """The Hopper kernel that serves a kind of call, None for the portable one, and why."""

    kernel: str | None
    reason: str


def setting() -> str:
    """What the environment says: "auto", "off" or a variant.

    Raises:
        ValueError: none of these.
    """
    name = os.environ.get(VARIABLE) or AUTO
    if name not in (AUTO, OFF) and name not in NUMBERS:
        raise ValueError(f"{VARIABLE} must be 'auto', 'off' or one of {', '.join(map(repr, NUMBERS))}, got {name!r}")
    return name


@contextmanager
def requested(name: str) -> Iterator[None]:
    """The setting inside; for measuring one kernel against another."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def form_of(w: Tensor, a: Tensor | None, masked: bool) -> str:
    """What the table calls the matmul with w [K, N] and, in one pass, ``a``: by the layout of w, whichever the pass."""
    if a is not None:
        return ONE_PASS if w.stride(0) == 1 else DX_AND_DH
    if w.stride(0) == 1:
        return FORWARD
    return DX_MASKED if masked else DX


def kernels_of(form: str) -> tuple[str, ...]:
    """The Hopper kernels for a form, by their names in the table."""
    if form in (H, DH):
        return (STREAMING,)
    return tuple(ONE_PASS_VARIANTS if form in (ONE_PASS, DX_AND_DH) else VARIANTS)


def matmul(extension: Any, x: Tensor, form: str, n: int, rank: int) -> KernelChoice:
    """For x [M, K], ``n`` columns of y and ``rank`` rows of a or b; found once for each kind of call.

    The kernel of a form in one pass is TWO_PASSES where that is to be taken instead.
    """
    if form in (ONE_PASS, DX_AND_DH) and rank > ONE_PASS_RANK:
        return KernelChoice(TWO_PASSES, f"one pass takes at most {ONE_PASS_RANK} ranks, these are {rank}")
    return _choice(setting(), extension, x.device, x.dtype, "cuda_matmuls", form, x.shape[0], n, x.shape[1], rank)


def projection(extension: Any, x: Tensor, form: str, n: int) -> KernelChoice:
    """For x [M, K] and ``n`` columns of x aᵀ, no dropout; found once for each kind of call."""
    if n > PROJECTED:
        return KernelChoice(None, f"the result has more than {PROJECTED} columns")
    return _choice(setting(), extension, x.device, x.dtype, "cuda_projections", form, x.shape[0], n, x.shape[1], None)


@lru_cache(maxsize=4096)
def _choice(
    asked: str,
    extension: Any,
    device: torch.device,
    dtype: torch.dtype,
    kind: str,
    form: str,
    m: int,
    n: int,
    k: int,
    rank: int | None,
) -> KernelChoice:
    if asked == OFF:
        return KernelChoice(None, f"{VARIABLE}={OFF}")
    if reason := _unable_reason(extension, device, dtype, m):
        return KernelChoice(None, reason)
    kernels = kernels_of(form)
    if asked != AUTO:
        wide = form == DX_AND_DH or (form == ONE_PASS and n > NARROW)
        instead = TWO_PASSES if wide else "one-pass" if form == ONE_PASS else kernels[0]
        return KernelChoice(asked if asked in kernels else instead, f"{VARIABLE}={asked}")
    sizes = {"m": m, "n": n, "k": k} | ({} if rank is None else {"rank": rank})
    exact: dict[str, str | bool] = {"form": form, "dtype": str(dtype)}
    row = gpus.nearest(GENERATION, kind, sizes, exact) if all(sizes.values()) else None
    found = row["microseconds"] if row else {}
    times = {name: found[name] for name in (PORTABLE, TWO_PASSES, *kernels) if name in found}
    if not times:
        return KernelChoice(None, "none was measured near this shape")
    fastest = min(times, key=times.__getitem__)
    if fastest == PORTABLE:
        return KernelChoice(None, f"the portable one was measured fastest near this shape ({times[fastest]:.0f} us)")
    said = "two passes were measured" if fastest == TWO_PASSES else "measured"
    return KernelChoice(fastest, f"{said} fastest near this shape ({times[fastest]:.0f} us)")


@lru_cache(maxsize=4096)
def copies(
    asked: str, extension: Any, device: torch.device, dtype: torch.dtype, shape: torch.Size, n: int, rank: int,
    forms: tuple[str, ...], projected: str,
) -> tuple[bool, bool]:  # fmt: skip
    """Whether a Hopper kernel may serve x of this form: then it copies a and b as they are, which must have x's dtype.

    And whether, in the backward pass, it has B read with dy, so that it must lie by the terms of that product.

    Args:
        forms: what the matmul to ``n`` columns may be, and ``projected`` what the projection to ``rank`` columns is.
    """
    m, k = shape
    possible = [form for form in forms if rank <= ONE_PASS_RANK or form not in (ONE_PASS, DX_AND_DH)]
    chosen = [_choice(asked, extension, device, dtype, "cuda_matmuls", form, m, n, k, rank) for form in possible]
    if rank <= PROJECTED:
        chosen.append(_choice(asked, extension, device, dtype, "cuda_projections", projected, m, rank, k, None))
    together = DX_AND_DH in possible and chosen[possible.index(DX_AND_DH)].kernel in NUMBERS
    return any(kernel not in (None, TWO_PASSES) for kernel, _ in chosen), together


def admit(rows: dict[str, list[dict[str, Any]]]) -> None:
    """In this process, put rows of "cuda_matmuls" and "cuda_projections" in the place of those in use."""
    gpus.table().setdefault(GENERATION, {}).update(rows)
    _choice.cache_clear()
    copies.cache_clear()
    kinds.forget()


def unavailable_reason(extension: Any, device: torch.device) -> str | None:
    """Why no Hopper kernel can run on the device at all; None when they can."""
    if not getattr(extension, "HAS_SM90", False):
        return "this build has no code for sm_90a"
    if device.type == "cuda" and _capability(device.index) != (9, 0):
        return "the GPU is not of compute capability 9.0"
    return None


def _unable_reason(extension: Any, device: torch.device, dtype: torch.dtype, m: int) -> str | None:
    """Why none can serve calls of a kind, wherever their operands lie."""
    if reason := unavailable_reason(extension, device):
        return reason
    if dtype not in (torch.float16, torch.bfloat16):
        return "it multiplies float16 or bfloat16"
    if m < LEAST_ROWS:
        return f"x has fewer than {LEAST_ROWS} rows"
    return None


def unsupported_reason(extension: Any, x: Tensor, *others: Tensor, columns: int) -> str | None:
    """Why none can multiply x [M, K] and ``others`` to [M, columns]: the portable kernel serves such a call instead."""
    if reason := _unable_reason(extension, x.device, x.dtype, x.shape[0]):
        return reason
    if any(other.dtype != x.dtype for other in others):
        return "it multiplies float16 or bfloat16"
    if columns % (ALIGNMENT // x.element_size()):
        return f"the rows of the result are not a multiple of {ALIGNMENT} bytes"
    if x.stride(1) != 1 or not all(map(_can_be_copied, (x, *others))):
        return f"a matrix is not aligned to {ALIGNMENT} bytes"
    return None


def strips(processors: int, m: int, n: int, k: int, widths: dict[str, int]) -> tuple[int, list[str]]:
    """How many blocks the tiles of dx [m, k], ``n`` terms each, leave free, and what these can make meanwhile.

    Every block has as many tiles as most others or one less; some may as well have none.

    Args:
        widths: of what there is to be made, the columns of which a block must read all rows.
    """
    tiles = -(-m // TILE_ROWS) * -(-k // TILE_COLUMNS)
    rounds = -(-tiles // processors)
    free, made = processors - -(-tiles // rounds), list[str]()
    for name in sorted(widths, key=widths.__getitem__, reverse=True):
        if free and free * n * k >= STRIP_TERMS * (sum(widths[other] for other in made) + widths[name]):
            made.append(name)
    return free, made


def in_order(w: Tensor, b: Tensor, t: Tensor | None, a: Tensor | None) -> bool:
    """Whether w [K, N] and b [R, N] lie as a kernel takes them, both by columns or both by rows; ``a`` by rows."""
    first, second = w.stride(0), b.stride(0)
    by_columns, by_rows = first == second == 1, 1 not in (first, second)
    if a is not None:
        return (by_columns or by_rows) and a.stride(1) == 1
    return (by_columns or by_rows) and t is not None and t.stride(1) == 1


def _can_be_copied(matrix: Tensor) -> bool:
    rows, columns = matrix.stride()
    step = rows if columns == 1 else columns
    one = min(rows, columns) == 1 and step > 0
    return one and step * matrix.element_size() % ALIGNMENT == 0 and matrix.data_ptr() % ALIGNMENT == 0


@cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)

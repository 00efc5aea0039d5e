"""Triton kernels: one or two launches for the forward pass, three for the backward pass.

Importing this module does not import Triton; the kernels are loaded by the first call that they serve.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .. import dropout as masks
from ..dropout import Dropout
from ..side_channel import Gradients, Needs, Outputs, SideChannel, Stack, columns, rows
from ..tuning.forms import FormChoice, choose, reads_dy_once
from ..tuning.gpus import Gpu, gpu_of
from ..tuning.launch import Sum, collected, fits_tma, on_matrix_unit, precision, workspace
from ..tuning.tiles import grads_tile, outer_tile, project_tile
from . import kinds
from . import torch as library

MIN_TRITON = (3, 4)
MIN_CAPABILITY = (8, 0)
ONE_PASS_RANK = 64
_kinds = kinds.Kinds()


def describe() -> str:
    reason = _direct().unknown_reason()
    how = "launched directly once a kind of call is known" if reason is None else f"launched by JITFunction: {reason}"
    return f"Triton {version('triton')} kernels, {how}"


@cache
def unavailable_reason() -> str | None:
    try:
        installed = version("triton")
    except PackageNotFoundError:
        return "Triton is not installed (pip install triton, on Linux; CUDA builds of torch bring it along)"
    if tuple(int(part) for part in installed.split(".")[:2]) < MIN_TRITON:
        return f"Triton {installed} is too old, {'.'.join(map(str, MIN_TRITON))} is needed (torch 2.8 brings it along)"
    if _interpreted():
        return "TRITON_INTERPRET is set, and Triton's CPU interpreter is for tests of the kernels only"
    if not torch.cuda.is_available():
        return "no GPU that torch can use"
    capability = torch.cuda.get_device_capability()
    if torch.version.cuda and capability < MIN_CAPABILITY:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0 (Ampere)"
    return _compile_failure()


def _interpreted() -> bool:
    """Whether Triton runs its kernels in its CPU interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def _compile_failure() -> str | None:
    """Why a small kernel cannot be compiled and run, None when it can. The message is Triton's own."""
    from ..kernels import low_rank_grads

    ones = torch.ones(1, 16, device="cuda")
    try:
        low_rank_grads.finish(Sum(ones, torch.empty_like(ones[0]), 1.0), None, processors=1).run()
    except Exception as error:  # whatever the compiler or the driver raises, the torch backend serves instead
        return f"Triton cannot compile kernels on this machine: {str(error).strip().splitlines()[-1]}"
    return None


def unsupported_reason(x: Tensor, weight: Tensor, rank: int) -> str | None:
    return kinds.unsupported_reason(x, rank, "cpu" if _interpreted() else "cuda")


def explain(x: Tensor, weight: Tensor, rank: int) -> str:
    """How a forward pass without dropout would be computed, and why."""
    return _forward_choice(x, weight, rank, False, False, 1.0).reason


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a_stack: Stack,
    b_stack: Stack,
    residual: Tensor | None,
    side: SideChannel,
    dropout: Dropout | None,
) -> Outputs:
    """See ``backends.torch.forward``; products are accumulated in float32 and rounded once, at the store."""
    a, b = rows(a_stack) if a_stack else None, columns(b_stack)
    bias = bias if bias is None or bias.is_contiguous() else bias.contiguous()
    if a is None and residual is not None:
        residual = residual.to(x.dtype).contiguous()
    draw = _Draw.of(dropout)
    operands = (x, weight, bias, a, b, residual, draw.seed)
    kind, addresses = kinds.kind_of(operands, "forward", side, draw[1:], precision(x.dtype))
    with kinds.on_device(x):
        prepared = _kinds.find(kind)
        y, handed, u = (
            _run_first(kind, operands, lambda: _forward(x, weight, bias, a, b, residual, side, draw))
            if prepared is None or _direct().hooked()
            else prepared.run(x, addresses)
        )
        if y is None:
            t = u if residual is None or u is not None else residual
            assert t is not None
            y = library.product_then_matmul(t, b.T.to(x.dtype), side.scaling, bias, x, weight.T)
        return Outputs(y, handed, u)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor,
    residual: Tensor | None,
    side: SideChannel,
    draw: _Draw,
) -> list[Tensor | None]:
    """y, what is handed on, and u; no y where the library's matmul is to follow."""
    from ..kernels.augmented_matmul import OnePass, augmented_matmul
    from ..kernels.project import project

    gpu, (m, k), n = gpu_of(x.device), x.shape, weight.shape[0]
    rank = b.shape[1] if a is None else a.shape[0]
    choice = _forward_choice(x, weight, rank, a is None, draw.seed is not None, side.scaling)
    u = None if a is None else x.new_empty(m, b.shape[1])
    handed = x.new_empty(m, side.hand_stop - side.hand_start) if side.hands_on else None
    t: Tensor | OnePass | None = residual
    if a is not None and u is not None:
        if choice.form == "one_pass":
            t = OnePass(a, side.c, residual, u, handed, side.hand_start)
        else:
            t = u
            for launch in project(
                x, a, residual, draw.seed, u, handed, side.hand_start, c=side.c, threshold=draw.threshold,
                keep_scale=draw.scale, tile=project_tile(gpu, m, k, rank, x.dtype),
            ):  # fmt: skip
                launch.run()
    if choice.tile is None:
        return [None, handed, u]
    assert t is not None
    y = x.new_empty(m, n)
    augmented_matmul(x, weight.T, bias, t, b.T, y, scale=side.scaling, gpu=gpu, tile=choice.tile).run()
    return [y, handed, u]


def backward(
    dy: Tensor,
    dhanded: Tensor | None,
    x: Tensor | None,
    weight: Tensor,
    a_stack: Stack,
    b_stack: Stack,
    u: Tensor | None,
    side: SideChannel,
    dropout: Dropout | None,
    needs: Needs,
    onto: Tensor | None = None,
) -> Gradients:
    """See ``backends.torch.backward``. The kernels add to nothing: with ``onto`` the library makes dx."""
    if not a_stack:  # nothing to fuse with the frozen matmul
        return library.backward(dy, dhanded, x, weight, a_stack, b_stack, u, side, dropout, needs, onto)
    a, b = rows(a_stack), columns(b_stack)
    draw = _Draw.of(dropout if needs.dx or needs.da else None)
    x, u = x if needs.da else None, u if needs.db else None
    operands = (dy, dhanded, x, weight, a, b, u, draw.seed)
    kind, addresses = kinds.kind_of(operands, "backward", side, draw[1:], needs, onto is None, precision(dy.dtype))
    with kinds.on_device(dy):
        prepared = _kinds.find(kind)
        dx, da, db, dresidual, dh = (
            _run_first(
                kind, operands, lambda: _backward(dy, dhanded, x, weight, a, b, u, side, draw, needs, onto is None)
            )
            if prepared is None or _direct().hooked()
            else prepared.run(dy, addresses)
        )
        if needs.dx and dx is None:
            assert dh is not None
            dx = library.product_then_matmul(dh, a.to(dy.dtype), 1.0, None, dy, weight, onto)
    return Gradients(dx, da, db, dresidual)


def _backward(
    dy: Tensor,
    dhanded: Tensor | None,
    x: Tensor | None,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    u: Tensor | None,
    side: SideChannel,
    draw: _Draw,
    needs: Needs,
    alone: bool,
) -> list[Tensor | None]:
    """dx, da, db, dresidual, and dh where the library's matmul is to follow and make dx of it.

    ``alone``: dx is added to nothing.
    """
    from ..kernels.augmented_matmul import augmented_matmul
    from ..kernels.low_rank_grads import finish

    (m, n), k, (rank, rank_b) = dy.shape, weight.shape[1], (a.shape[0], b.shape[1])
    gpu, masked = gpu_of(dy.device), needs.dx and draw.seed is not None
    forms = ("two_pass",) if masked else ("two_pass", "library")
    choice = choose(gpu, m, k, n, rank, dy.dtype, precision(dy.dtype), forms, _aligned(dy, weight))
    tile = choice.tile if alone else None
    by_library = needs.dx and tile is None
    dh = dy.new_empty(m, rank) if by_library else workspace(dy, m, rank) if needs.dx or needs.da else None
    wanted = _Wanted(
        da=torch.empty_like(a, memory_format=torch.contiguous_format) if needs.da else None,
        db=torch.empty_like(b, memory_format=torch.contiguous_format) if needs.db else None,
        dh=dh,
        dresidual=dy.new_empty(m, rank_b) if needs.dresidual else None,
        bits=workspace(dy, m, -(-k // 32), dtype=torch.int32) if masked else None,
    )
    x = dy.new_empty(0, k) if x is None else x
    u = dy.new_empty(0) if u is None else u
    once = not wanted.can_split() or reads_dy_once(gpu, m, n, k, rank, rank_b, dy.dtype)
    gradients = _one_read if once else _two_reads
    left = gradients(gpu, wanted, dy, dhanded, x, b, u, draw, side)
    dx = None
    if needs.dx and tile is not None:
        assert dh is not None
        dx = dy.new_empty(m, k)
        augmented_matmul(
            dy, weight, None, dh, a, dx, scale=draw.scale, gpu=gpu, tile=tile, bits=wanted.bits, sums=left
        ).run()
    elif any(left):
        finish(*left, processors=gpu.processors).run()
    return [dx, wanted.da, wanted.db, wanted.dresidual, dh if by_library else None]


def _run_first(
    kind: tuple[object, ...], operands: kinds.Operands, run: Callable[[], list[Tensor | None]]
) -> list[Tensor | None]:
    """What ``run`` returns; of a new kind, its launches are kept, where a launcher is known for them."""
    if not _kinds.is_new(kind):
        return run()
    with collected() as ran:
        results = run()
    first = operands[0]
    assert first is not None
    count, device = len(operands) + len(results) + len(ran.workspaces), first.device.index or 0
    prepared = kinds.prepare(
        operands, tuple(results), ran.workspaces, lambda place: _direct().launches(ran.launches, place, count, device)
    )
    _kinds.keep(kind, prepared)
    return results


@cache
def _direct() -> ModuleType:
    from ..kernels import direct

    return direct


class _Wanted(NamedTuple):
    """What the passes over dy and x fill; None what is not needed."""

    da: Tensor | None
    db: Tensor | None
    dh: Tensor | None
    dresidual: Tensor | None
    bits: Tensor | None

    def can_split(self) -> bool:
        """Whether dh can be had before the outer products: they leave the keep bits only where they read x."""
        return self.dh is not None and not (self.da is None and (self.db is None or self.bits is not None))

    def mask_bytes(self) -> Tensor | None:
        return None if self.bits is None else self.bits.view(torch.uint8)


class _Draw(NamedTuple):
    """Dropout as the kernels take it."""

    seed: Tensor | None
    threshold: int
    scale: float

    @classmethod
    def of(cls, dropout: Dropout | None) -> _Draw:
        if dropout is None:
            return cls(None, 0, 1.0)
        return cls(dropout.seed, masks.threshold(dropout.p), dropout.keep_scale)


def _one_read(
    gpu: Gpu, wanted: _Wanted, dy: Tensor, dhanded: Tensor | None, x: Tensor, b: Tensor, u: Tensor, draw: _Draw,
    side: SideChannel,
) -> tuple[Sum | None, Sum | None]:  # fmt: skip
    """du and dB from one pass over dy, dh and dA from one over x; returns what is left to add up for dA and dB."""
    from ..kernels.low_rank_grads import pass_over_dy, pass_over_x

    da_left = db_left = du = None
    (m, n), k = dy.shape, x.shape[1]
    need_du = wanted.dh is not None or wanted.dresidual is not None
    if need_du or wanted.db is not None:
        launch, du, db_left = pass_over_dy(
            dy, b, None if wanted.db is None else u, wanted.db, scaling=side.scaling, need_du=need_du,
            tile=grads_tile(gpu, m, n, b.shape[1], dy.dtype, _aligned(dy)),
        )  # fmt: skip
        launch.run()
    if du is not None:
        rank = b.shape[1] if wanted.dh is None else wanted.dh.shape[1]
        launch, da_left = pass_over_x(
            x, draw.seed, du, dhanded, wanted.dh, wanted.dresidual, wanted.da, wanted.mask_bytes(),
            shape=(m, k), rank=rank, hand_start=side.hand_start, c=side.c, scaling=side.scaling,
            threshold=draw.threshold, keep_scale=draw.scale,
            tile=grads_tile(gpu, m, k, rank, dy.dtype, wanted.da is None or _aligned(x)),
        )  # fmt: skip
        launch.run()
    return da_left, db_left


def _two_reads(
    gpu: Gpu, wanted: _Wanted, dy: Tensor, dhanded: Tensor | None, x: Tensor, b: Tensor, u: Tensor, draw: _Draw,
    side: SideChannel,
) -> tuple[Sum | None, Sum | None]:  # fmt: skip
    """dh from one pass over dy, then dA and dB from one over x and another over dy; returns as ``_one_read``."""
    from ..kernels.outer_products import outer_products
    from ..kernels.project import project

    assert wanted.dh is not None
    (m, n), k = dy.shape, x.shape[1]
    rank = wanted.dh.shape[1]
    for launch in project(
        dy, b.T, dhanded, None, wanted.dh, wanted.dresidual, 0, threshold=0, keep_scale=side.scaling,
        c=side.c, residual_start=side.hand_start, tile=project_tile(gpu, m, n, rank, dy.dtype),
    ):  # fmt: skip
        launch.run()
    streams = [stream for stream, out in ((x, wanted.da), (dy, wanted.db)) if out is not None]
    launch, da_left, db_left = outer_products(
        x, wanted.dh, wanted.da, draw.seed, wanted.mask_bytes(), dy, u, wanted.db, threshold=draw.threshold,
        keep_scale=draw.scale, scaling=side.scaling, tile=outer_tile(gpu, m, n + k, rank, dy.dtype, _aligned(*streams)),
    )  # fmt: skip
    launch.run()
    return da_left, db_left


def _forward_choice(x: Tensor, weight: Tensor, rank: int, given: bool, masked: bool, scaling: float) -> FormChoice:
    """``given``: u is known. ``masked``: there is dropout."""
    (m, k), n, products = x.shape, weight.shape[0], precision(x.dtype)
    one_pass = not given and not masked and rank <= ONE_PASS_RANK
    if x.dtype == torch.float16 and abs(scaling) > 1:
        one_pass = False  # it rounds s u to x's dtype before its product, which float16 may not hold
    if not on_matrix_unit(x.dtype, products):
        one_pass = False  # it would do two products at once
    forms = ("one_pass", "two_pass", "library") if one_pass else ("two_pass", "library")
    return choose(gpu_of(x.device), m, n, k, rank, x.dtype, products, forms, _aligned(x, weight))


def _aligned(*operands: Tensor) -> bool:
    """Whether 16 bytes at a time can be loaded from every operand, along its rows or its columns."""
    return all(fits_tma(operand) or fits_tma(operand.T) for operand in operands)


def grouped_forward(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, offsets: Tensor, rows: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """y = x W_eᵀ + s (x A_eᵀ) B_eᵀ for rows grouped by expert, and u = s x A_eᵀ [S, R] in the experts' order.

    Args:
        x: [S, K]; ``weight`` [E, N, K], a [E, R, K], b [E, N, R], any strides.
        offsets, rows: as in ``ops.grouped.Groups``.
    """
    from ..kernels.grouped_matmul import grouped_matmul, tile_table

    table = tile_table(offsets, x.shape[0])
    u, y = x.new_empty(x.shape[0], a.shape[1]), x.new_zeros(x.shape[0], weight.shape[1])
    with kinds.on_device(x):
        grouped_matmul(x, a, u, table, rows, scale=scaling, sorted_y=True).run()
        grouped_matmul(x, weight, y, table, rows, u, b).run()
    return y, u


def grouped_backward(
    dy: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, u: Tensor, offsets: Tensor, rows: Tensor | None,
    scaling: float, needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dx [S, K], dA [E, R, K] and dB [E, N, R] of ``grouped_forward``; None for one that ``needs`` leaves out."""
    from ..kernels.grouped_matmul import grouped_matmul, grouped_outer_products, tile_table

    table = tile_table(offsets, x.shape[0])
    need_x, need_a, need_b = needs
    du = torch.empty_like(u)
    dx = torch.zeros_like(x) if need_x else None
    da = torch.empty(a.shape, dtype=a.dtype, device=a.device) if need_a else None
    db = torch.empty(b.shape, dtype=b.dtype, device=b.device) if need_b else None
    with kinds.on_device(x):
        if need_x or need_a:
            grouped_matmul(dy, b.mT, du, table, rows, scale=scaling, sorted_y=True).run()
        if dx is not None:
            grouped_matmul(dy, weight.mT, dx, table, rows, du, a.mT).run()
        if da is not None:
            grouped_outer_products(du, x, da, offsets, rows, sorted_left=True).run()
        if db is not None:
            grouped_outer_products(dy, u, db, offsets, rows, sorted_right=True).run()
    return dx, da, db

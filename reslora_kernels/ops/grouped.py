"""The low-rank products of experts: every token's row meets A and B of the expert that it was sent to.

    u = x A_eᵀ        y += s u B_eᵀ        du = s dy B_e        dx = du A_e        dA_e = duᵀ x        dB_e = s dyᵀ u

with e the expert of a row. W_e + s B_e A_e is never made: what is read and written beside x and y is R values a row.
Sums over the rows of an expert run in the order of the rows. ``add_low_rank`` is the form of PyTorch's own operations,
on top of what the frozen weights gave: ``torch._grouped_mm``, for which the number of experts costs no operator and
nothing is read back from the device, where the module runs that itself; else one product after the other.
``fused_experts`` has both products in one accumulator.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import select
from ..backends import triton as kernels
from ..backends.torch import scaled_product


class Groups(NamedTuple):
    """Which rows are whose: those of expert e end at ``offsets[e]``, int32 [E], and start where e - 1's end.

    ``rows`` [S] says where the i-th row in that order is in x and y; None where they are in that order themselves.
    ``at_once``: whether ``torch._grouped_mm`` is to multiply rows in that order.
    """

    offsets: Tensor
    rows: Tensor | None = None
    at_once: bool = False

    @classmethod
    def of(cls, experts: Tensor, count: int) -> Groups:
        """The groups of rows whose experts are ``experts`` [S], in any order."""
        experts = experts.reshape(-1)
        rows = torch.argsort(experts, stable=True)
        return cls(torch.bincount(experts, minlength=count).cumsum(0).to(torch.int32), rows)

    @classmethod
    def equal(cls, count: int, length: int, device: torch.device) -> Groups:
        """``count`` experts with ``length`` rows each."""
        return cls(torch.arange(1, count + 1, dtype=torch.int32, device=device) * length)


def add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, groups: Groups, scaling: float) -> Tensor:
    """y + s (x A_eᵀ) B_eᵀ, written over y; differentiable once.

    Args:
        y: [..., N], contiguous, S rows: what the frozen weights give for x.
        x: [..., K], S rows.
        a: [E, R, K]; b: [E, N, R], of any floating dtype; the products are in y's.
        groups: the rows of each expert. Rows that are no expert's stay as they are.
    """
    with torch.autocast(y.device.type, enabled=False):
        x = x.to(y.dtype)
        if groups.at_once and groups.rows is None and _multiplies_at_once(y, a):
            at_once: Tensor = _AddAtOnce.apply(y, x, a, b, groups.offsets, scaling)  # type: ignore[no-untyped-call]
            return at_once
        sums: Tensor = _AddLowRank.apply(y, x, a, b, groups.offsets, groups.rows, scaling)  # type: ignore[no-untyped-call]
        return sums


def _multiplies_at_once(y: Tensor, a: Tensor) -> bool:
    """Whether ``torch._grouped_mm`` takes products with A and B: their rows must be of whole 16 bytes."""
    if not hasattr(torch, "_grouped_mm") or y.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return all(size * y.dtype.itemsize % 16 == 0 for size in (*a.shape[1:], y.shape[-1]))


class _AddAtOnce(torch.autograd.Function):
    """The same for rows in the order of their experts: two operations forward and four backward, whatever E is."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, offsets: Tensor, scaling: float) -> Tensor:
        u = torch._grouped_mm(_flat(x), a.to(x.dtype).mT, offs=offsets)
        y.view(-1, y.shape[-1]).add_(torch._grouped_mm(u, b.to(x.dtype).mT, offs=offsets), alpha=scaling)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, a, b, u, offsets)
        ctx.scaling = scaling
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, a, b, u, offsets = ctx.saved_tensors
        _, need_x, need_a, need_b, *_ = ctx.needs_input_grad
        tokens, grads = _flat(x), _flat(dy).contiguous()
        dx = da = db = None
        with torch.autocast(dy.device.type, enabled=False):
            du = torch._grouped_mm(grads, b.to(x.dtype), offs=offsets).mul_(ctx.scaling)
            if need_x:
                dx = torch._grouped_mm(du, a.to(x.dtype), offs=offsets).view(x.shape)
            if need_a or need_b:
                ends = torch.cat([offsets.new_zeros(1), offsets])
                empty = (ends.diff() == 0)[:, None, None]  # of which a kernel may leave the sum as it found it
            if need_a:
                da = torch._grouped_mm(du.t(), tokens, offs=offsets).masked_fill_(empty, 0).to(a.dtype)
            if need_b:
                db = torch._grouped_mm(grads.t(), u, offs=offsets).masked_fill_(empty, 0).mul_(ctx.scaling).to(b.dtype)
        return dy, dx, da, db, None, None


class _AddLowRank(torch.autograd.Function):
    """Saves x and u [S, R]; A and B as the tensors they are. The gradient of y goes through as it comes."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, offsets: Tensor, rows: Tensor | None, scaling: float
    ) -> Tensor:
        tokens, sums = _flat(x), y.view(-1, y.shape[-1])
        low_a, low_b = a.to(x.dtype), b.to(x.dtype)
        u = x.new_empty(tokens.shape[0], a.shape[1])
        for e, start, stop in _parts(offsets):
            own = u[start:stop]
            torch.mm(_taken(tokens, rows, start, stop), low_a[e].t(), out=own)
            if rows is None:
                sums[start:stop].addmm_(own, low_b[e].t(), alpha=scaling)
            else:
                sums.index_add_(0, rows[start:stop], own @ low_b[e].t(), alpha=scaling)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, a, b, u, offsets, rows)
        ctx.scaling = scaling
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, a, b, u, offsets, rows = ctx.saved_tensors
        _, need_x, need_a, need_b, *_ = ctx.needs_input_grad
        tokens, grads = _flat(x), _flat(dy)
        low_a, low_b = a.to(x.dtype), b.to(x.dtype)
        dx = torch.zeros_like(tokens) if need_x else None
        da = a.new_zeros(a.shape) if need_a else None
        db = b.new_zeros(b.shape) if need_b else None
        with torch.autocast(dy.device.type, enabled=False):
            for e, start, stop in _parts(offsets):
                own_dy = _taken(grads, rows, start, stop)
                du = scaled_product(own_dy, low_b[e], ctx.scaling)
                if da is not None:
                    da[e] = du.t() @ _taken(tokens, rows, start, stop)
                if db is not None:
                    db[e] = scaled_product(u[start:stop].t(), own_dy, ctx.scaling).t()
                if dx is not None and rows is None:
                    torch.mm(du, low_a[e], out=dx[start:stop])
                elif dx is not None:
                    dx[rows[start:stop]] = du @ low_a[e]
        return (
            dy, None if dx is None else dx.view(x.shape), da, db, None, None, None,
        )  # fmt: skip


def fuses(backend: str) -> bool:
    """Whether a layer's backend has a kernel for the frozen and the low-rank product of experts at once."""
    return (select.override() or backend) == "triton"


def fused_experts(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, groups: Groups, scaling: float) -> Tensor:
    """y [..., N] = x W_eᵀ + s (x A_eᵀ) B_eᵀ by the Triton kernels; differentiable once, but for W.

    Args:
        x: [..., K], S rows.
        weight: [E, N, K], frozen; a: [E, R, K]; b: [E, N, R]. Any strides and floating dtypes.
        groups: the rows of each expert; the other rows of y are zero.

    Raises:
        RuntimeError, ValueError: the kernels cannot run on this machine, or not with these arguments.
    """
    select.check("triton")
    if reason := kernels.unsupported_reason(x, weight, a.shape[1]):
        raise ValueError(f"backend 'triton' does not serve these experts: {reason}; take backend='torch'")
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = _FusedExperts.apply(x, weight, a, b, groups.offsets, groups.rows, scaling)  # type: ignore[no-untyped-call]
        return y


class _FusedExperts(torch.autograd.Function):
    """Saves x and u [S, R]; W, A and B as the tensors they are."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, offsets: Tensor, rows: Tensor | None, scaling: float
    ) -> Tensor:
        y, u = kernels.grouped_forward(_flat(x), weight, a, b, offsets, rows, scaling)
        ctx.save_for_backward(x, weight, a, b, u, offsets, rows)
        ctx.scaling = scaling
        whole: Tensor = torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], weight.shape[1]])  # no view for autograd
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, weight, a, b, u, offsets, rows = ctx.saved_tensors
        need_x, _, need_a, need_b, *_ = ctx.needs_input_grad
        dx, da, db = kernels.grouped_backward(
            _flat(dy), _flat(x), weight, a, b, u, offsets, rows, ctx.scaling, (need_x, need_a, need_b)
        )
        return None if dx is None else dx.view(x.shape), None, da, db, None, None, None


def _parts(offsets: Tensor) -> Iterator[tuple[int, int, int]]:
    """Expert, first row and end, of each expert that has rows. Reads ``offsets`` back from its device, once."""
    start = 0
    for e, stop in enumerate(offsets.tolist()):
        if stop > start:
            yield e, start, stop
        start = stop


def _taken(tensor: Tensor, rows: Tensor | None, start: int, stop: int) -> Tensor:
    return tensor[start:stop] if rows is None else tensor[rows[start:stop]]


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])

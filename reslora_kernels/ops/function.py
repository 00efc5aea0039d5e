"""From arguments to a backend and back: the autograd Function, and the shortest way through it for an eager call.

What is decided once for a kind of call (by shapes, dtypes and devices, never by addresses) is looked up after that:
that the arguments are as they must be, and which backend serves. A call without gradients takes no Function at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from operator import attrgetter
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from ..backends import select
from ..backends import torch as library
from ..dropout import Dropout
from ..forward_state import refuse_recomputation
from ..side_channel import Gradients, Needs, Outputs, SideChannel, height, width
from . import registered, transformed
from .arguments import PackedWeight, check

_PLAIN = (Tensor, torch.nn.Parameter)  # the types whose operators no one else implements
_form = attrgetter("shape", "dtype", "device")
FEW_VALUES = 1 << 15  # of x and y together: below, Python and the dispatcher cost more than a further pass over them
_LEADING = 6  # arguments of the Function before the stacks: x, weight, bias, residual, seed, call


def _constant_in_graphs(function: Callable[..., bool]) -> Callable[..., bool]:
    """``torch.compiler.assume_constant_result``, which would import torch.compile's machinery here already."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class _Call(NamedTuple):
    """What both passes of a kind of call share beside tensors; ``served`` is its backend, None where the ops serve."""

    side: SideChannel
    p: float
    depth: int  # matrices in a_stack
    backend: str
    served: ModuleType | None
    composed: int = 0  # of a call that is made of operations which autograd knows: ``matrices_of_u``, or 1


def fused_linear(
    x: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None,
    a_stack: Sequence[Tensor],
    b_stack: Sequence[Tensor],
    residual: Tensor | None,
    side: SideChannel,
    p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """``ops.lora_linear`` for arguments of the right types; whether they go together is checked here."""
    if p == 0:
        seed = None
    dtype = _autocast_dtype(x.device.type)
    if dtype is not None:
        return _in_autocast(dtype, x, weight, bias, a_stack, b_stack, residual, side, p, seed, backend)
    compiling = torch.compiler.is_compiling()
    if _exporting() if compiling else torch._C._is_tracing():
        return _exported(x, weight, bias, a_stack, b_stack, residual, side, p, seed)
    if compiling or not _is_eager(x):
        check(x, weight, bias, a_stack, b_stack, residual, p, seed)
        if not compiling and torch._C._are_functorch_transforms_active():
            dense = weight if isinstance(weight, Tensor) else weight.unpacked(x.dtype)
            dropout = None if seed is None else Dropout(seed, p)
            return transformed.forward(x, dense, bias, a_stack, b_stack, residual, side, dropout)
        if compiling and seed is None and isinstance(weight, Tensor) and _is_library(backend, x.device.type):
            return _compiled(x, weight, bias, a_stack, b_stack, residual, side)
        call = _Call(side, p, len(a_stack), backend, None)
    else:
        call = _prepared(x, weight, bias, a_stack, b_stack, residual, side, p, seed, backend)
        if residual is not None or side.hand_stop:
            refuse_recomputation()
        if call.composed:
            return _composed(x, weight, bias, a_stack, b_stack, residual, side, None, call.composed)
        if not (torch.is_grad_enabled() and _needs_gradient(x, weight, bias, residual, a_stack, b_stack)):
            dense = weight if isinstance(weight, Tensor) else weight.unpacked(x.dtype)
            return _shaped(_forward(call, x, dense, bias, residual, seed, a_stack, b_stack), x.shape)
        outputs = _apply(x, weight, bias, residual, seed, call, *a_stack, *b_stack)  # type: ignore[no-untyped-call]
        return outputs if side.hand_stop else (outputs, None)
    outputs = _LoRALinear.apply(x, weight, bias, residual, seed, call, *a_stack, *b_stack)  # type: ignore[no-untyped-call]
    if side.hand_stop <= side.hand_start:
        return outputs, None
    y, handed = outputs
    # torch.compile can give out of a checkpointed region what an operation in it made, but no output of a Function.
    return y, handed.view_as(handed) if compiling else handed


class _LoRALinear(torch.autograd.Function):
    """Saves x and u only where a gradient needs them, and the stacks as the parameters they are, not as copies."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        # One starred parameter: without gradients torch.compile tells by their number whether there is a ctx.
        x, weight, bias, residual, seed, call, *stacks = arguments
        depth = call.depth
        ctx.packed = None
        dense = weight if isinstance(weight, Tensor) else weight.unpacked(x.dtype)
        if dense is not weight:
            ctx.packed, weight = weight, None
        outputs = _forward(call, x, dense, bias, residual, seed, stacks[:depth], stacks[depth:])
        needs = ctx.needs_input_grad
        need_da, need_db = True in needs[_LEADING : _LEADING + depth], True in needs[_LEADING + depth :]
        u = outputs.u if depth else _tokens(residual).to(x.dtype)
        ctx.save_for_backward(
            x if need_da or needs[1] else None, weight, u if need_db else None, seed, *stacks
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.kind = call, x.shape, x.dtype, Needs(needs[0], need_da, need_db, needs[3])
        # y is shaped here and not by a view afterwards, on which FSDP2 could not count for its hooks; and as no view of
        # the op's output, or autograd refuses to change it in place (nn.ReLU(inplace=True)).
        y, handed = _shaped(outputs, x.shape)
        return y if handed is None else (y, handed)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dhanded: Tensor | None = None) -> tuple[Any, ...]:
        return _differentiated(ctx, dy, dhanded) if torch.is_grad_enabled() else _gradients(ctx, dy, dhanded)


def _gradients(ctx: Any, dy: Tensor | None, dhanded: Tensor | None) -> tuple[Any, ...]:
    x, weight, u, seed, *stacks = ctx.saved_tensors
    call, shape, dtype, needs = ctx.kind
    _, need_dweight, need_dbias, *_ = ctx.needs_input_grad
    a_stack, b_stack = stacks[: call.depth], stacks[call.depth :]
    if dy is None and dhanded is None:
        return (None,) * (_LEADING + len(stacks))
    if ctx.packed is not None:
        weight = ctx.packed.unpacked(dtype)
    if dy is None:
        assert dhanded is not None
        dy = dhanded.new_zeros(*shape[:-1], weight.shape[0])
    if len(shape) != 2:
        dy, x = _tokens(dy), None if x is None else _tokens(x)
        dhanded = None if dhanded is None else _tokens(dhanded)
    dx, da, db, dresidual = _backward(call, dy, dhanded, x, weight, u, seed, a_stack, b_stack, needs)
    if len(shape) != 2:
        dx = None if dx is None else dx.view(shape)
        dresidual = None if dresidual is None else dresidual.view(*shape[:-1], dresidual.shape[1])
    return (
        dx,
        dy.T @ x if need_dweight else None,
        dy.sum(0) if need_dbias else None,
        dresidual,
        None,
        None,
        *_split(da, a_stack, 0),
        *_split(db, b_stack, 1),
    )


_apply = super(torch.autograd.Function, _LoRALinear).apply  # without the part of ``apply`` that is for functorch
_differentiated = once_differentiable(_gradients)


def _forward(
    call: _Call,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    a_stack: Sequence[Tensor],
    b_stack: Sequence[Tensor],
) -> Outputs:
    if x.dim() != 2:
        x, residual = _tokens(x), None if residual is None else _tokens(residual)
    dropout = None if seed is None else Dropout(seed, call.p)
    if call.served is None:
        return registered.forward(x, weight, bias, a_stack, b_stack, residual, call.side, dropout, call.backend)
    outputs: Outputs = call.served.forward(x, weight, bias, a_stack, b_stack, residual, call.side, dropout)
    return outputs


def _backward(
    call: _Call,
    dy: Tensor,
    dhanded: Tensor | None,
    x: Tensor | None,
    weight: Tensor,
    u: Tensor | None,
    seed: Tensor | None,
    a_stack: Sequence[Tensor],
    b_stack: Sequence[Tensor],
    needs: Needs,
) -> Gradients:
    dropout = None if seed is None else Dropout(seed, call.p)
    if call.served is None or torch.compiler.is_compiling() or not _is_eager(dy):
        return registered.backward(dy, dhanded, x, weight, a_stack, b_stack, u, call.side, dropout, needs, call.backend)
    gradients: Gradients = call.served.backward(dy, dhanded, x, weight, a_stack, b_stack, u, call.side, dropout, needs)
    return gradients


def _exported(
    x: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None,
    a_stack: Sequence[Tensor],
    b_stack: Sequence[Tensor],
    residual: Tensor | None,
    side: SideChannel,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The same in operations that every PyTorch and ONNX knows, for a graph that runs without this package."""
    check(x, weight, bias, a_stack, b_stack, residual, p, seed)
    dense = weight if isinstance(weight, Tensor) else weight.unpacked(x.dtype)
    own = library.matrices_of_u(a_stack, width(b_stack), side)
    dropout = None if seed is None else Dropout(seed, p)
    return _composed(x, dense, bias, a_stack, b_stack, residual, side, dropout, own)


def _composed(
    x: Tensor,
    weight: Any,
    bias: Tensor | None,
    a_stack: Sequence[Tensor],
    b_stack: Sequence[Tensor],
    residual: Tensor | None,
    side: SideChannel,
    dropout: Dropout | None,
    own: int,
) -> tuple[Tensor, Tensor | None]:
    """The call without the Function."""
    if x.dim() == 2:
        return library.composed(x, weight, bias, a_stack, b_stack, residual, side, dropout, own)
    leading = x.shape[:-1]
    residual = None if residual is None else _tokens(residual)
    y, handed = library.composed(_tokens(x), weight, bias, a_stack, b_stack, residual, side, dropout, own)
    return y.reshape(*leading, y.shape[1]), None if handed is None else handed.reshape(*leading, handed.shape[1])


def _compiled(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a_stack: Sequence[Tensor],
    b_stack: Sequence[Tensor],
    residual: Tensor | None,
    side: SideChannel,
) -> tuple[Tensor, Tensor | None]:
    """The call as torch.compile turns it into code of its own, but for the question whether it may run at all."""
    if residual is not None:
        residual = registered.unless_recomputed(residual)
    own = library.matrices_of_u(a_stack, width(b_stack), side)
    y, handed = _composed(x, weight, bias, a_stack, b_stack, residual, side, None, own)
    if handed is not None and residual is None:
        handed = registered.unless_recomputed(handed)
    return y, handed


@_constant_in_graphs
def _is_library(backend: str, device_type: str) -> bool:
    """Whether PyTorch's own operations serve, whatever the sizes."""
    name = select.override() or backend
    return name == "torch" or (name == "auto" and device_type != "cuda")


def _is_eager(x: Tensor) -> bool:
    """Whether the call can go to its backend without the dispatcher; elsewhere it must be one op, whole."""
    return (
        type(x) in _PLAIN
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def _prepared(
    x: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None,
    a_stack: Sequence[Tensor],
    b_stack: Sequence[Tensor],
    residual: Tensor | None,
    side: SideChannel,
    p: float,
    seed: Tensor | None,
    backend: str,
) -> _Call:
    """What is known of a kind of eager call; its arguments are checked where the kind is seen first."""
    kind = (
        backend, side, p, len(a_stack), type(weight), _form(x),
        _form(weight) if isinstance(weight, Tensor) else (weight.shape, weight.device),
        None if bias is None else _form(bias), None if residual is None else _form(residual),
        None if seed is None else _form(seed), *map(_form, a_stack), *map(_form, b_stack),
    )  # fmt: skip
    call: _Call | None = select.recall(kind)
    if call is None:
        check(x, weight, bias, a_stack, b_stack, residual, p, seed)
        served = None
        if type(weight) in _PLAIN or not isinstance(weight, Tensor):
            dense = weight if isinstance(weight, Tensor) else weight.unpacked(x.dtype)
            rank = height(a_stack) or width(b_stack)
            served = select.choose(backend, _tokens(x), dense, rank)
        small = (
            served is library
            and seed is None
            and isinstance(weight, Tensor)
            and prod(x.shape[:-1]) * sum(weight.shape) <= FEW_VALUES
            and all([matrix.dtype == x.dtype for matrix in (*a_stack, *b_stack)])
        )
        composed = max(1, library.matrices_of_u(a_stack, width(b_stack), side)) if small else 0
        call = _Call(side, p, len(a_stack), backend, served, composed)
        select.remember(kind, call)
    return call


def _needs_gradient(
    x: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    a_stack: Sequence[Tensor],
    b_stack: Sequence[Tensor],
) -> bool:
    if x.requires_grad or b_stack[0].requires_grad:
        return True
    others = (weight, bias, residual, *a_stack, *b_stack)
    return any(isinstance(t, Tensor) and t.requires_grad for t in others)


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of the autocast region around the call; None outside."""
    if _has_autocast(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


# Dynamo asks these two while it traces: PyTorch 2.8's own rules refuse the one, and take a compilation for an export.
@_constant_in_graphs
@cache
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


@_constant_in_graphs
def _exporting() -> bool:
    return torch.compiler.is_exporting()


def _in_autocast(
    dtype: torch.dtype,
    x: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None,
    a_stack: Sequence[Tensor],
    b_stack: Sequence[Tensor],
    residual: Tensor | None,
    *others: Any,
) -> tuple[Tensor, Tensor | None]:
    """The call on operands cast once, in no region."""
    x, bias, residual = (_cast(t, dtype) for t in (x, bias, residual))  # type: ignore[assignment]
    weight = _cast(weight, dtype) if isinstance(weight, Tensor) else weight  # type: ignore[assignment]
    with torch.autocast(x.device.type, enabled=False):
        return fused_linear(x, weight, bias, a_stack, b_stack, residual, *others)


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if tensor is None or tensor.dtype in (dtype, torch.float64) or not tensor.is_floating_point():
        return tensor
    return tensor.to(dtype)


def _tokens(x: Tensor) -> Tensor:
    """[..., K] as [M, K]; reshape cannot tell M of an empty tensor, and Size.numel loses a dynamic length."""
    return x if x.dim() == 2 else x.reshape(prod(x.shape[:-1]), x.shape[-1])


def _shaped(outputs: Outputs, like: torch.Size) -> tuple[Tensor, Tensor | None]:
    """y and what is handed on with the leading dimensions of ``like``, and no view for autograd."""
    y, handed, _ = outputs
    if len(like) == 2:
        return y, handed
    y = torch.ops.aten._unsafe_view.default(y, [*like[:-1], y.shape[1]])
    return y, None if handed is None else handed.reshape(*like[:-1], handed.shape[1])


def _split(gradient: Tensor | None, stack: Sequence[Tensor], dim: int) -> Sequence[Tensor | None]:
    """The gradient of stacked matrices as one of each."""
    if gradient is None or len(stack) == 1:
        return (gradient,) * len(stack)
    return torch.split_with_sizes(gradient, [matrix.shape[dim] for matrix in stack], dim)

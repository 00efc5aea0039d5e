"""From arguments to a backend and back: the autograd Function, and the shortest way through it for an eager call.

On a CPU that is one call of ``host`` for each pass, where it is there and serves. Elsewhere, what is decided once for a
kind of call (by shapes, dtypes and devices, never by addresses) is looked up after that: that the arguments are as they
must be, and which backend serves. A call without gradients takes no Function at all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import prod
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .. import host
from ..backends import select
from ..backends import torch as library
from ..dropout import Dropout
from ..forward_state import any_opened_by_hand, version_of
from ..side_channel import Outputs, SideChannel, height, width
from . import registered
from .arguments import Operands, check
from .call import LEADING, PLAIN, Call, Sharing, composed, in_parts, is_eager, shaped, tokens
from .gradients import backward

_LIBRARY = ("auto", "torch")  # backends that are PyTorch's own operations on a CPU
_form = attrgetter("shape", "dtype", "device")
FEW_VALUES = 1 << 15  # of x and y together: below, Python and the dispatcher cost more than a further pass over them
MOST_JOINED = 1 << 20  # values of A and B: with more, backward joins them anew


def _constant_in_graphs(function: Callable[..., bool]) -> Callable[..., bool]:
    """``torch.compiler.assume_constant_result``, which would import torch.compile's machinery here already."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def fused_linear(
    operands: Operands, side: SideChannel, p: float, backend: str, sharing: Sharing | None = None
) -> tuple[Any, ...]:
    """``ops.lora_linear`` for arguments of the right types; whether they go together is checked here.

    Returns:
        y and what is handed on, or None. With ``sharing``, of one of several layers that read x one after the other:
        y, each part of what is handed on, and x for the next of them to read. That has the values of x, and where
        ``sharing.passes_x`` it is an output of this call: then the gradients of x are added up on their way back
        through the calls, each product on top of the sum of those after it, and none is held in a tensor of its own.
    """
    device = operands.x.device.type
    dtype = _autocast_dtype(device)
    if dtype is None:
        return _called(operands, side, p, backend, sharing)
    with torch.autocast(device, enabled=False):
        return _called(operands.cast(dtype), side, p, backend, sharing)


def setting_of(x: Tensor) -> tuple[bool, torch.dtype | None]:
    """What surrounds a call on x: calls in other surroundings share nothing."""
    return torch.is_grad_enabled(), _autocast_dtype(x.device.type)


def _called(operands: Operands, side: SideChannel, p: float, backend: str, sharing: Sharing | None) -> tuple[Any, ...]:
    """The call in no region of autocast."""
    x, weight, bias, residual, seed, a_stack, b_stack, h = operands
    compiling = torch.compiler.is_compiling()
    if compiling or torch._C._is_tracing() or not is_eager(x):
        if x.layout is torch.jagged and not compiling:
            return _of_jagged(operands, side, p, backend, sharing)
        traced = in_parts(_traced(operands, side, p, backend, compiling), x, sharing)
        # a stage of torch.distributed.pipelining sends what it gives out, and sends no views
        return tuple([t if t is None else t.contiguous() for t in traced]) if compiling and _exporting() else traced
    training = torch.is_grad_enabled() and _needs_gradient(operands)
    widths, passes_x = ((), False) if sharing is None else sharing
    passes_x = passes_x and training and x.requires_grad
    on_host = host.module is not None and x.is_cpu and x.dtype in host.DTYPES and backend in _LIBRARY
    call = Call(side, p, len(a_stack), widths, passes_x, 0 if h is None else h.shape[-1], backend, on_host)
    if on_host:
        if not training:
            outputs = host.module.forward(x, weight, bias, residual, h, seed, call, *a_stack, *b_stack)
            if outputs is not None:
                return (*outputs[:-1], x) if widths else in_parts(outputs[:2], x, sharing)
            call = _prepared(operands, call)
    else:
        call = _prepared(operands, call)
    if call.composed:
        return in_parts(composed(operands, side, p, call.composed), x, sharing)
    if not training:
        y, handed, _ = shaped(_forward(call, operands.unpacked()), x.shape)
        return in_parts((y, handed), x, sharing)
    outputs = _apply(x, weight, bias, residual, h, seed, call, *a_stack, *b_stack)  # type: ignore[no-untyped-call]
    if sharing is None:
        return outputs if side.hand_stop else (outputs, None)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return outputs if passes_x else (*outputs, x)


def _of_jagged(
    operands: Operands, side: SideChannel, p: float, backend: str, sharing: Sharing | None
) -> tuple[Any, ...]:
    """The call on the values of nested tensors, whose results are laid out as x is."""
    x: Any = operands.x
    values = {
        name: t.values()
        for name in ("x", "residual", "h")
        if (t := getattr(operands, name)) is not None and t.is_nested
    }
    outputs = _called(operands._replace(**values), side, p, backend, sharing)
    like = {"offsets": x.offsets(), "lengths": x.lengths()}
    return tuple([None if t is None else torch.nested.nested_tensor_from_jagged(t, **like) for t in outputs])


def _traced(
    operands: Operands, side: SideChannel, p: float, backend: str, compiling: bool
) -> tuple[Tensor, Tensor | None]:
    """A call that someone takes apart: a compiler, an exporter, a transform or a dispatch mode."""
    check(operands, p)
    if operands.h is not None:
        operands, side, handed = operands.with_u(side)
        return _traced(operands, side, p, backend, compiling)[0], handed
    x, weight, bias, residual, seed, a_stack, b_stack, _ = operands
    if _exporting() if compiling else torch._C._is_tracing():
        # operations that every PyTorch and ONNX knows, for a graph that runs without this package
        return composed(operands.unpacked(), side, p, library.matrices_of_u(a_stack, width(b_stack), side))
    if not compiling and _in_parts_only():
        return registered.in_plain_operations(operands.unpacked(), side, p)
    if compiling and seed is None and isinstance(weight, Tensor) and _is_library(backend, x.device.type):
        return _compiled(operands, side)
    call = Call(side, p, len(a_stack), (), False, 0, backend, False)
    outputs = _LoRALinear.apply(x, weight, bias, residual, None, seed, call, *a_stack, *b_stack)  # type: ignore[no-untyped-call]
    if side.hand_stop <= side.hand_start:
        return outputs, None
    y, handed = outputs
    # torch.compile can give out of a checkpointed region what an operation in it made, but no output of a Function.
    return y, handed.view_as(handed) if compiling else handed


def _in_parts_only() -> bool:
    """Whether someone takes every operation by itself: functorch, forward-mode AD, or who counts products."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    return any("FlopCounter" in type(mode).__name__ for mode in _get_current_dispatch_mode_stack())


class _LoRALinear(torch.autograd.Function):
    """Saves x and u only where a gradient needs them, and the stacks as the parameters they are; joined, if small."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        # One starred parameter: without gradients torch.compile tells by their number whether there is a ctx.
        x, weight, bias, residual, h, seed, call, *stacks = arguments
        depth = call.depth
        ctx.packed = None
        joined: tuple[Tensor, ...] = ()
        outputs = host.module.forward(*arguments) if call.on_host else None
        if outputs is not None:
            y, *handed, u = outputs
            again = seed is None and x.numel() + y.numel() <= FEW_VALUES
        else:
            operands = Operands(x, weight, bias, residual, seed, stacks[:depth], stacks[depth:], h)
            dense, again = operands.unpacked(), False
            if dense is not operands:
                ctx.packed, weight = weight, None
            if call.on_host:
                call = _prepared(operands, call)
            if call.joins:
                dense = dense.joined()
                joined = *dense.a, *dense.b
            # y is shaped here and not by a view afterwards, on which FSDP2 could not count for its hooks; and as no
            # view of the op's output, or autograd refuses to change it in place (nn.ReLU(inplace=True)).
            y, whole, u = shaped(_forward(call, dense), x.shape)
            handed = [whole] if whole is None or not call.widths else torch.split(whole, call.widths, -1)
        needs = ctx.needs_input_grad
        need_da, need_db = True in needs[LEADING : LEADING + depth], True in needs[LEADING + depth :]
        if not depth:
            u = tokens(residual if u is None else u).to(x.dtype)
        needs_x = need_da or needs[1]
        if again and not needs_x:  # kept for a backward of the backward alone, and may be written to if there is none
            ctx.x = x, version_of(x)
        ctx.save_for_backward(
            residual if again else None,
            h if again else None,
            x if needs_x else None,
            weight, u if need_db else None, seed, *stacks, *joined,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.kind = call, x.shape, x.dtype, (needs[0], need_da, need_db, needs[3], needs[4]), len(stacks), again
        if call.passes_x:
            return (y, x.detach()) if handed[0] is None else (y, *handed, x.detach())
        return y if handed[0] is None else (y, *handed)

    backward = staticmethod(backward)


_apply = super(torch.autograd.Function, _LoRALinear).apply  # without the part of ``apply`` that is for functorch


def _forward(call: Call, operands: Operands) -> Outputs:
    """The pass on operands whose weight is dense."""
    operands, side, handed = operands.with_u(call.side)
    x, weight, bias, residual, seed, a_stack, b_stack, _ = operands
    if x.dim() != 2:
        x, residual = tokens(x), None if residual is None else tokens(residual)
    dropout = None if seed is None else Dropout(seed, call.p)
    if call.served is None:
        outputs = registered.forward(
            Operands(x, weight, bias, residual, seed, a_stack, b_stack), side, call.p, call.backend
        )
    else:
        outputs = call.served.forward(x, weight, bias, a_stack, b_stack, residual, side, dropout)
    y, own, u = outputs
    return Outputs(y, own if handed is None else tokens(handed), u if a_stack else residual)


def _compiled(operands: Operands, side: SideChannel) -> tuple[Tensor, Tensor | None]:
    """The call as torch.compile turns it into code of its own, but for the question whether it may run at all."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # there where torch.compile is

    asks = any_opened_by_hand()  # a guard: without such a pass there is nothing to ask, and nothing to copy
    if asks and operands.residual is not None:
        operands = operands._replace(residual=registered.unless_recomputed(operands.residual))
    own = library.matrices_of_u(operands.a, width(operands.b), side)
    plain = operands.x.dtype != torch.float16  # in which a product must not be rounded before it is scaled
    few = plain and statically_known_true(prod(operands.x.shape[:-1]) <= library.FEW_ROWS)
    y, handed = composed(operands, side, 0.0, own, library.for_few_rows if few else library.composed)
    if asks and handed is not None and operands.residual is None:
        handed = registered.unless_recomputed(handed)
    return y, handed


@_constant_in_graphs
def _is_library(backend: str, device_type: str) -> bool:
    """Whether PyTorch's own operations serve, whatever the sizes."""
    name = select.override() or backend
    return name == "torch" or (name == "auto" and device_type != "cuda")


def _prepared(operands: Operands, asked: Call) -> Call:
    """What is known of a kind of eager call; its arguments are checked where the kind is seen first."""
    x, weight, bias, residual, seed, a_stack, b_stack, h = operands
    described = (
        None if host.module is None else host.module.kind_of(x, weight, bias, residual, h, seed, *a_stack, *b_stack)
    )
    kind = (asked, described[0]) if described is not None else (
        asked, type(weight), _form(x), None if h is None else _form(h),
        _form(weight) if isinstance(weight, Tensor) else (weight.shape, weight.device),
        None if bias is None else _form(bias), None if residual is None else _form(residual),
        None if seed is None else _form(seed), *map(_form, a_stack), *map(_form, b_stack),
    )  # fmt: skip
    call: Call | None = select.recall(kind)
    if call is None:
        check(operands, asked.p)
        served = None
        if type(weight) in PLAIN or not isinstance(weight, Tensor):
            dense = operands.unpacked().weight
            rank = height(a_stack) or width(b_stack)
            served = select.choose(asked.backend, tokens(x), dense, rank, seed is not None)
        small = (
            served is library
            and seed is None
            and isinstance(weight, Tensor)
            and prod(x.shape[:-1]) * sum(weight.shape) <= FEW_VALUES
            and all([matrix.dtype == x.dtype for matrix in (*a_stack, *b_stack)])
        )
        size = height(a_stack) * x.shape[-1] + width(b_stack) * weight.shape[0]
        joins = served not in (None, library) and len(a_stack) + len(b_stack) > 2 and size <= MOST_JOINED
        composed = max(1, library.matrices_of_u(a_stack, width(b_stack), asked.side)) if small else 0
        call = asked._replace(on_host=False, served=served, joins=joins, composed=composed)
        select.remember(kind, call)
    return call


def _needs_gradient(operands: Operands) -> bool:
    x, weight, bias, residual, _, a_stack, b_stack, h = operands
    if x.requires_grad or b_stack[0].requires_grad:
        return True
    others = (weight, bias, residual, h, *a_stack, *b_stack)
    return any(isinstance(t, Tensor) and t.requires_grad for t in others)


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of the autocast region around the call; None outside."""
    if _has_autocast(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


# Dynamo asks these two while it traces: PyTorch 2.8's own rules refuse the one, and take a compilation for an export.
_autocast_available = cache(torch.amp.is_autocast_available)


@_constant_in_graphs
def _has_autocast(device_type: str) -> bool:
    return _autocast_available(device_type)


@_constant_in_graphs
def _exporting() -> bool:
    return torch.compiler.is_exporting()

"""From arguments to a backend and back: the autograd Function, and the shortest way through it for an eager call.

On a CPU that is one call of ``host`` for each pass, where it is there and serves. Elsewhere, what is decided once for a
kind of call (by shapes, dtypes and devices, never by addresses) is looked up after that: that the arguments are as they
must be, and which backend serves. A call without gradients takes no Function at all.
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

from .. import host
from ..backends import select
from ..backends import torch as library
from ..dropout import Dropout
from ..forward_state import any_opened_by_hand, refuse_recomputation
from ..side_channel import Needs, Outputs, SideChannel, height, width
from . import registered
from .arguments import Operands, check

_PLAIN = (Tensor, torch.nn.Parameter)  # the types whose operators no one else implements
_LIBRARY = ("auto", "torch")  # backends that are PyTorch's own operations on a CPU
_form = attrgetter("shape", "dtype", "device")
FEW_VALUES = 1 << 15  # of x and y together: below, Python and the dispatcher cost more than a further pass over them
_LEADING = 6  # arguments of the Function before the stacks: x, weight, bias, residual, seed, call


def _constant_in_graphs(function: Callable[..., bool]) -> Callable[..., bool]:
    """``torch.compiler.assume_constant_result``, which would import torch.compile's machinery here already."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class _Call(NamedTuple):
    """What both passes of a call share beside tensors; ``host`` reads the first three."""

    side: SideChannel
    p: float
    depth: int  # matrices in a_stack
    backend: str
    served: ModuleType | None = None  # the backend that was found; None where the ops serve
    composed: int = 0  # of a call that is made of operations which autograd knows: ``matrices_of_u``, or 1
    on_host: bool = False  # whether ``host`` is asked first


def fused_linear(operands: Operands, side: SideChannel, p: float, backend: str) -> tuple[Tensor, Tensor | None]:
    """``ops.lora_linear`` for arguments of the right types; whether they go together is checked here."""
    device = operands.x.device.type
    dtype = _autocast_dtype(device)
    if dtype is None:
        return _called(operands, side, p, backend)
    with torch.autocast(device, enabled=False):
        return _called(operands.cast(dtype), side, p, backend)


def _called(operands: Operands, side: SideChannel, p: float, backend: str) -> tuple[Tensor, Tensor | None]:
    """The call in no region of autocast."""
    x, weight, bias, residual, seed, a_stack, b_stack = operands
    compiling = torch.compiler.is_compiling()
    if compiling or torch._C._is_tracing() or not _is_eager(x):
        return _traced(operands, side, p, backend, compiling)
    if residual is not None or side.hand_stop:
        refuse_recomputation()
    training = torch.is_grad_enabled() and _needs_gradient(operands)
    if host.module is not None and x.is_cpu and x.dtype in host.DTYPES and backend in _LIBRARY:
        call = _Call(side, p, len(a_stack), backend, on_host=True)
        if not training:
            outputs = host.module.forward(x, weight, bias, residual, seed, call, *a_stack, *b_stack)
            if outputs is not None:
                y, handed, _ = outputs
                return y, handed
            call = _prepared(operands, side, p, backend)
    else:
        call = _prepared(operands, side, p, backend)
    if call.composed:
        return _composed(operands, side, p, call.composed)
    if not training:
        y, handed, _ = _shaped(_forward(call, operands.unpacked()), x.shape)
        return y, handed
    outputs = _apply(x, weight, bias, residual, seed, call, *a_stack, *b_stack)  # type: ignore[no-untyped-call]
    return outputs if side.hand_stop else (outputs, None)


def _traced(
    operands: Operands, side: SideChannel, p: float, backend: str, compiling: bool
) -> tuple[Tensor, Tensor | None]:
    """A call that someone takes apart: a compiler, an exporter, a transform or a dispatch mode."""
    x, weight, bias, residual, seed, a_stack, b_stack = operands
    check(operands, p)
    if _exporting() if compiling else torch._C._is_tracing():
        # operations that every PyTorch and ONNX knows, for a graph that runs without this package
        return _composed(operands.unpacked(), side, p, library.matrices_of_u(a_stack, width(b_stack), side))
    if not compiling and torch._C._are_functorch_transforms_active():
        return registered.in_plain_operations(operands.unpacked(), side, p)
    if compiling and seed is None and isinstance(weight, Tensor) and _is_library(backend, x.device.type):
        return _compiled(operands, side)
    call = _Call(side, p, len(a_stack), backend)
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
        outputs = host.module.forward(*arguments) if call.on_host else None
        if outputs is not None:
            y, handed, u = outputs
            again = seed is None and x.numel() + y.numel() <= FEW_VALUES
        else:
            operands = Operands(x, weight, bias, residual, seed, stacks[:depth], stacks[depth:])
            dense, again = operands.unpacked(), False
            if dense is not operands:
                ctx.packed, weight = weight, None
            if call.on_host:
                call = _prepared(operands, call.side, call.p, call.backend)
            # y is shaped here and not by a view afterwards, on which FSDP2 could not count for its hooks; and as no
            # view of the op's output, or autograd refuses to change it in place (nn.ReLU(inplace=True)).
            y, handed, u = _shaped(_forward(call, dense), x.shape)
        needs = ctx.needs_input_grad
        need_da, need_db = True in needs[_LEADING : _LEADING + depth], True in needs[_LEADING + depth :]
        if not depth:
            u = _tokens(residual).to(x.dtype)
        ctx.save_for_backward(
            residual if again else None,
            x if need_da or needs[1] or again else None,
            weight, u if need_db else None, seed, *stacks,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.kind = call, x.shape, x.dtype, Needs(needs[0], need_da, need_db, needs[3]), again
        return y if handed is None else (y, handed)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dhanded: Tensor | None = None) -> tuple[Any, ...]:
        if not torch.is_grad_enabled():
            return _gradients(ctx, dy, dhanded)
        return _graph_of_gradients(ctx, dy, dhanded) if ctx.kind[-1] else _differentiated(ctx, dy, dhanded)


def _gradients(ctx: Any, dy: Tensor | None, dhanded: Tensor | None) -> tuple[Any, ...]:
    _, x, weight, u, seed, *stacks = saved = ctx.saved_tensors
    call, shape, dtype, needs, _ = ctx.kind
    if dy is None and dhanded is None:
        return (None,) * (_LEADING + len(stacks))
    if ctx.packed is not None:
        weight = ctx.packed.unpacked(dtype)
    if dy is None:
        assert dhanded is not None
        dy = dhanded.new_zeros(*shape[:-1], weight.shape[0])
    gradients = None
    eager = not torch.compiler.is_compiling() and _is_eager(dy)
    if call.on_host and eager:
        gradients = host.module.backward(dy, dhanded, call, needs, *saved[1:])
    if gradients is None:
        gradients = _by_backend(call, eager, dy, dhanded, needs, shape, (x, weight, u, seed, *stacks))
    if True in ctx.needs_input_grad[1:3]:
        dx, _, _, *others = gradients
        _, need_dweight, need_dbias, *_ = ctx.needs_input_grad
        flat = _tokens(dy)
        return dx, flat.T @ _tokens(x) if need_dweight else None, flat.sum(0) if need_dbias else None, *others
    return gradients


def _by_backend(
    call: _Call,
    eager: bool,
    dy: Tensor,
    dhanded: Tensor | None,
    needs: Needs,
    shape: torch.Size,
    saved: tuple[Any, ...],
) -> tuple[Any, ...]:
    """A gradient for each argument of the Function but weight and bias."""
    x, weight, u, seed, *stacks = saved
    a_stack, b_stack = stacks[: call.depth], stacks[call.depth :]
    if len(shape) != 2:
        dy, x = _tokens(dy), None if x is None else _tokens(x)
        dhanded = None if dhanded is None else _tokens(dhanded)
    dropout = None if seed is None else Dropout(seed, call.p)
    if not eager or (call.served is None and not call.on_host):
        gradients = registered.backward(
            dy, dhanded, x, weight, a_stack, b_stack, u, call.side, dropout, needs, call.backend
        )
    else:
        served: Any = call.served or library
        gradients = served.backward(dy, dhanded, x, weight, a_stack, b_stack, u, call.side, dropout, needs)
    dx, da, db, dresidual = gradients
    if len(shape) != 2:
        dx = None if dx is None else dx.view(shape)
        dresidual = None if dresidual is None else dresidual.view(*shape[:-1], dresidual.shape[1])
    return dx, None, None, dresidual, None, None, *_split(da, a_stack, 0), *_split(db, b_stack, 1)


_apply = super(torch.autograd.Function, _LoRALinear).apply  # without the part of ``apply`` that is for functorch
_differentiated = once_differentiable(_gradients)


def _graph_of_gradients(ctx: Any, dy: Tensor | None, dhanded: Tensor | None) -> tuple[Any, ...]:
    """The gradients of a small call as what can be differentiated again, worked out from its inputs."""
    call, *_ = ctx.kind
    residual, x, weight, _, _, *stacks = ctx.saved_tensors
    given = (x, weight, None, residual, None, None, *stacks)
    wanted = [index for index, needed in enumerate(ctx.needs_input_grad) if needed and index != 2]
    # apart from how they were made: one may be made from another
    apart = [tensor.view_as(tensor) if index in wanted else tensor for index, tensor in enumerate(given)]
    x, weight, _, residual, _, _, *stacks = apart
    operands = Operands(x, weight, None, residual, None, stacks[: call.depth], stacks[call.depth :])
    own = library.matrices_of_u(operands.a, width(operands.b), call.side)
    pairs = zip(_composed(operands, call.side, 0.0, own), (dy, dhanded), strict=True)
    outputs, directions = zip(*[pair for pair in pairs if pair[1] is not None], strict=True)
    found = torch.autograd.grad(outputs, [apart[i] for i in wanted], directions, create_graph=True, allow_unused=True)
    gradients: list[Tensor | None] = [None] * len(given)
    for index, gradient in zip(wanted, found, strict=True):
        gradients[index] = gradient
    if ctx.needs_input_grad[2] and dy is not None:
        gradients[2] = _tokens(dy).sum(0)
    return tuple(gradients)


def _forward(call: _Call, operands: Operands) -> Outputs:
    """The pass on operands whose weight is dense."""
    x, weight, bias, residual, seed, a_stack, b_stack = operands
    if x.dim() != 2:
        x, residual = _tokens(x), None if residual is None else _tokens(residual)
    dropout = None if seed is None else Dropout(seed, call.p)
    if call.served is None:
        return registered.forward(
            Operands(x, weight, bias, residual, seed, a_stack, b_stack), call.side, call.p, call.backend
        )
    outputs: Outputs = call.served.forward(x, weight, bias, a_stack, b_stack, residual, call.side, dropout)
    return outputs


def _composed(operands: Operands, side: SideChannel, p: float, own: int) -> tuple[Tensor, Tensor | None]:
    """The call without the Function."""
    x, weight, bias, residual, seed, a_stack, b_stack = operands
    dropout = None if seed is None else Dropout(seed, p)
    if x.dim() == 2:
        return library.composed(x, weight, bias, a_stack, b_stack, residual, side, dropout, own)
    leading = x.shape[:-1]
    residual = None if residual is None else _tokens(residual)
    y, handed = library.composed(_tokens(x), weight, bias, a_stack, b_stack, residual, side, dropout, own)
    return y.reshape(*leading, y.shape[1]), None if handed is None else handed.reshape(*leading, handed.shape[1])


def _compiled(operands: Operands, side: SideChannel) -> tuple[Tensor, Tensor | None]:
    """The call as torch.compile turns it into code of its own, but for the question whether it may run at all."""
    asks = any_opened_by_hand()  # a guard: without such a pass there is nothing to ask, and nothing to copy
    if asks and operands.residual is not None:
        operands = operands._replace(residual=registered.unless_recomputed(operands.residual))
    own = library.matrices_of_u(operands.a, width(operands.b), side)
    y, handed = _composed(operands, side, 0.0, own)
    if asks and handed is not None and operands.residual is None:
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


def _prepared(operands: Operands, side: SideChannel, p: float, backend: str) -> _Call:
    """What is known of a kind of eager call; its arguments are checked where the kind is seen first."""
    x, weight, bias, residual, seed, a_stack, b_stack = operands
    kind = (
        backend, side, p, len(a_stack), type(weight), _form(x),
        _form(weight) if isinstance(weight, Tensor) else (weight.shape, weight.device),
        None if bias is None else _form(bias), None if residual is None else _form(residual),
        None if seed is None else _form(seed), *map(_form, a_stack), *map(_form, b_stack),
    )  # fmt: skip
    call: _Call | None = select.recall(kind)
    if call is None:
        check(operands, p)
        served = None
        if type(weight) in _PLAIN or not isinstance(weight, Tensor):
            dense = operands.unpacked().weight
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


def _needs_gradient(operands: Operands) -> bool:
    x, weight, bias, residual, _, a_stack, b_stack = operands
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


def _tokens(x: Tensor) -> Tensor:
    """[..., K] as [M, K]; reshape cannot tell M of an empty tensor, and Size.numel loses a dynamic length."""
    return x if x.dim() == 2 else x.reshape(prod(x.shape[:-1]), x.shape[-1])


def _shaped(outputs: Outputs, like: torch.Size) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y and what is handed on with the leading dimensions of ``like``, and no view for autograd; u as it is."""
    y, handed, u = outputs
    if len(like) == 2:
        return y, handed, u
    y = torch.ops.aten._unsafe_view.default(y, [*like[:-1], y.shape[1]])
    return y, None if handed is None else handed.reshape(*like[:-1], handed.shape[1]), u


def _split(gradient: Tensor | None, stack: Sequence[Tensor], dim: int) -> Sequence[Tensor | None]:
    """The gradient of stacked matrices as one of each."""
    if gradient is None or len(stack) == 1:
        return (gradient,) * len(stack)
    return torch.split_with_sizes(gradient, [matrix.shape[dim] for matrix in stack], dim)

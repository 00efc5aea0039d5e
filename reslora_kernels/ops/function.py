"""From arguments to a backend and back: the autograd Function, and the shortest way through it for an eager call.

What is decided once for a kind of call (by shapes, dtypes and devices, never by addresses) is looked up after that:
that the arguments are as they must be, and which backend serves. A call without gradients takes no Function at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
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
from ..side_channel import Gradients, Needs, Outputs, SideChannel
from . import registered, transformed
from .arguments import PackedWeight, check

PLAIN = (Tensor, torch.nn.Parameter)  # the types whose operators no one else implements


class _Call(NamedTuple):
    """What both passes of a call share beside tensors; ``served`` is its backend where it does not need the ops."""

    side: SideChannel
    p: float
    depth: int  # matrices in a_stack
    backend: str
    served: ModuleType | None


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
    dtype = _autocast_dtype(x)
    if dtype is not None:
        return _in_autocast(dtype, x, weight, bias, a_stack, b_stack, residual, side, p, seed, backend)
    seed = seed if p > 0 else None
    if torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling():
        check(x, weight, bias, a_stack, b_stack, residual, p, seed)
        dense = weight if isinstance(weight, Tensor) else weight.unpacked(x.dtype)
        dropout = None if seed is None else Dropout(seed, p)
        return transformed.forward(x, dense, bias, a_stack, b_stack, residual, side, dropout)
    served: ModuleType | None = None
    exported = _exporting() or (not torch.compiler.is_compiling() and torch._C._is_tracing())
    if exported:  # in operations that every PyTorch and ONNX knows, for a graph that runs without this package
        check(x, weight, bias, a_stack, b_stack, residual, p, seed)
        served = library
    elif _is_eager(x):
        served = _served(x, weight, bias, a_stack, b_stack, residual, side, p, seed, backend)
        if residual is not None or side.hand_stop:
            refuse_recomputation()
    else:
        check(x, weight, bias, a_stack, b_stack, residual, p, seed)
    call = _Call(side, p, len(a_stack), backend, served)
    if exported or (served is not None and not _needs_gradient(x, weight, bias, residual, a_stack, b_stack)):
        if not isinstance(weight, Tensor):
            weight = weight.unpacked(x.dtype)
        y, handed, _ = _forward(call, x, weight, bias, residual, seed, a_stack, b_stack)
        leading = x.shape[:-1]
        if len(leading) != 1:
            y = y.reshape(*leading, y.shape[1])
            handed = None if handed is None else handed.reshape(*leading, handed.shape[1])
        return y, handed
    outputs = _LoRALinear.apply(x, weight, bias, residual, seed, call, *a_stack, *b_stack)  # type: ignore[no-untyped-call]
    if side.hand_stop <= side.hand_start:
        return outputs, None
    y, handed = outputs
    # torch.compile can give out of a checkpointed region what an operation in it made, but no output of a Function.
    return y, handed.view_as(handed) if torch.compiler.is_compiling() else handed


class _LoRALinear(torch.autograd.Function):
    """Saves x and u only where a gradient needs them, and the stacks as the parameters they are, not as copies."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        # One starred parameter: without gradients torch.compile tells by their number whether there is a ctx.
        x, weight, bias, residual, seed, call, *stacks = arguments
        a_stack, b_stack = stacks[: call.depth], stacks[call.depth :]
        ctx.packed = packed = None if isinstance(weight, Tensor) else weight
        dense = weight if packed is None else packed.unpacked(x.dtype)
        y, handed, u = _forward(call, x, dense, bias, residual, seed, a_stack, b_stack)
        if u is None:
            u = _tokens(residual).to(x.dtype)
        needs = ctx.needs_input_grad
        ctx.need_da, ctx.need_db = any(needs[6 : 6 + call.depth]), any(needs[6 + call.depth :])
        kept_x = x if ctx.need_da or needs[1] else None
        ctx.save_for_backward(kept_x, weight if packed is None else None, u if ctx.need_db else None, seed, *stacks)
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.dtype, ctx.call = x.shape, x.dtype, call
        # y is shaped here and not by a view afterwards, on which FSDP2 could not count for its hooks; and as no view of
        # the op's output, or autograd refuses to change it in place (nn.ReLU(inplace=True)).
        return _shaped(y, x.shape) if handed is None else (_shaped(y, x.shape), _shaped(handed, x.shape))

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dhanded: Tensor | None = None) -> tuple[Any, ...]:
        return _differentiated(ctx, dy, dhanded) if torch.is_grad_enabled() else _gradients(ctx, dy, dhanded)


def _gradients(ctx: Any, dy: Tensor | None, dhanded: Tensor | None) -> tuple[Any, ...]:
    x, weight, u, seed, *stacks = ctx.saved_tensors
    call: _Call = ctx.call
    needs, leading = ctx.needs_input_grad, ctx.shape[:-1]
    a_stack, b_stack = stacks[: call.depth], stacks[call.depth :]
    if dy is None and dhanded is None:
        return (None,) * len(needs)
    if ctx.packed is not None:
        weight = ctx.packed.unpacked(ctx.dtype)
    if dy is None:
        assert dhanded is not None
        dy = dhanded.new_zeros(*leading, weight.shape[0])
    dy = _tokens(dy)
    dhanded = None if dhanded is None else _tokens(dhanded)
    x = None if x is None else _tokens(x)
    need_dx, need_dweight, need_dbias, need_dresidual = needs[:4]
    wanted = Needs(need_dx, ctx.need_da, ctx.need_db, need_dresidual)
    dx, da, db, dresidual = _backward(call, dy, dhanded, x, weight, u, seed, a_stack, b_stack, wanted)
    return (
        None if dx is None else _shaped(dx, ctx.shape),
        dy.T @ x if need_dweight and x is not None else None,
        dy.sum(0) if need_dbias else None,
        None if dresidual is None else _shaped(dresidual, ctx.shape),
        None,
        None,
        *_split(da, a_stack, 0),
        *_split(db, b_stack, 1),
    )


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
    x, residual = _tokens(x), None if residual is None else _tokens(residual)
    a, b = _rows(a_stack, weight), _columns(b_stack)
    dropout = None if seed is None else Dropout(seed, call.p)
    if call.served is None:
        return registered.forward(x, weight, bias, a, b, residual, call.side, dropout, call.backend)
    outputs: Outputs = call.served.forward(x, weight, bias, a, b, residual, call.side, dropout)
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
    a, b = _rows(a_stack, weight), _columns(b_stack)
    dropout = None if seed is None else Dropout(seed, call.p)
    if call.served is None or not _is_eager(dy):
        return registered.backward(dy, dhanded, x, weight, a, b, u, call.side, dropout, needs, call.backend)
    gradients: Gradients = call.served.backward(dy, dhanded, x, weight, a, b, u, call.side, dropout, needs)
    return gradients


def _is_eager(x: Tensor) -> bool:
    """Whether the call can go to its backend without the dispatcher, for whom only the ops would be whole."""
    return not torch.compiler.is_compiling() and not (
        type(x) not in PLAIN
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def _served(
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
) -> ModuleType | None:
    """The backend of an eager call whose arguments go together, checked where they have not been seen before."""
    kind = (
        backend, x.shape, x.dtype, x.device, type(weight), weight.shape, weight.device,
        getattr(weight, "dtype", None), p, *((t.shape, t.dtype, t.device) for t in (*a_stack, *b_stack)),
        bias if bias is None else (bias.shape, bias.dtype, bias.device),
        residual if residual is None else (residual.shape, residual.device),
        seed if seed is None else (seed.shape, seed.dtype, seed.device), len(a_stack),
    )  # fmt: skip
    served = select.recall(kind)
    if served is None:
        check(x, weight, bias, a_stack, b_stack, residual, p, seed)
        if isinstance(weight, Tensor) and type(weight) not in PLAIN:
            return None
        rank = sum(a.shape[0] for a in a_stack) or sum(b.shape[1] for b in b_stack)
        dense = weight if isinstance(weight, Tensor) else weight.unpacked(x.dtype)
        served = select.choose(backend, _tokens(x), dense, rank)
        select.remember(kind, served)
    return served


def _needs_gradient(
    x: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    a_stack: Sequence[Tensor],
    b_stack: Sequence[Tensor],
) -> bool:
    if not torch.is_grad_enabled():
        return False
    if x.requires_grad or any(t.requires_grad for t in (*b_stack, *a_stack)):
        return True
    return any(getattr(t, "requires_grad", False) for t in (weight, bias, residual))


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of the autocast region around the call; None outside."""
    device_type = x.device.type
    if _has_autocast(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


# Dynamo asks these two while it traces: PyTorch 2.8's own rules refuse the one, and take a compilation for an export.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
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


def _shaped(y: Tensor, like: torch.Size) -> Tensor:
    """[M, N] with the leading dimensions of ``like``, and no view of it for autograd."""
    return y if len(like) == 2 else torch.ops.aten._unsafe_view(y, [*like[:-1], y.shape[1]])


def _rows(stack: Sequence[Tensor], weight: Tensor) -> Tensor:
    if len(stack) == 1:
        return stack[0]
    return torch.cat(list(stack)) if stack else weight.new_empty(0, weight.shape[1])


def _columns(stack: Sequence[Tensor]) -> Tensor:
    return stack[0] if len(stack) == 1 else torch.cat(list(stack), dim=1)


def _split(gradient: Tensor | None, stack: Sequence[Tensor], dim: int) -> Sequence[Tensor | None]:
    if gradient is None or len(stack) == 1:
        return (gradient,) * len(stack)
    return torch.split_with_sizes(gradient, [matrix.shape[dim] for matrix in stack], dim)

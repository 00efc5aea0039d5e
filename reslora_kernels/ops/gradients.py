"""The backward pass of the Function, and what it is made of where it is to be differentiated again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import host
from ..backends import torch as library
from ..dropout import Dropout
from ..forward_state import version_of
from ..side_channel import Needs, split, unparted, width
from . import registered
from .arguments import Operands
from .call import LEADING, Call, Sharing, composed, in_parts, is_eager, tokens


def backward(ctx: Any, dy: Tensor | None, *others: Tensor | None) -> tuple[Any, ...]:
    """A gradient for each argument of the Function, from those of y and of what was handed and passed on."""
    if not torch.is_grad_enabled():
        return _gradients(ctx, dy, *others)
    return _graph_of_gradients(ctx, dy, *others) if ctx.kind[-1] else _differentiated(ctx, dy, *others)


def _gradients(ctx: Any, dy: Tensor | None, *others: Tensor | None) -> tuple[Any, ...]:
    """A gradient for each argument; dx is added to the gradient of x passed on, the last of ``others``, in its memory.

    Nobody else has that: it was made by the call that read x next, for this one.
    """
    call, shape, dtype, needs, count, _ = ctx.kind
    _, _, x, weight, u, seed, *stacks = saved = _saved_for_others_too(ctx) if call.widths else ctx.saved_tensors
    stacks, joined = stacks[:count], stacks[count:]
    dhanded, onto = (others[:-1], others[-1]) if call.passes_x else (others, None)
    given = [each for each in dhanded if each is not None]
    if dy is None and not given:
        return onto, *(None,) * (LEADING - 1 + len(stacks))
    if ctx.packed is not None:
        weight = ctx.packed.unpacked(dtype)
    if dy is None:
        dy = given[0].new_zeros(*shape[:-1], weight.shape[0])
    gradients = None
    eager = not torch.compiler.is_compiling() and is_eager(dy)
    if call.on_host and eager:
        gradients = host.module.backward(dy, dhanded, onto, call, needs, *saved[2:])
    if gradients is None:
        whole = unparted(dhanded, call.widths)
        gradients = _by_backend(call, eager, dy, whole, onto, needs, shape, (x, weight, u, seed, *stacks), joined)
    if True in ctx.needs_input_grad[1:3]:
        dx, _, _, *rest = gradients
        _, need_dweight, need_dbias, *_ = ctx.needs_input_grad
        flat = tokens(dy)
        return dx, flat.T @ tokens(x) if need_dweight else None, flat.sum(0) if need_dbias else None, *rest
    return gradients


def _saved_for_others_too(ctx: Any) -> tuple[Any, ...]:
    try:
        saved: tuple[Any, ...] = ctx.saved_tensors
    except RuntimeError as error:
        raise RuntimeError(
            f"{error} This layer has projected x for others that read it: for a backward pass of each without "
            "retain_graph=True adapt with stack_projections=False"
        ) from error
    return saved


def _by_backend(
    call: Call,
    eager: bool,
    dy: Tensor,
    dhanded: Tensor | None,
    onto: Tensor | None,
    needs: tuple[bool, ...],
    shape: torch.Size,
    saved: tuple[Any, ...],
    joined: list[Tensor],
) -> tuple[Any, ...]:
    """A gradient for each argument of the Function but weight and bias."""
    x, weight, u, seed, *stacks = saved
    a_stack, b_stack = stacks[: call.depth], stacks[call.depth :]
    a, b = (joined[:-1], joined[-1:]) if joined else (a_stack, b_stack)
    if len(shape) != 2:
        dy, x = tokens(dy), None if x is None else tokens(x)
        dhanded, onto = (None if each is None else tokens(each) for each in (dhanded, onto))
    dropout = None if seed is None else Dropout(seed, call.p)
    need_dx, need_da, need_db, need_dresidual, need_dh = needs
    wanted = Needs(need_dx, need_da, need_db, need_dresidual or need_dh)
    if not eager or (call.served is None and not call.on_host):
        dx, da, db, du = registered.backward(dy, dhanded, x, weight, a, b, u, call.side, dropout, wanted, call.backend)
        dx = dx if onto is None or dx is None else dx + onto
    else:
        served: Any = call.served or library
        dx, da, db, du = served.backward(dy, dhanded, x, weight, a, b, u, call.side, dropout, wanted, onto)
    dresidual = du if need_dresidual else None
    dh = library.gradient_of_h(du, dhanded, call.height, call.side) if need_dh and du is not None else None
    if len(shape) != 2:
        dx = None if dx is None else dx.view(shape)
        dresidual, dh = (None if each is None else each.view(*shape[:-1], each.shape[1]) for each in (dresidual, dh))
    return dx, None, None, dresidual, dh, None, None, *split(da, a_stack, 0), *split(db, b_stack, 1)


def _graph_of_gradients(ctx: Any, dy: Tensor | None, *others: Tensor | None) -> tuple[Any, ...]:
    """The gradients of a small call as what can be differentiated again, worked out from its inputs."""
    call, *_ = ctx.kind
    residual, h, x, weight, _, _, *stacks = ctx.saved_tensors
    if x is None:
        x, version = ctx.x
        if version_of(x) != version:
            raise RuntimeError(
                "x of an adapted layer, needed for a backward of the backward, has been written to since"
            )
    given = (x, weight, None, residual, h, None, None, *stacks)
    wanted = [index for index, needed in enumerate(ctx.needs_input_grad) if needed and index != 2]
    # apart from how they were made: one may be made from another
    apart = [tensor.view_as(tensor) if index in wanted else tensor for index, tensor in enumerate(given)]
    x, weight, _, residual, h, _, _, *stacks = apart
    operands = Operands(x, weight, None, residual, None, stacks[: call.depth], stacks[call.depth :], h)
    own = library.matrices_of_u(operands.a, width(operands.b), call.side)
    made: tuple[Any, ...] = composed(operands, call.side, 0.0, own)
    if call.widths or call.passes_x:
        made = in_parts(made, x, Sharing(call.widths, True))
    pairs = zip(made, (dy, *others), strict=False)  # x as it was given on, and nothing handed on, may have no gradient
    outputs, directions = zip(*[pair for pair in pairs if pair[1] is not None], strict=True)
    found = torch.autograd.grad(outputs, [apart[i] for i in wanted], directions, create_graph=True, allow_unused=True)
    gradients: list[Tensor | None] = [None] * len(given)
    for index, gradient in zip(wanted, found, strict=True):
        gradients[index] = gradient
    if ctx.needs_input_grad[2] and dy is not None:
        gradients[2] = tokens(dy).sum(0)
    return tuple(gradients)


_differentiated = once_differentiable(_gradients)

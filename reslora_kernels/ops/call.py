"""What the passes of a call have in common: its settings, the shapes around it, and the call without a Function."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends import torch as library
from ..dropout import Dropout
from ..side_channel import Outputs, SideChannel
from .arguments import Operands

PLAIN = (Tensor, torch.nn.Parameter)  # the types whose operators no one else implements
LEADING = 7  # arguments of the Function before the stacks: x, weight, bias, residual, h, seed, call
_Form = Callable[..., tuple[Tensor, Tensor | None]]


class Sharing(NamedTuple):
    """What a call does for others that read the same x after it."""

    widths: tuple[int, ...]  # of the parts in which it hands on: its own first, if any, then one for each of them
    passes_x: bool  # whether one of them is to read x as this call gives it on, see ``fused_linear``


class Call(NamedTuple):
    """What both passes of a call share beside tensors; ``host`` reads the first six."""

    side: SideChannel
    p: float
    depth: int  # matrices in a_stack
    widths: tuple[int, ...]  # as in ``Sharing``; none of a call by itself
    passes_x: bool
    height: int  # R_a of h, where that is given; else 0
    backend: str
    on_host: bool  # whether ``host`` is asked first
    served: ModuleType | None = None  # the backend that was found; None where the ops serve
    joins: bool = False  # whether backward reads the stacks as forward has joined them
    composed: int = 0  # of a call that is made of operations which autograd knows: ``matrices_of_u``, or 1


def is_eager(x: Tensor) -> bool:
    """Whether the call can go to its backend without the dispatcher; elsewhere it must be one op, whole."""
    return (
        type(x) in PLAIN
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def composed(
    operands: Operands, side: SideChannel, p: float, own: int, form: _Form = library.composed
) -> tuple[Tensor, Tensor | None]:
    """The call without the Function."""
    if operands.h is not None:
        operands, side, handed = operands.with_u(side)
        return composed(operands, side, p, own, form)[0], handed
    x, weight, bias, residual, seed, a_stack, b_stack, _ = operands
    dropout = None if seed is None else Dropout(seed, p)
    if x.dim() == 2:
        return form(x, weight, bias, a_stack, b_stack, residual, side, dropout, own)
    leading = x.shape[:-1]
    residual = None if residual is None else tokens(residual)
    y, handed = form(tokens(x), weight, bias, a_stack, b_stack, residual, side, dropout, own)
    return y.reshape(*leading, y.shape[1]), None if handed is None else handed.reshape(*leading, handed.shape[1])


def in_parts(outputs: tuple[Tensor, Tensor | None], x: Tensor, sharing: Sharing | None) -> tuple[Any, ...]:
    """y and what is handed on; with ``sharing`` as ``fused_linear`` returns them, x being given on as it is."""
    if sharing is None:
        return outputs
    y, handed = outputs
    return (y, x) if handed is None else (y, *torch.split(handed, list(sharing.widths), -1), x)


def tokens(x: Tensor) -> Tensor:
    """[..., K] as [M, K]; reshape cannot tell M of an empty tensor, and Size.numel loses a dynamic length."""
    return x if x.dim() == 2 else x.reshape(prod(x.shape[:-1]), x.shape[-1])


def shaped(outputs: Outputs, like: torch.Size) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y and what is handed on with the leading dimensions of ``like``, and no view for autograd; u as it is."""
    y, handed, u = outputs
    if len(like) == 2:
        return y, handed, u
    y = torch.ops.aten._unsafe_view.default(y, [*like[:-1], y.shape[1]])
    return y, None if handed is None else handed.reshape(*like[:-1], handed.shape[1]), u

"""The four methods of the paper as one kernel form: which stacks, which factor, which residual, what is handed on.

With the look-ahead projection the layer that has x_n in hand also projects it with the *next* layer's A, so ``input``
passes on D(x_n) A_{n+1}ᵀ [M, r] and no layer keeps or re-reads an earlier layer's [M, K] input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Adapter(Protocol):
    """A layer of a chain: its A [r, K] in parts, one above the other, and its B [N, r] in parts, side by side."""

    @property
    def a_parts(self) -> tuple[Tensor, ...]: ...
    @property
    def b_parts(self) -> tuple[Tensor, ...]: ...


class Call(NamedTuple):
    """The arguments of ``ops.lora_linear`` that depend on the shortcut. What is handed on ends with the last row."""

    a_stack: tuple[Tensor, ...]
    b_stack: tuple[Tensor, ...]
    c: float = 1.0
    residual: Tensor | None = None
    hand: tuple[int, int] | None = None


def call_of(
    shortcut: str,
    pre_num: int,
    layer: Adapter,
    earlier: Sequence[Adapter],
    following: Adapter | None,
    handed: Sequence[Tensor],
) -> Call:
    """What a layer of a chain computes.

    Args:
        earlier: the layers before it within ``reach``, nearest first; ``following`` the one after it. Places in the
            chain are relative, so that torch.compile needs no graph per index.
        handed: what the layers before it handed on in this forward [..., r], nearest first (see ``carried``). Empty
            when its predecessor did not run: the layer is then treated as layer 0 of its chain.
    """
    own, b = layer.a_parts, layer.b_parts
    if shortcut == "none":
        return Call(own, b)
    device = own[0].device  # neighbours may sit on another GPU
    if shortcut == "block":
        for other in earlier:
            own, b = own + _on(device, other.a_parts), b + _on(device, other.b_parts)
        return Call(own, b)
    handed = _on(device, handed)
    if shortcut == "input":
        before = handed[0] if handed else None
        c = 2.0 if before is None else 1.0
        if following is None:
            return Call(own, b, c, before)
        a_stack = own + _on(device, following.a_parts)
        return Call(a_stack, b, c, before, hand=(rows(own), rows(a_stack)))
    if shortcut == "middle":
        total = None
        for h in handed:
            total = h if total is None else total + h
        return Call(own, b, 1.0, total, None if following is None else (0, rows(own)))
    raise ValueError(f"shortcut must be 'none', 'input', 'block' or 'middle', got {shortcut!r}")


def for_others_too(call: Call, others: Sequence[Tensor]) -> Call:
    """The call of a layer that projects its input with the matrices of others as well, and hands that on last."""
    a_stack = (*call.a_stack, *others)
    return call._replace(a_stack=a_stack, hand=(call.hand[0] if call.hand else rows(call.a_stack), rows(a_stack)))


def with_projection(call: Call, h: Tensor) -> tuple[Call, Tensor | None]:
    """The call of a layer whose h = x A_stackᵀ [..., R_a] is known, and what of h is handed on."""
    u = h[..., : sum(b.shape[1] for b in call.b_stack)]
    u = u if call.c == 1 else u * call.c
    u = u if call.residual is None else u + call.residual
    return Call((), call.b_stack, residual=u), None if call.hand is None else h[..., slice(*call.hand)]


def _on(device: torch.device, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
    for part in parts:
        if part.device != device:
            return tuple([each.to(device) for each in parts])
    return tuple(parts)


def rows(parts: Sequence[Tensor]) -> int:
    """The height of matrices put one above the other."""
    total = 0
    for part in parts:
        total += int(part.shape[0])  # a traced size is a tensor
    return total


def reach(shortcut: str, pre_num: int, length: int) -> tuple[int, int]:
    """How many layers before it and after it a layer of a chain of ``length`` must know."""
    if shortcut == "block":
        return (length if pre_num == -1 else pre_num), 0
    return (1, 1) if hands_on(shortcut, pre_num) else (0, 0)


def hands_on(shortcut: str, pre_num: int) -> bool:
    """Whether layers pass an [M, r] tensor to later ones, so that a chain needs an open forward pass."""
    return shortcut == "input" or (shortcut == "middle" and pre_num != 0)


def carried(shortcut: str, pre_num: int, handed: tuple[Tensor, ...], h: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """What goes to the next layer, farther ones first: of what came from before, and of the layer's own h [..., r].

    ``middle`` over all earlier blocks hands their sum on: one tensor, however long the chain.
    """
    if shortcut == "input":
        return (), h
    if pre_num == -1:
        return (), h + handed[0].to(h.device) if handed else h
    return handed[: pre_num - 1], h

"""The four methods of the paper as one kernel form: which stacks, which factor, which residual, what is handed on.

With the look-ahead projection the layer that has x_n in hand also projects it with the *next* layer's A, so ``input``
passes on D(x_n) A_{n+1}ᵀ [M, r] and no layer keeps or re-reads an earlier layer's [M, K] input.

Gates, u = c ⊙ h + Σ_k g_k ⊙ (the k-th earlier term), are no part of the kernel form: c ⊙ (x Aᵀ) is x (diag(c) A)ᵀ,
and (g_k ⊙ (x A_{n-k}ᵀ)) B_{n-k}ᵀ in ``block`` is x A_{n-k}ᵀ (B_{n-k} diag(g_k))ᵀ. So they go into the small matrices,
or the [M, r] of a residual, before the call, and autograd knows their gradients from dA, dB and dresidual.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..config import ResLoRAConfig
from ..reference import earlier as earlier_blocks


class Adapter(Protocol):
    """A layer of a chain: its A [r, K] in parts, one above the other, and its B [N, r] in parts, side by side."""

    @property
    def a_parts(self) -> tuple[Tensor, ...]: ...
    @property
    def b_parts(self) -> tuple[Tensor, ...]: ...


class Call(NamedTuple):
    """The arguments of ``ops.lora_linear`` that depend on the shortcut. What is handed on ends with the last row.

    ``gate`` [1 or r], if any, is still to be taken into the layer's own A (``folded``): h itself is what is handed on.
    """

    a_stack: tuple[Tensor, ...]
    b_stack: tuple[Tensor, ...]
    c: float = 1.0
    residual: Tensor | None = None
    hand: tuple[int, int] | None = None
    gate: Tensor | None = None
    h: Tensor | None = None  # x A_stackᵀ [..., R_a], where another layer has made it: then there is no a_stack


def call_of(
    shortcut: str,
    layer: Adapter,
    around: tuple[Sequence[Adapter], Adapter | None],
    handed: Sequence[Tensor],
    gates: Tensor | None = None,
) -> Call:
    """What a layer of a chain computes.

    Args:
        around: the layers before it within ``reach``, nearest first, and the one after it. Places in the chain are
            relative, so that torch.compile needs no graph per index.
        handed: what the layers before it handed on in this forward [..., r], nearest first (see ``carried``). Empty
            when its predecessor did not run: the layer is then treated as layer 0 of its chain.
        gates: of the layer's terms, its own first [1 + earlier, 1 or r]; None means 1.
    """
    own, b = layer.a_parts, layer.b_parts
    if shortcut == "none":
        return Call(own, b)
    earlier, following = around
    weights = (None,) * (1 + len(earlier) + len(handed)) if gates is None else gates.unbind()
    device = own[0].device  # neighbours may sit on another GPU
    if shortcut == "block":
        of_each = [b]
        for other in earlier:
            own += _on(device, other.a_parts)
            of_each.append(_on(device, other.b_parts))
        if gates is not None:  # B diag(gate)
            own_gates = gates.unbind()[: len(of_each)]  # no zip(strict=False): torch.compile of 2.8 takes it for strict
            of_each = [tuple([part * g for part in parts]) for parts, g in zip(of_each, own_gates, strict=True)]
        return Call(own, sum(of_each, ()))
    handed = _on(device, handed)
    if shortcut == "input":
        before = handed[0] if handed else None
        c, gate = 2.0 if before is None else 1.0, None
        if gates is not None:
            c, gate = 1.0, gates.sum(0) if before is None else weights[0]
        before = None if before is None else weighed(before, weights[1])
        if following is None:
            return Call(own, b, c, before, None, gate)
        a_stack = own + _on(device, following.a_parts)
        return Call(a_stack, b, c, before, (rows(own), rows(a_stack)), gate)
    if shortcut == "middle":
        total = None
        for h, weight in zip(handed, weights[1 : 1 + len(handed)], strict=True):
            h = weighed(h, weight)
            total = h if total is None else total + h
        return Call(own, b, 1.0, total, None if following is None else (0, rows(own)), weights[0])
    raise ValueError(f"shortcut must be 'none', 'input', 'block' or 'middle', got {shortcut!r}")


def for_others_too(call: Call, others: Sequence[Tensor]) -> Call:
    """The call of a layer that projects its input with the matrices of others as well, and hands that on last."""
    a_stack = (*call.a_stack, *others)
    return call._replace(a_stack=a_stack, hand=(call.hand[0] if call.hand else rows(call.a_stack), rows(a_stack)))


def for_the_next(call: Call, layer: Adapter) -> tuple[Tensor, ...]:
    """The A stack of a call without gradients whose hand-over has them: only the next layer's A is to get any."""
    own = len(layer.a_parts)
    return (*[part.detach() for part in call.a_stack[:own]], *call.a_stack[own:])


def weighed(h: Tensor, gate: Tensor | None) -> Tensor:
    """gate [1 or r] ⊙ h [..., R], rounded once to h's dtype; h itself without a gate."""
    return h if gate is None else (h * spread(gate, h.shape[-1])).to(h.dtype)


def spread(gate: Tensor, rank: int) -> Tensor:
    """A gate [1 or r] for ``rank`` values: a layer that takes its start off has each of its r rows twice."""
    return gate if len(gate) in (1, rank) else gate.repeat(rank // len(gate))


def folded(call: Call) -> Call:
    """The call without a gate: diag(gate) A is in the place of the layer's A, or above it where h is handed on."""
    if call.gate is None:
        return call
    count = len(call.b_stack)
    own = tuple([part * call.gate[:, None] for part in call.a_stack[:count]])
    height = rows(own)
    if call.hand is None or call.hand[0] >= height:
        return call._replace(a_stack=own + call.a_stack[count:], gate=None)
    start, stop = call.hand
    return call._replace(a_stack=own + call.a_stack, hand=(start + height, stop + height), gate=None)


def with_projection(call: Call, h: Tensor) -> tuple[Call, Tensor | None]:
    """The call of a layer whose h = x A_stackᵀ [..., R_a] is known, and what of h is handed on."""
    u = h[..., : sum(b.shape[1] for b in call.b_stack)]
    u = u if call.c == 1 else u * call.c
    u = u if call.gate is None else weighed(u, call.gate)
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


def gates_shape(config: ResLoRAConfig, position: int) -> tuple[int, int] | None:
    """Of the gates of a layer there in its chain: a row for its own term and for each earlier one. None without gates.

    Layer 0 of ``input`` has two: it counts its own input twice.
    """
    if config.gates == "none":
        return None
    terms = 1 if config.shortcut == "input" else earlier_blocks(config.pre_num, position)
    return 1 + terms, config.r if config.gates == "rank" else 1


def carried(config: ResLoRAConfig, handed: tuple[Tensor, ...], h: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """What goes to the next layer: of what came from before, nearest first, and of the layer's own h [..., r].

    ``middle`` over all earlier blocks hands their sum on: one tensor, however long the chain. With gates each layer
    weighs them anew, and gets them one by one.
    """
    shortcut, pre_num = config.shortcut, config.pre_num
    if shortcut == "input":
        return (), h
    if pre_num == -1 and config.gates != "none":
        return handed, h
    if pre_num == -1:
        return (), h + handed[0].to(h.device) if handed else h
    return handed[: pre_num - 1], h

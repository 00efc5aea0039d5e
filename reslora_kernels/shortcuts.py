"""The four methods of the paper as one kernel form: which stacks, which factor, which residual, what is handed on.

With the look-ahead projection the layer that has x_n in hand also projects it with the *next* layer's A, so ``input``
passes on D(x_n) A_{n+1}ᵀ [M, r] and no layer keeps or re-reads an earlier layer's [M, K] input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .reference import earlier


@dataclass(frozen=True)
class Plan:
    """The arguments of ``ops.lora_linear`` that depend on the shortcut."""

    a_stack: tuple[Tensor, ...]
    b_stack: tuple[Tensor, ...]
    c: float = 1.0
    residual: Tensor | None = None
    hand: tuple[int, int] | None = None


def plan(
    shortcut: str,
    pre_num: int,
    n: int,
    length: int,
    a: Callable[[int], Tensor],
    b: Callable[[int], Tensor],
    handed_by: Callable[[int], Tensor | None],
) -> Plan:
    """What layer n of a chain of ``length`` layers computes.

    Args:
        a: lora_A [r, K] of a layer of the chain by position; ``b`` likewise lora_B [N, r].
        handed_by: what layer j < n handed on in this forward [..., r], None when it did not run. A layer whose
            predecessor did not run is treated as layer 0 of its chain.
    """
    if shortcut == "none":
        return Plan((a(n),), (b(n),))
    if shortcut == "block":
        window = range(earlier(pre_num, n) + 1)
        return Plan(tuple(a(n - k) for k in window), tuple(b(n - k) for k in window))
    if shortcut == "input":
        own, before = a(n), handed_by(n - 1) if n else None
        c = 2.0 if before is None else 1.0
        if n == length - 1:
            return Plan((own,), (b(n),), c, before)
        ahead, r = a(n + 1), own.shape[0]
        return Plan((own, ahead), (b(n),), c, before, hand=(r, r + ahead.shape[0]))
    if shortcut == "middle":
        own, total = a(n), None
        for k in range(1, earlier(pre_num, n) + 1):
            h = handed_by(n - k)
            if h is None:
                break
            total = h if total is None else total + h
        needed_later = n < length - 1 and pre_num != 0
        return Plan((own,), (b(n),), residual=total, hand=(0, own.shape[0]) if needed_later else None)
    raise ValueError(f"shortcut must be 'none', 'input', 'block' or 'middle', got {shortcut!r}")


def hands_on(shortcut: str, pre_num: int) -> bool:
    """Whether layers pass an [M, r] tensor to later ones, so that a chain needs an open forward pass."""
    return shortcut == "input" or (shortcut == "middle" and pre_num != 0)

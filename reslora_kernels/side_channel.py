"""What a call of the fused layer is beside its matrices: plain values, which every backend and the op's border share.

    h = D(x) Aᵀ        u = c h[:, :R_b] + residual        y = x Wᵀ + b + s u Bᵀ

They are the Python side of csrc/params.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Stack = Sequence[Tensor]  # matrices that count as one: of A put one above the other, of B side by side


class SideChannel(NamedTuple):
    """The scalars c and s, and the columns [hand_start, hand_stop) of h that later layers are handed."""

    c: float = 1.0
    scaling: float = 1.0
    hand_start: int = 0
    hand_stop: int = 0

    @property
    def hands_on(self) -> bool:
        return self.hand_stop > self.hand_start


class Needs(NamedTuple):
    """Which gradients a backward pass computes."""

    dx: bool = True
    da: bool = True
    db: bool = True
    dresidual: bool = False


class Outputs(NamedTuple):
    """Of a forward pass, all in x's dtype."""

    y: Tensor  # [M, N]
    handed: Tensor | None  # [M, hand_stop - hand_start]; None where nothing is; may share memory with u
    u: Tensor | None  # [M, R_b]; None without A, where u is the residual


class Gradients(NamedTuple):
    """Of a backward pass; None where one is not needed."""

    dx: Tensor | None  # [M, K]
    da: Tensor | None  # [R_a, K], in A's dtype
    db: Tensor | None  # [N, R_b], in B's dtype
    dresidual: Tensor | None  # [M, R_b]


def rows(stack: Stack) -> Tensor:
    """A stack of A, [R_a, K]; there must be a matrix in it."""
    return stack[0] if len(stack) == 1 else torch.cat(tuple(stack))


def columns(stack: Stack) -> Tensor:
    """A stack of B, [N, R_b]."""
    return stack[0] if len(stack) == 1 else torch.cat(tuple(stack), 1)


def height(stack: Stack) -> int:
    """R_a."""
    return sum([a.shape[0] for a in stack])


def width(stack: Stack) -> int:
    """R_b."""
    return sum([b.shape[1] for b in stack])


def split(gradient: Tensor | None, stack: Sequence[Tensor], dim: int) -> Sequence[Tensor | None]:
    """The gradient of stacked matrices as one of each."""
    if gradient is None or len(stack) == 1:
        return (gradient,) * len(stack)
    return torch.split_with_sizes(gradient, [matrix.shape[dim] for matrix in stack], dim)


def unparted(parts: Sequence[Tensor | None], widths: Sequence[int]) -> Tensor | None:
    """The gradient of what is handed on in parts."""
    given = [part for part in parts if part is not None]
    if not given or len(parts) == 1:
        return given[0] if given else None
    made, leading = given[0].new_zeros, given[0].shape[:-1]
    return torch.cat([made(*leading, n) if part is None else part for part, n in zip(parts, widths, strict=True)], -1)

"""What a call of the op may be given: checked before anything runs, each error naming its argument."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..backends import select
from ..side_channel import SideChannel, Stack, columns, rows, width


@runtime_checkable
class PackedWeight(Protocol):
    """A frozen weight [N, K] that is held in another form and unpacked for each pass, which does not keep it."""

    @property
    def shape(self) -> torch.Size: ...
    @property
    def device(self) -> torch.device: ...
    def unpacked(self, dtype: torch.dtype) -> Tensor: ...


class Operands(NamedTuple):
    """The tensors of a call, as ``ops.lora_linear`` names them."""

    x: Tensor
    weight: Any  # Tensor | PackedWeight
    bias: Tensor | None
    residual: Tensor | None
    seed: Tensor | None
    a: Stack
    b: Stack
    h: Tensor | None = None  # x A_catᵀ [..., R_a], where it is known: then there is no a

    def unpacked(self) -> Operands:
        """With a dense weight: these operands where it is one."""
        weight = self.weight
        return self if isinstance(weight, Tensor) else self._replace(weight=weight.unpacked(self.x.dtype))

    def joined(self) -> Operands:
        """With each stack as one matrix."""
        return self._replace(a=(rows(self.a),) if self.a else (), b=(columns(self.b),))

    def cast(self, dtype: torch.dtype) -> Operands:
        """As autocast would give them to a linear layer; A and B stay as they are."""
        x, weight, bias, residual, seed, a, b, h = self
        weight = _cast(weight, dtype) if isinstance(weight, Tensor) else weight
        x, bias, residual, h = (_cast(tensor, dtype) for tensor in (x, bias, residual, h))  # type: ignore[assignment]
        return Operands(x, weight, bias, residual, seed, a, b, h)

    def with_u(self, side: SideChannel) -> tuple[Operands, SideChannel, Tensor | None]:
        """The same call without h, whose residual is u; and what of h is handed on."""
        h, residual = self.h, self.residual
        if h is None:
            return self, side, None
        own = width(self.b)
        u = h if h.shape[-1] == own else h[..., :own]
        u = u if side.c == 1 else u * side.c
        u = u if residual is None else u + residual
        handed = h[..., side.hand_start : side.hand_stop] if side.hands_on else None
        return self._replace(residual=u, h=None), SideChannel(side.c, side.scaling), handed


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if tensor is None or tensor.dtype in (dtype, torch.float64) or not tensor.is_floating_point():
        return tensor
    return tensor.to(dtype)


def check_types(
    x: Any,
    weight: Any,
    bias: Any,
    a_stack: Any,
    b_stack: Any,
    residual: Any,
    scaling: Any,
    c: Any,
    p: Any,
    seed: Any,
    hand: Any,
    backend: Any,
) -> None:
    """TypeError or ValueError for what no tensor of the right type and shape can mend."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor, got {type(x).__name__}")
    # Two calls: torch.compile traces no isinstance of a tensor against a tuple that holds a protocol.
    if not isinstance(weight, Tensor) and not isinstance(weight, PackedWeight):
        raise TypeError(f"weight must be a Tensor, got {type(weight).__name__}")
    for name, tensor in (("bias", bias), ("residual", residual), ("seed", seed)):
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor or None, got {type(tensor).__name__}")
    for name, stack in (("a_stack", a_stack), ("b_stack", b_stack)):
        if not isinstance(stack, (list, tuple)) or not all(isinstance(matrix, Tensor) for matrix in stack):
            raise TypeError(f"{name} must be a list or tuple of Tensors, got {type(stack).__name__}")
    for name, number in (("scaling", scaling), ("c", c), ("p", p)):
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError(f"{name} must be a number, got {number!r}")
    if hand is not None and not (
        isinstance(hand, (list, tuple)) and len(hand) == 2 and all(isinstance(at, int) for at in hand)
    ):
        raise TypeError(f"hand must be two ints (start, stop) or None, got {hand!r}")
    if backend not in ("auto", *select.PREFERENCE):
        raise ValueError(f"backend must be one of 'auto', {', '.join(map(repr, select.PREFERENCE))}, got {backend!r}")
    r_a = _total(a_stack, 0)
    if hand is not None and not 0 <= hand[0] < hand[1] <= r_a:
        raise ValueError(f"hand must be (start, stop) with 0 <= start < stop <= {r_a}, got {hand}")


def check(operands: Operands, p: float) -> None:
    """ValueError unless shapes, dtypes and devices go together."""
    x, weight, bias, residual, seed, a_stack, b_stack, h = operands
    if x.dim() < 1 or len(weight.shape) != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x must be [..., K] and weight [N, K] with the same K, got x {list(x.shape)}, weight {list(weight.shape)}"
        )
    dtype = weight.dtype if isinstance(weight, Tensor) else x.dtype
    if not x.is_floating_point() or x.dtype != dtype:
        raise ValueError(f"x must have weight's floating dtype {dtype}, got {x.dtype}")
    n, k = weight.shape
    if not b_stack or (not a_stack and residual is None and h is None):
        counts = f"{len(a_stack)} and {len(b_stack)} matrices"
        raise ValueError(f"a_stack and b_stack must not be empty, got {counts}; only with a residual can a_stack be")
    for name, stack, axis, size in (("a_stack", a_stack, 1, k), ("b_stack", b_stack, 0, n)):
        for matrix in stack:
            if matrix.dim() != 2 or matrix.shape[axis] != size or not matrix.is_floating_point():
                expected = f"[r, {k}]" if axis else f"[{n}, r]"
                raise ValueError(
                    f"{name} must hold floating matrices {expected}, got {list(matrix.shape)} of {matrix.dtype}"
                )
    r_a, r_b = _total(a_stack, 0), _total(b_stack, 1)
    if r_b > r_a and a_stack:
        raise ValueError(f"b_stack's total rank must not exceed a_stack's, got {r_b} and {r_a}")
    if bias is not None and (bias.shape != (n,) or bias.dtype != x.dtype):
        raise ValueError(f"bias must be [{n}] of {x.dtype}, got {list(bias.shape)} of {bias.dtype}")
    if h is not None and (a_stack or h.dim() < 1 or h.shape[:-1] != x.shape[:-1] or h.shape[-1] < r_b):
        raise ValueError(f"h must be {[*x.shape[:-1], r_b]} or wider, without an a_stack, got {list(h.shape)}")
    if residual is not None and residual.shape != (*x.shape[:-1], r_b):
        raise ValueError(f"residual must be {[*x.shape[:-1], r_b]}, got {list(residual.shape)}")
    if not 0 <= p < 1:
        raise ValueError(f"p must be a probability with 0 <= p < 1, got {p}")
    if p > 0 and (seed is None or seed.dtype != torch.int64 or seed.numel() != 1):
        raise ValueError(f"seed must be an int64 tensor with one element when p > 0, got {seed!r}")
    for name, tensor in (("weight", weight), ("bias", bias), ("residual", residual), ("seed", seed if p > 0 else None)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")
    for name, stack in (("a_stack", a_stack), ("b_stack", b_stack)):
        if any(matrix.device != x.device for matrix in stack):
            raise ValueError(f"{name} must be on x's device {x.device}, got {[str(m.device) for m in stack]}")


def _total(stack: Sequence[Tensor], dim: int) -> int:
    return sum(matrix.shape[dim] for matrix in stack)

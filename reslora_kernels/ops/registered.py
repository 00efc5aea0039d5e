"""The two passes for what is no eager call: torch.library ops, and plain operations that functorch takes apart.

The ops serve torch.compile, fake tensors and dispatch modes. An eager call goes to its backend directly; the dispatcher
would only cost it time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..backends import select
from ..dropout import Dropout, drop
from ..forward_state import refuse_recomputation
from ..side_channel import Gradients, Needs, Outputs, SideChannel, Stack, columns, rows
from .arguments import Operands

FORWARD = "reslora_kernels::lora_linear_forward"
BACKWARD = "reslora_kernels::lora_linear_backward"
UNLESS_RECOMPUTED = "reslora_kernels::unless_recomputed"

torch.library.define(
    FORWARD,
    "(Tensor x, Tensor weight, Tensor? bias, Tensor a_cat, Tensor b_cat, Tensor? residual, Tensor? seed, float c, "
    "float scaling, float p, int hand_start, int hand_stop, str backend) -> (Tensor y, Tensor handed, Tensor u)",
)
torch.library.define(
    BACKWARD,
    "(Tensor dy, Tensor? dhanded, Tensor x, Tensor weight, Tensor a_cat, Tensor b_cat, Tensor u, Tensor? seed, "
    "float c, float scaling, float p, int hand_start, bool need_dx, bool need_da, bool need_db, bool need_dresidual, "
    "str backend) -> (Tensor dx, Tensor da_cat, Tensor db_cat, Tensor dresidual)",
)


@torch.library.impl(FORWARD, "CompositeExplicitAutograd")
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a_cat: Tensor,
    b_cat: Tensor,
    residual: Tensor | None,
    seed: Tensor | None,
    c: float,
    scaling: float,
    p: float,
    hand_start: int,
    hand_stop: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    side = SideChannel(c, scaling, hand_start, hand_stop)
    if residual is not None or side.hands_on:
        refuse_recomputation()
    served_by = select.choose(backend, x, weight, a_cat.shape[0] or b_cat.shape[1], seed is not None)
    dropout = None if seed is None else Dropout(seed, p)
    y, handed, u = served_by.forward(x, weight, bias, _stack(a_cat), (b_cat,), residual, side, dropout)
    u = x.new_empty(0, b_cat.shape[1]) if u is None else u
    return y, x.new_empty(x.shape[0], 0) if handed is None else _apart(handed, u), u


@torch.library.register_fake(FORWARD)  # type: ignore[untyped-decorator]
def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, a_cat: Tensor, b_cat: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *_, hand_start, hand_stop, _backend = rest
    rows = x.shape[0]
    return (
        x.new_empty(rows, weight.shape[0]),
        x.new_empty(rows, hand_stop - hand_start),
        x.new_empty(rows if a_cat.shape[0] else 0, b_cat.shape[1]),
    )


@torch.library.impl(BACKWARD, "CompositeExplicitAutograd")
def _backward(
    dy: Tensor,
    dhanded: Tensor | None,
    x: Tensor,
    weight: Tensor,
    a_cat: Tensor,
    b_cat: Tensor,
    u: Tensor,
    seed: Tensor | None,
    c: float,
    scaling: float,
    p: float,
    hand_start: int,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
    need_dresidual: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    side = SideChannel(c, scaling, hand_start, hand_start + (0 if dhanded is None else dhanded.shape[1]))
    served_by = select.choose(backend, dy, weight, a_cat.shape[0] or b_cat.shape[1], seed is not None)
    gradients: Gradients = served_by.backward(
        dy, dhanded, x, weight, _stack(a_cat), (b_cat,), u, side, None if seed is None else Dropout(seed, p),
        Needs(need_dx, need_da, need_db, need_dresidual),
    )  # fmt: skip
    likes = (dy, a_cat, b_cat, dy)
    dx, da, db, dresidual = (
        like.new_empty(0) if gradient is None else gradient for gradient, like in zip(gradients, likes, strict=True)
    )
    return dx, da, db, dresidual


torch.library.define(UNLESS_RECOMPUTED, "(Tensor h) -> Tensor")


@torch.library.impl(UNLESS_RECOMPUTED, "CompositeExplicitAutograd")
def _unless_recomputed(h: Tensor) -> Tensor:
    refuse_recomputation()
    return h.clone()


@torch.library.register_fake(UNLESS_RECOMPUTED)  # type: ignore[untyped-decorator]
def _unless_recomputed_fake(h: Tensor) -> Tensor:
    return torch.empty_like(h)


torch.library.register_autograd(UNLESS_RECOMPUTED, lambda ctx, gradient: gradient)


def unless_recomputed(h: Tensor) -> Tensor:
    """What is handed on [..., r], as it is: for compiled code, which would not ask ``refuse_recomputation`` itself."""
    same: Tensor = torch.ops.reslora_kernels.unless_recomputed(h)
    return same


def _stack(a_cat: Tensor) -> Stack:
    return (a_cat,) if a_cat.shape[0] else ()


def _apart(handed: Tensor, u: Tensor) -> Tensor:
    """What is handed on, in memory of its own: outputs of an op share none."""
    shared = handed.untyped_storage().data_ptr() == u.untyped_storage().data_ptr()
    return handed.clone(memory_format=torch.contiguous_format) if shared else handed.contiguous()


@torch.library.register_fake(BACKWARD)  # type: ignore[untyped-decorator]
def _backward_fake(
    dy: Tensor, dhanded: Tensor | None, x: Tensor, weight: Tensor, a_cat: Tensor, b_cat: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, need_dx, need_da, need_db, need_dresidual, _backend = rest
    rows = dy.shape[0]
    return (
        dy.new_empty(rows, a_cat.shape[1]) if need_dx else dy.new_empty(0),
        torch.empty_like(a_cat, memory_format=torch.contiguous_format) if need_da else a_cat.new_empty(0),
        torch.empty_like(b_cat, memory_format=torch.contiguous_format) if need_db else b_cat.new_empty(0),
        dy.new_empty(rows, b_cat.shape[1]) if need_dresidual else dy.new_empty(0),
    )


def forward(operands: Operands, side: SideChannel, p: float, backend: str) -> Outputs:
    """The forward pass through the dispatcher, on x [M, K], residual [M, R_b] and a dense weight."""
    x, weight, bias, residual, seed, a, b, _ = operands
    a_cat = rows(a) if a else weight.new_empty(0, weight.shape[1])
    y, handed, u = torch.ops.reslora_kernels.lora_linear_forward(
        x,
        weight,
        bias,
        a_cat,
        columns(b),
        residual,
        seed,
        side.c,
        side.scaling,
        p,
        side.hand_start,
        side.hand_stop,
        backend,
    )
    return Outputs(y, handed if side.hand_stop > side.hand_start else None, u if a else None)


def backward(
    dy: Tensor,
    dhanded: Tensor | None,
    x: Tensor | None,
    weight: Tensor,
    a: Stack,
    b: Stack,
    u: Tensor | None,
    side: SideChannel,
    dropout: Dropout | None,
    needs: Needs,
    backend: str,
) -> Gradients:
    """The backward pass through the dispatcher."""
    seed, p = (None, 0.0) if dropout is None else dropout
    none, a_cat = dy.new_empty(0), rows(a) if a else weight.new_empty(0, weight.shape[1])
    gradients = torch.ops.reslora_kernels.lora_linear_backward(
        dy, dhanded, none if x is None else x, weight, a_cat, columns(b), none if u is None else u, seed,
        side.c, side.scaling, p, side.hand_start, *needs, backend,
    )  # fmt: skip
    return Gradients(*(gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)))


def in_plain_operations(operands: Operands, side: SideChannel, p: float) -> tuple[Tensor, Tensor | None]:
    """y [..., N] and h[..., hand_start:hand_stop] or None, as ``ops.lora_linear`` has them; the weight is dense.

    For functorch's vmap, grad, jvp and jacrev, none of the operations is in place, and no backend is asked: kernels and
    in-place writes have no rules for batched tensors and dual numbers.
    """
    x, weight, bias, residual, seed, a_stack, b_stack, _ = operands
    dropout = None if seed is None else Dropout(seed, p)
    b = torch.cat([part.to(x.dtype) for part in b_stack], 1)
    u, handed = None if residual is None else residual.to(x.dtype), None
    if a_stack:
        dropped = x if dropout is None else drop(x.reshape(-1, x.shape[-1]), dropout).reshape(x.shape)
        h = F.linear(dropped, torch.cat([part.to(x.dtype) for part in a_stack]))
        own = h[..., : b.shape[1]] * side.c
        u = own if u is None else own + u
        handed = h[..., side.hand_start : side.hand_stop] if side.hands_on else None
    assert u is not None
    return F.linear(x, weight, bias) + side.scaling * F.linear(u, b), handed

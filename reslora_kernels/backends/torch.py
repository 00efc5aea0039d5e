"""PyTorch library calls only: runs wherever torch does, and is the form every fused kernel has to beat.

The low-rank product is written first and the frozen matmul is added on top of it in place, so that the BLAS reads the
output under cover of its arithmetic and no [M, N] tensor is written twice. Operators are counted: at small sizes each
of them costs as much as its arithmetic, and ``tests/test_host.py`` holds their number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dropout as masks
from ..dropout import Dropout
from ..side_channel import Gradients, Needs, Outputs, SideChannel

FEW_ROWS = 32  # up to here dB [N, R] is written as it is; with more rows its transpose is so much faster to compute


def describe() -> str:
    return f"PyTorch {torch.__version__} library calls"


def unavailable_reason() -> str | None:
    return None


def unsupported_reason(x: Tensor, weight: Tensor, rank: int) -> str | None:
    return None


def explain(x: Tensor, weight: Tensor, rank: int) -> str:
    return "the low-rank product first, the frozen matmul on top of it in place"


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    residual: Tensor | None,
    side: SideChannel,
    dropout: Dropout | None,
) -> Outputs:
    """y = x Wᵀ + b + s u Bᵀ with h = D(x) Aᵀ and u = c h[:, :R_b] + residual.

    Args:
        x: [M, K].
        weight: [N, K], same dtype as x.
        bias: [N] or None.
        a: [R_a, K], any floating dtype; with R_a = 0 u is ``residual``.
        b: [N, R_b], R_b <= R_a.
        residual: [M, R_b] or None.

    Returns:
        y [M, N]; h[:, hand_start:hand_stop], which may share memory with u, or None; u [M, R_b], or None where R_a is
        0. All in x's dtype.
    """
    dtype = x.dtype
    b = _in(b, dtype)
    if residual is not None:
        residual = _in(residual, dtype)
    if not a.shape[0]:
        assert residual is not None
        y = product_then_matmul(residual, b.t(), side.scaling, bias, x, weight.t())
        return Outputs(y, None, None)
    dropped = x if dropout is None else masks.drop(x, dropout)
    h = torch.mm(dropped, _in(a, dtype).t())
    u = own = h if a.shape[0] == b.shape[1] else h[:, : b.shape[1]]
    if residual is not None:
        u = torch.add(residual, own, alpha=side.c)
    elif side.c != 1:
        u = own * side.c
    elif own is not h:
        u = own.contiguous()  # or h would be kept for backward as a whole
    y = product_then_matmul(u, b.t(), side.scaling, bias, x, weight.t())
    if not side.hands_on:
        return Outputs(y, None, u)
    width = side.hand_stop - side.hand_start
    return Outputs(y, h if width == h.shape[1] else h[:, side.hand_start : side.hand_stop], u)


def backward(
    dy: Tensor,
    dhanded: Tensor | None,
    x: Tensor | None,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    u: Tensor | None,
    side: SideChannel,
    dropout: Dropout | None,
    needs: Needs,
) -> Gradients:
    """Gradients dx [M, K], da [R_a, K], db [N, R_b], dresidual [M, R_b]; None for one that is not needed.

    dy is [M, N], dhanded [M, hand_stop - hand_start] or None. x and u may be None where da and db are not needed.
    """
    low, rank = _in(b, dy.dtype), a.shape[0]
    db = da = dx = du = None
    if needs.db:
        assert u is not None
        db = _outer(dy, u, low, side.scaling, b.dtype)
    if needs.dresidual or (rank and (needs.dx or needs.da)):
        du = scaled_product(dy, low, side.scaling)
    dresidual = du if needs.dresidual else None
    if not rank:
        return Gradients(torch.mm(dy, weight) if needs.dx else None, None, db, dresidual)
    if not (needs.dx or needs.da):
        return Gradients(None, None, db, dresidual)
    assert du is not None
    dh = _gradient_of_h(du, dhanded, rank, side)
    mask = None if dropout is None else masks.keep_mask(dropout.seed, dy.shape[0], a.shape[1], dropout.p)
    if needs.da:
        assert x is not None
        da = _in(torch.mm(dh.t(), _masked(x, mask, dropout)), a.dtype)
    if needs.dx:
        dx = _masked(torch.mm(dh, _in(a, dy.dtype)), mask, dropout).addmm_(dy, weight)
    return Gradients(dx, da, db, dresidual)


def product_then_matmul(t: Tensor, b: Tensor, scale: float, bias: Tensor | None, x: Tensor, w: Tensor) -> Tensor:
    """scale t b + bias + x w: the low-rank product [M, R] [R, N], then the matmul [M, K] [K, N] on it in place."""
    y = scaled_product(t, b, scale) if bias is None else torch.addmm(bias, t, b, alpha=scale)
    return y.addmm_(x, w)


def scaled_product(t: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale t b, in one pass and rounded once."""
    if scale == 1:
        return torch.mm(t, b)
    return t.new_empty(t.shape[0], b.shape[1]).addmm_(t, b, beta=0, alpha=scale)  # beta 0: what is there is not read


def _masked(x: Tensor, mask: Tensor | None, dropout: Dropout | None) -> Tensor:
    return x if mask is None or dropout is None else masks.apply_mask(x, mask, dropout.p)


def _outer(dy: Tensor, u: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """dB = s dyᵀ u [N, R_b]; ``b`` is B in dy's dtype."""
    if dy.shape[0] <= FEW_ROWS:
        return _in(torch.addmm(b, dy.t(), u, beta=0, alpha=scaling), dtype)
    return scaled_product(u.t(), dy, scaling).t().to(dtype).contiguous()


def _gradient_of_h(du: Tensor, dhanded: Tensor | None, rank: int, side: SideChannel) -> Tensor:
    """dh = c pad(du) + dh_out, [M, R_a]. A fresh tensor unless it equals du."""
    c, own = side.c, du.shape[1]
    if own == rank and dhanded is not None and dhanded.shape[1] == rank:
        return torch.add(dhanded, du, alpha=c)
    own_part = du if c == 1 else du * c
    if dhanded is None:
        return own_part if own == rank else torch.nn.functional.pad(own_part, (0, rank - own))
    if side.hand_start == own and side.hand_stop == rank:
        return torch.cat((own_part, dhanded), 1)
    dh = du.new_zeros(du.shape[0], rank)
    dh[:, :own] = own_part
    dh[:, side.hand_start : side.hand_stop] += dhanded
    return dh


def _in(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype: without a call where it is that already."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)

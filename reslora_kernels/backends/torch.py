"""PyTorch library calls only: runs wherever torch does, and is the form every fused kernel has to beat.

The low-rank product is written first and the frozen matmul is added on top of it in place, so that the BLAS reads the
output under cover of its arithmetic and no [M, N] tensor is written twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dropout


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
    a_cat: Tensor,
    b_cat: Tensor,
    residual: Tensor | None,
    seed: Tensor | None,
    c: float,
    scaling: float,
    p: float,
    hand_start: int,
    hand_stop: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = x Wᵀ + b + s u B_catᵀ with h = D(x) A_catᵀ and u = c h[:, :R_b] + residual.

    Args:
        x: [M, K].
        weight: [N, K], same dtype as x.
        bias: [N] or None.
        a_cat: [R_a, K], any floating dtype; with R_a = 0 u is ``residual``.
        b_cat: [N, R_b], R_b <= R_a.
        residual: [M, R_b] or None.
        seed: int64 [] for dropout with probability ``p``, or None for no dropout.
        hand_start: first column of h to hand on; ``hand_stop`` is one past the last.

    Returns:
        y [M, N], h[:, hand_start:hand_stop], u [M, R_b], all in x's dtype; u is empty, [0, R_b], where R_a is 0.
    """
    a_cat, b_cat = a_cat.to(x.dtype), b_cat.to(x.dtype)
    if not len(a_cat):
        assert residual is not None
        y = product_then_matmul(residual.to(x.dtype), b_cat.T, scaling, bias, x, weight.T)
        return y, x.new_empty(x.shape[0], 0), x.new_empty(0, b_cat.shape[1])
    dropped = x if seed is None else dropout.apply_mask(x, dropout.keep_mask(seed, x.shape[0], x.shape[1], p), p)
    h = dropped @ a_cat.T
    u = h[:, : b_cat.shape[1]]
    if c != 1:
        u = u * c
    if residual is not None:
        u = u + residual.to(x.dtype)
    handed = h[:, hand_start:hand_stop].clone(memory_format=torch.contiguous_format)
    return product_then_matmul(u, b_cat.T, scaling, bias, x, weight.T), handed, u.contiguous()


def backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients dx [M, K], da_cat [R_a, K], db_cat [N, R_b], dresidual [M, R_b]; one not needed comes back empty, [0].

    dy is [M, N], dhanded [M, hand_stop - hand_start] or None; x, u are read only where their product is needed.
    """
    dx, dresidual, da, db = dy.new_empty(0), dy.new_empty(0), a_cat.new_empty(0), b_cat.new_empty(0)
    if need_db:
        db = (u.T @ dy).mul_(scaling).T.to(b_cat.dtype).contiguous()  # faster than dyᵀ u
    if not (need_dx or need_da or need_dresidual):
        return dx, da, db, dresidual
    if not len(a_cat):
        dresidual = (dy @ b_cat.to(dy.dtype)).mul_(scaling) if need_dresidual else dresidual
        return dy @ weight if need_dx else dx, da, db, dresidual
    du = (dy @ b_cat.to(dy.dtype)).mul_(scaling)
    if need_dresidual:
        dresidual = du
    if need_dx or need_da:
        dh = _gradient_of_h(du, dhanded, a_cat.shape[0], c, hand_start)
        mask = None if seed is None else dropout.keep_mask(seed, dy.shape[0], a_cat.shape[1], p)
        if need_da:
            da = (dh.T @ (x if mask is None else dropout.apply_mask(x, mask, p))).to(a_cat.dtype)
        if need_dx:
            if mask is None:
                dx = product_then_matmul(dh, a_cat.to(dy.dtype), 1.0, None, dy, weight)
            else:
                dx = dropout.apply_mask(dh @ a_cat.to(dy.dtype), mask, p).addmm_(dy, weight)
    return dx, da, db, dresidual


def product_then_matmul(t: Tensor, b: Tensor, scale: float, bias: Tensor | None, x: Tensor, w: Tensor) -> Tensor:
    """scale t b + bias + x w: the low-rank product [M, R] [R, N], then the matmul [M, K] [K, N] on it in place."""
    if scale == 1 and bias is None:
        return (t @ b).addmm_(x, w)
    y = (t @ b).mul_(scale) if bias is None else torch.addmm(bias, t, b, alpha=scale)
    return y.addmm_(x, w)


def _gradient_of_h(du: Tensor, dhanded: Tensor | None, rank: int, c: float, hand_start: int) -> Tensor:
    """dh = c pad(du) + dh_out, [M, R_a]. A fresh tensor unless it equals du."""
    if dhanded is None and c == 1 and du.shape[1] == rank:
        return du
    dh = du.new_zeros(du.shape[0], rank)
    dh[:, : du.shape[1]] = du if c == 1 else du * c
    if dhanded is not None:
        dh[:, hand_start : hand_start + dhanded.shape[1]] += dhanded
    return dh

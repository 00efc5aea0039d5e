"""PyTorch library calls only: runs wherever torch does, and is the form every fused kernel has to beat.

The low-rank product is written first and the frozen matmul is added on top of it in place, so that the BLAS reads the
output under cover of its arithmetic and no [M, N] tensor is written twice. Operators are counted: at small sizes each
of them costs as much as its arithmetic, and ``tests/test_host.py`` holds their number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dropout as masks
from .. import host
from ..dropout import Dropout
from ..side_channel import Gradients, Needs, Outputs, SideChannel, Stack, columns, height, rows
from . import kinds, select

FEW_VALUES = 1 << 18  # up to here another read of x costs less than another operator
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
    a: Stack,
    b: Stack,
    residual: Tensor | None,
    side: SideChannel,
    dropout: Dropout | None,
) -> Outputs:
    """y = x Wᵀ + b + s u Bᵀ with h = D(x) Aᵀ and u = c h[:, :R_b] + residual.

    Args:
        x: [M, K].
        weight: [N, K], same dtype as x.
        bias: [N] or None.
        a: matrices [r, K], R_a rows in all, any floating dtype; with none of them u is ``residual``.
        b: matrices [N, r], R_b <= R_a columns in all.
        residual: [M, R_b] or None.

    Returns:
        y [M, N]; h[:, hand_start:hand_stop], which may share memory with u, or None; u [M, R_b], or None where R_a is
        0. All in x's dtype.
    """
    low_b = _in(columns(b), x.dtype)
    residual = None if residual is None else _in(residual, x.dtype)
    if not a:
        assert residual is not None
        return Outputs(product_then_matmul(residual, low_b.t(), side.scaling, bias, x, weight.t()), None, None)
    dropped = x if dropout is None else _dropped(x, dropout)
    u, handed = _projected(dropped, a, low_b.shape[1], residual, side)
    return Outputs(product_then_matmul(u, low_b.t(), side.scaling, bias, x, weight.t()), handed, u)


def _projected(
    x: Tensor, a: Stack, own: int, residual: Tensor | None, side: SideChannel
) -> tuple[Tensor, Tensor | None]:
    """u, and what of h is handed on, by as few operators as they can be had."""
    c, _, start, stop = side
    ahead = None
    if x.numel() <= FEW_VALUES:
        count = matrices_of_u(a, own, side)
        if count < len(a):  # what is handed on is a product of its own
            ahead, stop = torch.mm(x, _in(rows(a[count:]), x.dtype).t()), 0
            a = a[:count]
    low = _in(rows(a), x.dtype).t()
    if residual is not None and not stop and low.shape[1] == own:
        return torch.addmm(residual, x, low, alpha=c), ahead
    h = torch.mm(x, low)
    mine = h if h.shape[1] == own else h[:, :own]
    if residual is not None:
        u = torch.add(residual, mine, alpha=c)
    elif c != 1:
        u = mine * c
    else:
        u = mine.contiguous()  # a slice would keep the whole of h for backward
    if stop:
        ahead = h if stop - start == h.shape[1] else h[:, start:stop]
    return u, ahead


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
    onto: Tensor | None = None,
) -> Gradients:
    """Gradients dx [M, K], da [R_a, K], db [N, R_b], dresidual [M, R_b]; None for one that is not needed.

    dy is [M, N], dhanded [M, hand_stop - hand_start] or None. x and u may be None where da and db are not needed.
    To ``onto`` [M, K], where it is given and there is no dropout, dx is added, in its memory.
    """
    whole_b = columns(b)
    low_b = _in(whole_b, dy.dtype)
    db = da = dx = du = None
    if needs.db:
        assert u is not None
        db = _outer(dy, u, low_b, side.scaling, whole_b.dtype)
    if needs.dresidual or (a and (needs.dx or needs.da)):
        du = scaled_product(dy, low_b, side.scaling, u)
    dresidual = du if needs.dresidual else None
    if not a:
        plain = torch.mm if onto is None else onto.addmm_
        return Gradients(plain(dy, weight) if needs.dx else None, None, db, dresidual)
    if not (needs.dx or needs.da):
        return Gradients(None, None, db, dresidual)
    assert du is not None
    whole_a = rows(a)
    dh = gradient_of_h(du, dhanded, whole_a.shape[0], side)
    mask = None if dropout is None else _keep_mask(dropout, dy.shape[0], whole_a.shape[1])
    if needs.da:
        assert x is not None
        da = _in(torch.mm(dh.t(), _masked(x, mask, dropout)), whole_a.dtype)
    if needs.dx:
        low = torch.mm if onto is None else onto.addmm_
        dx = _masked(low(dh, _in(whole_a, dy.dtype)), mask, dropout).addmm_(dy, weight)
    return Gradients(dx, da, db, dresidual)


def composed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Stack,
    b: Stack,
    residual: Tensor | None,
    side: SideChannel,
    dropout: Dropout | None,
    own: int,
) -> tuple[Tensor, Tensor | None]:
    """y and what is handed on, as operations that autograd and torch.compile know; arguments as for ``forward``.

    It moves more bytes than ``forward`` and ``backward`` and asks less of Python: for calls so small that this counts,
    and for torch.compile, which makes code of its own from it. ``own`` is ``matrices_of_u``.
    """
    dtype, linear, (c, scaling, start, stop) = x.dtype, torch.nn.functional.linear, side
    y, low_b = linear(x, weight, bias), _in(columns(b), dtype).t()
    if residual is not None:
        residual = _in(residual, dtype)
    if not a:
        assert residual is not None
        return y.addmm_(residual, low_b, alpha=scaling), None
    x, handed = x if dropout is None else _dropped(x, dropout), None
    if own < len(a):
        handed, stop = linear(x, _in(rows(a[own:]), dtype)), 0
        a = a[:own]
    low_a = _in(rows(a), dtype)
    if residual is not None and not stop and low_a.shape[0] == low_b.shape[0]:
        return y.addmm_(torch.addmm(residual, x, low_a.t(), alpha=c), low_b, alpha=scaling), handed
    h = linear(x, low_a)
    u = h if h.shape[1] == low_b.shape[0] else h[:, : low_b.shape[0]]
    if stop:
        handed = h if stop - start == h.shape[1] else h[:, start:stop]
    if residual is None:
        return y.addmm_(u, low_b, alpha=scaling * c), handed
    return y.addmm_(torch.add(residual, u, alpha=c), low_b, alpha=scaling), handed


def for_few_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Stack,
    b: Stack,
    residual: Tensor | None,
    side: SideChannel,
    *_: object,
) -> tuple[Tensor, Tensor | None]:
    """``composed`` without dropout, as plain products and sums: for torch.compile where calls cost more than sums.

    A product that adds to a tensor takes as long there as two that do not, and the sums of a layer become one pass.
    They are written as differences, since of a sum with a product torch.compile makes a product that adds.
    """
    dtype, (c, scaling, start, stop) = x.dtype, side
    low_b = _summed(b, 1, dtype).t()
    h = None if not a else torch.mm(x, _summed(a, 0, dtype).t())
    u = residual = None if residual is None else _in(residual, dtype)
    if h is not None:
        u = h if h.shape[1] == low_b.shape[0] else h[:, : low_b.shape[0]]
        u = u if c == 1 else u * c
        u = u if residual is None else torch.sub(u, residual, alpha=-1)
    assert u is not None
    low = torch.mm(u, low_b) * scaling
    y = torch.sub(torch.nn.functional.linear(x, weight), low if bias is None else low + bias, alpha=-1)
    return y, h[:, start:stop] if h is not None and stop else None


def _summed(matrices: Stack, dim: int, dtype: torch.dtype) -> Tensor:
    """``rows`` or ``columns``; of a few matrices as a sum, which is one pass together with what else is summed then."""
    if len(matrices) == 1 or len(matrices) > 4:
        return _in(columns(matrices) if dim else rows(matrices), dtype)
    total, start = sum([matrix.shape[dim] for matrix in matrices]), 0
    padded = []
    for matrix in matrices:
        around = (start, total - start - matrix.shape[dim])
        padded.append(torch.nn.functional.pad(_in(matrix, dtype), around if dim == 1 else (0, 0, *around)))
        start += matrix.shape[dim]
    return sum(padded[1:], padded[0])


def matrices_of_u(a: Stack, own: int, side: SideChannel) -> int:
    """How many of the matrices make u, of ``own`` columns, where the others are just what is handed on; else all."""
    if side.hand_start == own:
        for index in range(1, len(a)):
            if height(a[:index]) == own and height(a) == side.hand_stop:
                return index
    return len(a)


def product_then_matmul(
    t: Tensor, b: Tensor, scale: float, bias: Tensor | None, x: Tensor, w: Tensor, onto: Tensor | None = None
) -> Tensor:
    """scale t b + bias + x w: the low-rank product [M, R] [R, N], then the matmul [M, K] [K, N] on it in place.

    With ``onto`` [M, N] in place of a bias all of it is added to that, in its memory.
    """
    if onto is not None:
        return onto.addmm_(t, b, alpha=scale).addmm_(x, w)
    y = scaled_product(t, b, scale) if bias is None else torch.addmm(bias, t, b, alpha=scale)
    return y.addmm_(x, w)


def scaled_product(t: Tensor, b: Tensor, scale: float, like: Tensor | None = None) -> Tensor:
    """scale t b, in one pass and rounded once. ``like``: a tensor of its shape and dtype, whose values are not used."""
    if scale == 1:
        return torch.mm(t, b)
    if like is None:
        like = t.new_empty(1, 1)  # and no result in place, which a transform that maps b alone could not hold in it
    return torch.addmm(like, t, b, beta=0, alpha=scale)


def _keep_mask(dropout: Dropout, rows: int, columns: int) -> Tensor:
    """``dropout.keep_mask``, by one kernel or one compiled pass where there is one."""
    if _kernel_draws(dropout.seed):
        from ..kernels.device import keep_mask

        with kinds.on_device(dropout.seed):
            return keep_mask(dropout.seed, rows, columns, dropout.p)
    mask = host.keep_mask(dropout.seed, rows, columns, masks.threshold(dropout.p))
    return masks.keep_mask(dropout.seed, rows, columns, dropout.p) if mask is None else mask


def _kernel_draws(seed: Tensor) -> bool:
    """Whether Triton serves the seed's device, and no one is to see the mask's operations, to trace or change them."""
    seen = torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._len_torch_dispatch_stack()
    if seen or torch._C._are_functorch_transforms_active() or not seed.is_cuda:
        return False
    return select.unavailable_reason("triton") is None


def _dropped(x: Tensor, dropout: Dropout) -> Tensor:
    return masks.apply_mask(x, _keep_mask(dropout, *x.shape), dropout.p)


def _masked(x: Tensor, mask: Tensor | None, dropout: Dropout | None) -> Tensor:
    return x if mask is None or dropout is None else masks.apply_mask(x, mask, dropout.p)


def _outer(dy: Tensor, u: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """dB = s dyᵀ u [N, R_b]; ``b`` is B in dy's dtype."""
    if dy.shape[0] <= FEW_ROWS:
        return _in(torch.addmm(b, dy.t(), u, beta=0, alpha=scaling), dtype)
    return scaled_product(u.t(), dy, scaling).t().to(dtype).contiguous()


def gradient_of_h(du: Tensor, dhanded: Tensor | None, rank: int, side: SideChannel) -> Tensor:
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
    dh.narrow(1, 0, own).copy_(own_part)  # by methods, which a transform that maps them knows
    dh.narrow(1, side.hand_start, dhanded.shape[1]).add_(dhanded)
    return dh


def _in(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype: without a call where it is that already."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)

"""ResLoRA (arXiv 2402.18039) as plain equations: loops and all, obviously right, not fast. Tests check against it.

A chain is L layers; index n runs over it. xs[n] is [..., K], weights[n] [N, K], biases[n] [N] or None,
lora_As[n] [r, K], lora_Bs[n] [N, r]; M is the product of the leading dimensions. Autograd differentiates all this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Dropout = Callable[[int, Tensor], Tensor]


def earlier(pre_num: int, n: int) -> int:
    """min(m, n) of Eqs. 3 and 4: how many earlier blocks layer n uses; pre_num = -1 means all."""
    return n if pre_num == -1 else min(pre_num, n)


def low_rank_term(
    shortcut: str,
    pre_num: int,
    scaling: float,
    n: int,
    dropped: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    gates: Sequence[Tensor] | None = None,
) -> Tensor:
    """What layer n adds to its frozen output, [..., N]; ``dropped[n]`` is D_n(x_n).

    Row k of ``gates[n]``, [1 + earlier ones, 1 or r], is what the k-th term is multiplied by between A and B; its own
    is the first. None means 1.
    """

    def gated(k: int, h: Tensor) -> Tensor:
        return h if gates is None else h * gates[n][k]

    if shortcut == "none":  # Eq. 1
        return scaling * (dropped[n] @ a[n].T) @ b[n].T
    if shortcut == "input":  # Eq. 2, with x_{-1} := x_0
        inputs = dropped[n], dropped[max(n - 1, 0)]
        return scaling * _sum([gated(k, x @ a[n].T) for k, x in enumerate(inputs)]) @ b[n].T
    window = range(earlier(pre_num, n) + 1)
    if shortcut == "block":  # Eq. 3
        return scaling * _sum([gated(k, dropped[n] @ a[n - k].T) @ b[n - k].T for k in window])
    if shortcut == "middle":  # Eq. 4
        return scaling * _sum([gated(k, dropped[n - k] @ a[n - k].T) for k in window]) @ b[n].T
    raise ValueError(f"shortcut must be 'none', 'input', 'block' or 'middle', got {shortcut!r}")


def chain_forward(
    shortcut: str,
    pre_num: int,
    scaling: float,
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    dropout: Dropout | None = None,
    gates: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Outputs y_n = x_n W_nᵀ + b_n + low-rank term, [..., N] each. ``dropout(n, x)`` is D_n(x_n); None means p = 0."""
    dropped = [x if dropout is None else dropout(n, x) for n, x in enumerate(xs)]
    return [
        torch.nn.functional.linear(x, weights[n], biases[n])
        + low_rank_term(shortcut, pre_num, scaling, n, dropped, lora_As, lora_Bs, gates)
        for n, x in enumerate(xs)
    ]


def exact_update(
    shortcut: str, pre_num: int, scaling: float, n: int, a: Sequence[Tensor], b: Sequence[Tensor]
) -> Tensor:
    """ΔW_n [N, K] of ``none`` and ``block``, which merge without loss."""
    if shortcut not in ("none", "block"):
        raise ValueError(f"shortcut must be 'none' or 'block' to merge exactly, got {shortcut!r}")
    window = range(earlier(pre_num, n) + 1 if shortcut == "block" else 1)
    return scaling * _sum([b[n - k] @ a[n - k] for k in window])


def merge_input(
    shortcut: str, pre_num: int, scaling: float, norms: Sequence[float], a: Sequence[Tensor], b: Sequence[Tensor]
) -> list[Tensor]:
    """ΔW_n by input norms (merge_bi). norms[n] is f_n: of x_n for ``input``, of x_n A_nᵀ for ``middle``."""
    updates = []
    for n in range(len(a)):
        if shortcut == "input":
            alpha = norms[n - 1] / norms[n] if n else 1.0
        else:
            alpha = sum(norms[n - k] / norms[n] for k in range(1, earlier(pre_num, n) + 1))
        updates.append(scaling * (1 + alpha) * b[n] @ a[n])
    return updates


def merge_weights_input(
    scaling: float, weights: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor]
) -> list[Tensor]:
    """ΔW_n of ``input`` by weight norms (merge_bw): α_n = f*_{n-2} / f*_{n-1}, α_0 = α_1 = 1."""
    updates: list[Tensor] = []
    norms: list[Tensor] = []
    for n in range(len(a)):
        alpha = norms[n - 2] / norms[n - 1] if n >= 2 else 1.0
        updates.append(scaling * (1 + alpha) * b[n] @ a[n])
        norms.append((weights[n] + updates[n]).norm())
    return updates


def merge_weights_middle(
    pre_num: int, scaling: float, norms: Sequence[float], a: Sequence[Tensor], b: Sequence[Tensor]
) -> list[Tensor]:
    """ΔW_n of ``middle`` by weights: earlier A added in proportion to the norms f of x."""
    return [
        scaling * b[n] @ (a[n] + sum(norms[n - k] / norms[n] * a[n - k] for k in range(1, earlier(pre_num, n) + 1)))
        for n in range(len(a))
    ]


def merge_least_squares(
    shortcut: str,
    pre_num: int,
    scaling: float,
    batches: Sequence[Sequence[Tensor]],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    regularization: float = 1e-6,
) -> list[Tensor]:
    """ΔW_n = s B_n A*_n with A*_n = A_n + T_n (G_n + λI)⁻¹. batches[t][n] is x_n of calibration batch t."""
    updates = []
    for n in range(len(a)):
        if n == 0 or (shortcut == "middle" and pre_num == 0):
            updates.append(scaling * b[n] @ a[n] * (2 if shortcut == "input" else 1))
            continue
        x = torch.cat([batch[n].flatten(0, -2) for batch in batches])
        if shortcut == "input":
            v = torch.cat([batch[n - 1].flatten(0, -2) for batch in batches]) @ a[n].T
        else:
            window = range(1, earlier(pre_num, n) + 1)
            v = torch.cat([_sum([batch[n - k].flatten(0, -2) @ a[n - k].T for k in window]) for batch in batches])
        gram = x.T @ x
        gram = gram + regularization * gram.diagonal().mean() * torch.eye(len(gram), dtype=x.dtype, device=x.device)
        updates.append(scaling * b[n] @ (a[n] + torch.linalg.solve(gram, x.T @ v).T))
    return updates


def _sum(terms: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum(0)

"""Least squares layer by layer: each is fitted on the model whose earlier layers are merged already.

With x̃_n the input that layer n gets there, and x_n, v_n the input and the shortcut's part of u_n in the unmerged model,

    A*_n = A_n + Σ v_nᵀ x̃_n (G̃_n + λI)⁻¹,   G̃_n = Σ x̃_nᵀ x̃_n,

and, where the rank may grow, what earlier merges did to the input is made up for as far as x̃_n tells it:

    D_n = (W_n + s B_n A_n) Σ (x_n - x̃_n)ᵀ x̃_n (G̃_n + λI)⁻¹,   ΔW_n = s B_n A*_n + P Pᵀ D_n,

P [N, extra_rank] being the main directions of x̃_n D_nᵀ: no correction of that rank comes nearer to x̃_n D_nᵀ.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .chain import Chain
from .execution import call_with, undisturbed
from .linear import ResLoRALinear
from .statistics import LayerStatistics
from .updates import LowRankUpdate, cholesky_factor, relative_error, updates_of_chain

OVERSAMPLING, ITERATIONS = 8, 4  # of the randomised decomposition that finds P


def sequential_updates(
    model: nn.Module, chains: Sequence[Chain], calibration: Iterable[Any], regularization: float, extra_rank: int
) -> dict[ResLoRALinear, LowRankUpdate]:
    """One update per layer, position by position, with all chains side by side.

    Raises:
        ValueError: a layer's moments cannot be solved for (see ``cholesky_factor``), or ``calibration`` runs once only.
    """
    updates: dict[ResLoRALinear, LowRankUpdate] = {}
    with undisturbed(model):
        for n in range(max(len(chain) for chain in chains)):
            current = [chain.layers[n] for chain in chains if len(chain) > n]
            if n == 0:
                updates |= {layer: updates_of_chain(Chain([layer]), "exact", None, 0.0)[0] for layer in current}
                continue
            seen = {layer: _Seen(layer, extra_rank) for layer in current}
            for batch in calibration:
                unmerged = _captured(model, current, batch)
                with _replaced(updates):
                    merged = _captured(model, current, batch)
                for layer in current:
                    for (x, v), (x_merged, _) in zip(unmerged[layer], merged[layer], strict=True):
                        seen[layer].add(x, x_merged, v)
            for layer in current:
                if not seen[layer].moments.calls:
                    raise ValueError("calibration gave no batch on a second run: with sequential=True pass a list")
                name = layer.chain.name if layer.chain is not None else ""
                updates[layer] = seen[layer].update(regularization, f"layer {n} of chain {name!r}")
    return updates


class _Seen:
    """Sums over the calibration batches of one layer; ``drift``, Σ (x_n - x̃_n)ᵀ x̃_n, where the rank may grow."""

    def __init__(self, layer: ResLoRALinear, extra_rank: int) -> None:
        self.layer, self.extra_rank = layer, extra_rank
        self.moments = LayerStatistics(layer.config, layer.whole_A, second_moments=True)
        assert self.moments.gram is not None
        self.drift = torch.zeros_like(self.moments.gram) if extra_rank else None

    def add(self, x: Tensor, x_merged: Tensor, v: Tensor | None) -> None:
        """One batch: x [..., K] in the unmerged and the merged model, v [..., r] in the unmerged one."""
        self.moments.observe(x_merged, self.layer.whole_A, v)
        if self.drift is not None:
            x, x_merged = (t.detach().reshape(-1, t.shape[-1]).to(self.drift.dtype) for t in (x, x_merged))
            self.drift.addmm_((x - x_merged).T, x_merged)

    def update(self, regularization: float, where: str) -> LowRankUpdate:
        layer, moments = self.layer, self.moments
        assert moments.gram is not None and moments.cross is not None
        a, b, s = layer.whole_A.detach().double(), layer.whole_B.detach().double(), layer.scaling
        factor = cholesky_factor(moments.gram, regularization, where)
        fitted = a + torch.cholesky_solve(moments.cross.double().T, factor).T
        error = relative_error(moments, a, fitted, b)
        if self.drift is not None:
            drift = torch.cholesky_solve(self.drift.double().T, factor).T
            correction = layer.dense_weight(torch.float32).double() @ drift + s * b @ (a @ drift)
            p = _main_directions(correction @ factor, self.extra_rank)
            fitted, b = torch.cat([fitted, p.T @ correction / s]), torch.cat([b, p], dim=1)
        wide = torch.promote_types(layer.lora_A.dtype, torch.float32)
        return LowRankUpdate(fitted.to(wide), b.to(wide), s, "least_squares", error)


def _main_directions(matrix: Tensor, count: int) -> Tensor:
    """The first ``count`` left singular vectors [N, count] of a matrix, or as many as it has."""
    most = min(matrix.shape)
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(0)
        u = torch.svd_lowrank(matrix, min(count + OVERSAMPLING, most), niter=ITERATIONS)[0]
    return u[:, : min(count, most)]


class _Captured:
    """An observer that keeps x and v of every call of one batch."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor | None]] = []

    def observe(self, x: Tensor, lora_A: Tensor, residual: Tensor | None) -> None:
        self.calls.append((x, residual))


def _captured(
    model: nn.Module, layers: list[ResLoRALinear], batch: Any
) -> dict[ResLoRALinear, list[tuple[Tensor, Tensor | None]]]:
    observers = {layer: _Captured() for layer in layers}
    try:
        for layer, observer in observers.items():
            layer.observer = observer
        call_with(model, batch)
    finally:
        for layer in layers:
            layer.observer = None
    return {layer: observer.calls for layer, observer in observers.items()}


@contextmanager
def _replaced(updates: dict[ResLoRALinear, LowRankUpdate]) -> Iterator[None]:
    """Let the updates found so far stand in for their layers' shortcuts."""
    try:
        for layer, update in updates.items():
            layer.replacement = (update.a, update.b)
        yield
    finally:
        for layer in updates:
            layer.replacement = None

"""From a trained shortcut to a plain low-rank update ΔW = s B A, by every method of the merge table.

Paper: ResLoRA (arXiv 2402.18039), Section 3.3. ``least_squares`` is this project's own: it replaces A_n by the matrix
that reproduces the shortcut best from the layer's own input,

    A*_n = A_n + T_n (G_n + λI)⁻¹,   G_n = Σ x_nᵀ x_n,   T_n = Σ v_nᵀ x_n,   λ = regularization * mean(diag G_n)

with v_n the shortcut's part of u_n. The rank stays r.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from ..adapt.record import Record, refuse_incomplete
from ..layers.adapter import AdapterLayer
from ..layers.chain import Chain
from ..layers.shortcuts import hands_on, spread
from ..reference import earlier
from .statistics import LayerStatistics


@dataclass(frozen=True)
class LowRankUpdate:
    """ΔW = scaling * b @ a with a [..., R, K], b [..., N, R].

    ``relative_error`` is that of the low-rank output on the data, or None.
    """

    a: Tensor
    b: Tensor
    scaling: float
    method: str
    relative_error: float | None

    @property
    def rank(self) -> int:
        return self.a.shape[-2]

    def delta(self) -> Tensor:
        """ΔW [..., N, K]."""
        return (self.b @ self.a).mul_(self.scaling)


NEVER_RAN = "plain LoRA (never ran)"  # the method of an update that no data could be had for


def updates_of_chain(
    chain: Chain[AdapterLayer], method: str, statistics: list[LayerStatistics] | None, regularization: float
) -> list[LowRankUpdate]:
    """One update per layer of a chain. ``statistics`` holds one entry per layer, None where the method needs none.

    A layer that never ran handed nothing on: the one after it ran as layer 0. Its own update is plain LoRA.
    """
    layers = chain.layers
    shortcut, m = layers[0].config.shortcut, layers[0].config.pre_num
    if statistics is not None and hands_on(shortcut, m) and not all(seen.calls for seen in statistics):
        parts = groupby(zip(layers, statistics, strict=True), key=lambda pair: pair[1].calls > 0)
        updates = []
        for ran, part in parts:
            of_part = list(part)
            alike = Chain([layer for layer, _ in of_part], chain.name)
            updates += (
                updates_of_chain(alike, method, [seen for _, seen in of_part], regularization)
                if ran
                else [plain_update(layer) for layer in alike.layers]
            )
        return updates
    a, b = [_wide(layer.whole_A) for layer in layers], [_wide(layer.whole_B) for layer in layers]
    gates = [gates_of(layer) for layer in layers]
    if shortcut in ("none", "block"):
        windows = [range(earlier(m, n) + 1 if shortcut == "block" else 1) for n in range(len(layers))]
        return [
            LowRankUpdate(
                torch.cat([a[n - k].to(a[n].device) * gates[n][k] for k in window], dim=-2),
                torch.cat([b[n - k].to(b[n].device) for k in window], dim=-1),
                layers[n].scaling, "exact", 0.0,
            )
            for n, window in enumerate(windows)
        ]  # fmt: skip
    alone = [n == 0 or (shortcut == "middle" and m == 0) for n in range(len(layers))]
    if method == "weights" and shortcut == "input":
        merged_a = _input_by_weights(layers, a, b)
    else:
        merged_a = [
            a[n] * (gates[n][0] + gates[n][1] if shortcut == "input" else gates[n][0])
            if alone[n] or statistics is None
            else _merged_a(shortcut, m, method, n, a, gates[n], statistics, regularization, chain.name)
            for n in range(len(layers))
        ]
    updates = []
    for n, layer in enumerate(layers):
        own = a[n] * gates[n][0]
        error = relative_error(statistics[n], own, b[n], merged_a[n], b[n]) if statistics else None
        error = 0.0 if alone[n] else error
        updates.append(LowRankUpdate(merged_a[n], b[n], layer.scaling, "exact" if alone[n] else method, error))
    return updates


def summed_updates(
    root: nn.Module, adapters: Sequence[tuple[Record, Mapping[str, AdapterLayer]]]
) -> dict[str, LowRankUpdate]:
    """The sum of what several adapters in force merge to: one update of all their ranks, by layer.

    Raises:
        ValueError: an adapter hands on, so that its merge is none of its own A and B, or has lost a layer.
    """
    parts: dict[str, list[LowRankUpdate]] = {}
    for record, layers in adapters:
        refuse_incomplete(root, record, layers)
        fitted = next((n for n, layer in layers.items() if hands_on(layer.config.shortcut, layer.config.pre_num)), None)
        if fitted is not None:
            raise ValueError(
                f"layer {fitted!r} of adapter {record.name!r} has shortcut={layers[fitted].config.shortcut!r}, whose "
                "merge is fitted to what it sees with no other adapter in force: put it in force alone (set_adapter), "
                "or make one adapter of several (add_weighted_adapter)"
            )
        names = {layer: name for name, layer in layers.items()}
        for chain in record.chains:
            for layer, update in zip(chain.layers, updates_of_chain(chain, "exact", None, 0.0), strict=True):
                parts.setdefault(names[layer], []).append(update)
    return {
        name: LowRankUpdate(
            torch.cat([each.a * each.scaling for each in own], -2), torch.cat([each.b for each in own], -1),
            1.0, "exact", 0.0,
        )
        for name, own in parts.items()
    }  # fmt: skip


def plain_update(layer: AdapterLayer) -> LowRankUpdate:
    """A layer's own A and B, for one that never ran."""
    return LowRankUpdate(own_a(layer), _wide(layer.whole_B), layer.scaling, NEVER_RAN, None)


def own_a(layer: AdapterLayer) -> Tensor:
    """diag(c) A [..., R, K] in float32 or better: by it x becomes the layer's own part of u."""
    return _wide(layer.whole_A) * gates_of(layer)[0]


def gates_of(layer: AdapterLayer) -> Sequence[Tensor | float]:
    """What the rows of A are multiplied by in each term of a layer's u, its own first: [R, 1], or 1.0 without gates."""
    gates = layer.whole_gates
    if gates is None:
        return [1.0] * (1 + layer.chain_length)
    return [spread(_wide(gate), layer.whole_A.shape[-2])[:, None] for gate in gates]


def _merged_a(
    shortcut: str,
    m: int,
    method: str,
    n: int,
    a: list[Tensor],
    gates: Sequence[Tensor | float],
    statistics: list[LayerStatistics],
    regularization: float,
    name: str,
) -> Tensor:
    """The matrix [r, K] that takes A_n's place in ``input`` and ``middle``, for n >= 1."""
    own = a[n] * gates[0]
    if method == "least_squares":
        return own + least_squares(statistics[n], regularization, f"layer {n} of chain {name!r}").to(a[n].dtype)
    window = range(1, earlier(m, n) + 1)
    if shortcut == "input":  # merge_bi
        return a[n] * (gates[0] + gates[1] * (statistics[n - 1].norm_of_x() / statistics[n].norm_of_x()))
    if method == "input":  # by norms of x_n A_nᵀ
        shares = [gates[k] * (statistics[n - k].norm_of_h() / statistics[n].norm_of_h()) for k in window]
        return a[n] * (gates[0] + sum(shares))
    for k in window:
        share = gates[k] * (statistics[n - k].norm_of_x() / statistics[n].norm_of_x())
        own = own + share * a[n - k].to(own.device)
    return own


def _input_by_weights(layers: list[AdapterLayer], a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    """merge_bw: α_n = f*_{n-2} / f*_{n-1} with f*_j = ‖W_j + s (1 + α_j) B_j A_j‖_F, α_0 = α_1 = 1."""
    merged: list[Tensor] = []
    norms: list[float] = []
    for n, layer in enumerate(layers):
        alpha, gates = norms[n - 2] / norms[n - 1] if n >= 2 else 1.0, gates_of(layer)
        merged.append((gates[0] + gates[1] * alpha) * a[n])
        norms.append(float((layer.dense_weight(torch.float32) + layer.scaling * b[n] @ merged[n]).norm()))
    return merged


def least_squares(statistics: LayerStatistics, regularization: float, where: str) -> Tensor:
    """T (G + λI)⁻¹ [r, K] in float64; see ``cholesky_factor``.

    Raises:
        ValueError: there are no second moments, or as for ``cholesky_factor``.
    """
    if statistics.gram is None or statistics.cross is None:
        raise ValueError(f"{where}: statistics hold no second moments; collect them with second_moments=True")
    factor = cholesky_factor(statistics.gram, regularization, where)
    return torch.cholesky_solve(statistics.cross.double().T, factor).T


def cholesky_factor(gram: Tensor, regularization: float, where: str) -> Tensor:
    """L [K, K] with L Lᵀ = gram + λI, in float64. λ is ``regularization`` * mean(diag gram).

    Moments summed in float32 over few tokens may not be positive with that λ; then it is the size of their rounding.

    Raises:
        ValueError: the gram holds NaN or Inf, or is singular to working precision.
    """
    rounding = 4 * torch.finfo(gram.dtype).eps
    gram = gram.double()
    scale = gram.diagonal().mean()
    if not torch.isfinite(scale):
        raise ValueError(f"{where}: the layer's inputs hold NaN or Inf, so no merge can be fitted to them")
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    if scale == 0:
        return identity  # the layer only ever saw zeros: whatever is solved for is zero
    factor: Tensor
    for strength in (regularization * scale, rounding * gram.norm() if regularization > 0 else 0.0):
        factor, failed = torch.linalg.cholesky_ex(gram + strength * identity)
        if not failed:
            return factor
    raise ValueError(
        f"{where}: regularization={regularization} leaves the calibration moments singular; "
        "use more calibration tokens or a larger regularization"
    )


def relative_error(
    statistics: LayerStatistics, a: Tensor, b: Tensor, merged_a: Tensor, merged_b: Tensor
) -> float | None:
    """‖s (x A*ᵀ B*ᵀ - u Bᵀ)‖ / ‖s u Bᵀ‖ over the data of G, T, V; None without second moments."""
    if statistics.gram is None or statistics.cross is None or statistics.shortcut_gram is None:
        return None
    gram, cross, v = statistics.gram.double(), statistics.cross.double(), statistics.shortcut_gram.double()
    a, b = a.double(), b.double()
    weight, full = b.T @ b, a @ gram @ a.T + a @ cross.T + cross @ a.T + v
    if torch.equal(b, merged_b.double()):
        change = merged_a.double() - a
        error = (weight * (change @ gram @ change.T - change @ cross.T - cross @ change.T + v)).sum()
    else:
        p, q = torch.cat([merged_b.double(), -b], dim=1), torch.cat([merged_a.double(), a])
        error = (p.T @ p * (q @ gram @ q.T)).sum() - 2 * (p.T @ b * (q @ cross.T)).sum() + (weight * v).sum()
    size = float((weight * full).sum())
    return (max(float(error), 0.0) / size) ** 0.5 if size > 0 else 0.0


def _wide(tensor: Tensor) -> Tensor:
    """Float32 or better."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))

"""Least squares layer by layer: each is fitted on the model whose earlier layers are merged already.

With x̃_n the input that layer n gets there, and x_n, v_n the input and the shortcut's part of u_n in the unmerged model,

    A*_n = A_n + Σ v_nᵀ x̃_n (G̃_n + λI)⁻¹,   G̃_n = Σ x̃_nᵀ x̃_n.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..adapt.execution import call_with, undisturbed
from ..layers.adapter import AdapterLayer
from ..layers.chain import Chain
from ..layers.shortcuts import hands_on
from .closed_form import LowRankUpdate, least_squares, own_a, plain_update, relative_error, updates_of_chain
from .statistics import LayerStatistics, observed

BYTES = 2**30  # that one Kept holds, on the tensors' device

Value = TypeVar("Value")


class Kept(Generic[Value]):
    """Pairs of batch and ``compute(batch)``, to run through more than once.

    Values are copies: a model may write over its output. A list's are kept, up to ``BYTES``; the rest is computed anew,
    as is all of an iterable that may give other batches the next time, as a shuffling DataLoader does.
    """

    def __init__(self, calibration: Iterable[Any], compute: Callable[[Any], Value]) -> None:
        self._calibration, self._compute = calibration, compute
        self._room = BYTES if isinstance(calibration, Sequence) else 0
        self._kept: dict[int, Value] = {}

    def __iter__(self) -> Iterator[tuple[Any, Value]]:
        for i, batch in enumerate(self._calibration):
            yield batch, self._kept[i] if i in self._kept else self._computed(i, batch)

    def _computed(self, i: int, batch: Any) -> Value:
        value: Value = pytree.tree_map_only(Tensor, Tensor.clone, self._compute(batch))
        size = sum(leaf.nbytes for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))
        if size <= self._room:
            self._room -= size
            self._kept[i] = value
        return value


def sequential_updates(
    model: nn.Module, chains: Sequence[Chain[AdapterLayer]], calibration: Iterable[Any], regularization: float
) -> dict[AdapterLayer, LowRankUpdate]:
    """One update per layer, position by position, with all chains side by side.

    Raises:
        ValueError: a layer's moments cannot be solved for (see ``cholesky_factor``), or ``calibration`` runs once only.
    """
    updates: dict[AdapterLayer, LowRankUpdate] = {}
    fitted = [chain for chain in chains if hands_on(chain.layers[0].config.shortcut, chain.layers[0].config.pre_num)]
    later = [layer for chain in fitted for layer in chain.layers[1:]]
    unmerged = Kept(calibration, lambda batch: _captured(lambda x, v: v, model, later, batch))
    for chain in chains:
        if chain not in fitted:  # of experts: plain LoRA
            updates |= zip(chain.layers, updates_of_chain(chain, "exact", None, 0.0), strict=True)
    with undisturbed(model):
        for n in range(max((len(chain) for chain in fitted), default=0)):
            current = [chain.layers[n] for chain in fitted if len(chain) > n]
            if n == 0:
                updates |= {layer: updates_of_chain(Chain([layer]), "exact", None, 0.0)[0] for layer in current}
                continue
            seen = {layer: LayerStatistics(layer.config, layer.whole_A_shape, layer.lora_A, True) for layer in current}
            batches = 0
            for batch, v in unmerged:
                batches += 1
                with replaced({layer: (update.a, update.b) for layer, update in updates.items()}):
                    x = _captured(lambda x, v: x, model, current, batch)
                for layer in current:
                    for x_of_call, v_of_call in zip(x[layer], v[layer], strict=True):
                        seen[layer].observe(x_of_call, layer.whole_A, v_of_call)
            if not batches:
                raise ValueError("calibration gave no batch on a second run: with sequential=True pass a list")
            for layer in current:
                name = layer.chain.name if layer.chain is not None else ""
                updates[layer] = _fitted(layer, seen[layer], regularization, f"layer {n} of chain {name!r}")
    return updates


def _fitted(layer: AdapterLayer, seen: LayerStatistics, regularization: float, where: str) -> LowRankUpdate:
    if not seen.calls:
        return plain_update(layer)
    a, b = own_a(layer), layer.whole_B.detach()
    b = b.to(a.dtype)
    fitted = a + least_squares(seen, regularization, where).to(a.dtype)
    return LowRankUpdate(fitted, b, layer.scaling, "least_squares", relative_error(seen, a, b, fitted, b))


class _Captured(Generic[Value]):
    """An observer that keeps ``keep(x, v)`` of every call of one batch."""

    def __init__(self, keep: Callable[[Tensor, Tensor | None], Value]) -> None:
        self.keep = keep
        self.calls: list[Value] = []

    def observe(self, x: Tensor, lora_A: Tensor, residual: Tensor | None) -> None:
        self.calls.append(self.keep(x, residual))


def _captured(
    keep: Callable[[Tensor, Tensor | None], Value], model: nn.Module, layers: list[AdapterLayer], batch: Any
) -> dict[AdapterLayer, list[Value]]:
    observers = {layer: _Captured(keep) for layer in layers}
    with observed(observers):
        call_with(model, batch)
    return {layer: observer.calls for layer, observer in observers.items()}


@contextmanager
def replaced(updates: Mapping[AdapterLayer, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Let plain updates (A [R, K], B [N, R]) stand in for their layers' shortcuts inside the ``with`` block."""
    try:
        for layer, update in updates.items():
            layer.replacement = update
        yield
    finally:
        for layer in updates:
            layer.replacement = None

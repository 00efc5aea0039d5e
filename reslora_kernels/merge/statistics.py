"""Norms and second moments of the layers' inputs, gathered on request, for merging."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adapt.record import adapted_layers
from ..config import ResLoRAConfig
from ..layers.adapter import AdapterLayer, Observer
from ..layers.shortcuts import hands_on


class LayerStatistics:
    """What one layer saw. All tensors stay on the layer's device; nothing is read back until a merge asks.

    Args:
        sizes: [r, K] of the whole A, or [E, r, K].
        lora_A: where it is and of what dtype; its values are not read.

    Attributes:
        calls: how many batches were seen.
        gram: G = Σ xᵀ x [K, K], cross: T = Σ vᵀ x [r, K], shortcut_gram: V = Σ vᵀ v [r, r], where v [M, r] is the
            shortcut's part of u; None without second moments.
    """

    def __init__(self, config: ResLoRAConfig, sizes: tuple[int, ...], lora_A: Tensor, second_moments: bool) -> None:
        r, k = sizes[-2:]
        device, dtype = lora_A.device, torch.promote_types(lora_A.dtype, torch.float32)
        self._calls = torch.zeros((), dtype=torch.int64, device=device)  # a tensor: no graph of torch.compile per value
        self.sizes = sizes
        self._shortcut = config.shortcut
        self._x_norms = torch.zeros(config.norm_window, device=device, dtype=dtype)  # ring buffers
        self._h_norms = torch.zeros(config.norm_window, device=device, dtype=dtype)
        needed = second_moments and hands_on(config.shortcut, config.pre_num)
        self.gram = torch.zeros(k, k, device=device, dtype=dtype) if needed else None
        self.cross = torch.zeros(r, k, device=device, dtype=dtype) if needed else None
        self.shortcut_gram = torch.zeros(r, r, device=device, dtype=dtype) if needed else None

    @property
    def calls(self) -> int:
        return int(self._calls)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything gathered so far, by name; the tensors themselves, not copies."""
        state = {
            "calls": self._calls, "x_norms": self._x_norms, "h_norms": self._h_norms,
            "gram": self.gram, "cross": self.cross, "shortcut_gram": self.shortcut_gram,
        }  # fmt: skip
        return {name: tensor for name, tensor in state.items() if tensor is not None}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what ``state_dict`` gave.

        Raises:
            ValueError: other names, shapes or dtypes than this layer's. Nothing is changed then.
        """
        own = self.state_dict()
        expected, found = ({k: (list(t.shape), t.dtype) for k, t in tensors.items()} for tensors in (own, state))
        if expected != found:
            raise ValueError(f"state must hold {expected}, got {found}")
        for name, tensor in own.items():
            tensor.copy_(state[name])

    @torch.no_grad()
    def observe(self, x: Tensor, lora_A: Tensor, residual: Tensor | None) -> None:
        """One batch: x [..., K] and what the shortcut adds to u [..., r] (None: the layer ran as layer 0)."""
        with torch.autocast(x.device.type, enabled=False):  # moments are sums over many tokens: never in half precision
            self._observe(x, lora_A, residual)

    def _observe(self, x: Tensor, lora_A: Tensor, residual: Tensor | None) -> None:
        dtype = self._x_norms.dtype
        x = x.detach().reshape(-1, x.shape[-1]).to(dtype)
        slot = self._calls.remainder(len(self._x_norms)).reshape(1)
        self._calls += 1
        self._x_norms.index_copy_(0, slot, torch.linalg.vector_norm(x).reshape(1))
        if self._shortcut == "middle":
            self._h_norms.index_copy_(0, slot, torch.linalg.vector_norm(x @ lora_A.to(dtype).T).reshape(1))
        if self.gram is None or self.cross is None or self.shortcut_gram is None:
            return
        self.gram.addmm_(x.T, x)
        if residual is not None:
            v = residual.detach().reshape(-1, residual.shape[-1]).to(dtype)
        elif self._shortcut == "input":  # layer 0 counts its own input twice
            v = x @ lora_A.to(dtype).T
        else:
            return
        self.cross.addmm_(v.T, x)
        self.shortcut_gram.addmm_(v.T, v)

    def norm_of_x(self) -> float:
        """Mean over the last ``norm_window`` batches of ‖x‖_F."""
        return self._mean(self._x_norms)

    def norm_of_h(self) -> float:
        """Mean over the last ``norm_window`` batches of ‖x Aᵀ‖_F (gathered for ``middle`` only)."""
        return self._mean(self._h_norms)

    def _mean(self, norms: Tensor) -> float:
        return float(norms[: min(self.calls, len(norms))].double().mean())


@dataclass(frozen=True)
class Statistics:
    """Statistics of every adapted layer, by name."""

    layers: Mapping[str, LayerStatistics]

    @property
    def calls(self) -> int:
        """The fewest batches that any layer saw."""
        return min((layer.calls for layer in self.layers.values()), default=0)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything gathered so far, as ``layer/quantity``, to go on from in another process."""
        return {
            f"{name}/{key}": tensor for name, layer in self.layers.items() for key, tensor in layer.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what ``state_dict`` gave for a model with the same layers; ValueError if it does not fit."""
        by_layer: dict[str, dict[str, Tensor]] = {name: {} for name in self.layers}
        for key, tensor in state.items():
            name, _, quantity = key.rpartition("/")
            if name not in by_layer:
                raise ValueError(f"state is of another model: {name!r} is no adapted layer of this one")
            by_layer[name][quantity] = tensor
        for name, layer in self.layers.items():
            try:
                layer.load_state_dict(by_layer[name])
            except ValueError as error:
                raise ValueError(f"layer {name!r}: {error}") from None


@contextmanager
def collect_statistics(model: nn.Module, *, second_moments: bool = True) -> Iterator[Statistics]:
    """Gather what merging needs from every forward inside the ``with`` block, training steps or evaluation alike.

        with collect_statistics(model) as statistics:
            for batch in batches:
                model(**batch)
        merge_reslora(model, statistics=statistics)

    Norms are kept for the last ``config.norm_window`` batches (as in Section 3.3 of the paper), second moments are
    summed over all. Nothing is read back from the device, so no step waits for it. For ``least_squares``, gather in
    evaluation mode: dropout would be fitted as if it were signal.

    Memory: with second moments each layer of an ``input`` or ``middle`` chain holds K² + r K + r² values in float32
    (float64 for float64 adapters) on its device: 67 MB for K = 4096. Without, 2 * norm_window values.

    Args:
        model: an adapted model.
        second_moments: gather G, T and V, which ``least_squares`` and the error report of a merge need.

    Raises:
        TypeError, ValueError: ``model`` is not an adapted module.
        RuntimeError: statistics of this model are being collected already.
    """
    layers = adapted_layers(model)
    busy = [name for name, layer in layers.items() if layer.observer is not None]
    if busy:
        raise RuntimeError(f"statistics of this model are being collected already (layer {busy[0]!r})")
    statistics = Statistics(
        {
            name: LayerStatistics(layer.config, layer.whole_A_shape, layer.lora_A, second_moments)
            for name, layer in layers.items()
        }
    )
    with observed({layer: statistics.layers[name] for name, layer in layers.items()}):
        yield statistics


@contextmanager
def observed(observers: Mapping[AdapterLayer, Observer]) -> Iterator[None]:
    """Tell each layer's observer of its calls inside the ``with`` block; ValueError where layers are disabled."""
    if any(layer.disabled for layer in observers):
        raise ValueError("the model's adapters are disabled, so that no call is seen: leave disable_adapter first")
    try:
        for layer, observer in observers.items():
            layer.observer = observer
        yield
    finally:
        for layer in observers:
            layer.observer = None

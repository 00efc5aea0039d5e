"""``link`` makes a chain of layers by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..forward_state import scope_pass
from .adapter import AdapterLayer
from .chain import Chain
from .experts import ResLoRAExperts
from .linear import ResLoRALinear
from .shortcuts import reach


def link(layers: Sequence[AdapterLayer], root: nn.Module | None = None, *, name: str = "") -> Chain[AdapterLayer]:
    """Link layers into one chain, so that the shortcut runs between them.

    Args:
        layers: first to last; equal in_features, out_features, rank and shortcut.
        root: the module whose forward is one pass through the chain. Without it, run the layers inside
            ``with chain.forward_pass():``; ``block`` and ``none`` need neither.
        name: what ``inspect`` and error messages call the chain.

    Returns:
        the chain.

    Raises:
        TypeError: a layer is not an adapted layer, or root is not a module.
        ValueError: no layer, a layer given twice or linked already, or unlike layers. Nothing is linked then.
    """
    layers = list(layers)
    if not layers:
        raise ValueError("layers must hold at least one ResLoRALinear, got none")
    for i, layer in enumerate(layers):
        if not isinstance(layer, AdapterLayer):
            raise TypeError(f"layers[{i}] must be a ResLoRALinear, got {type(layer).__name__}")
        if layer.chain is not None:
            raise ValueError(f"layers[{i}] is already linked, at position {layer.position} of its chain")
        if _signature(layer) != _signature(layers[0]):
            raise ValueError(
                f"layers must agree in (in_features, out_features, r, shortcut, pre_num): layers[{i}] has "
                f"{_signature(layer)}, layers[0] has {_signature(layers[0])}"
            )
    if len({id(layer) for layer in layers}) != len(layers):
        raise ValueError("layers must not hold the same layer twice")
    if root is not None and not isinstance(root, nn.Module):
        raise TypeError(f"root must be an nn.Module or None, got {type(root).__name__}")
    chain = Chain(layers, name)
    for position, layer in enumerate(layers):
        layer.chain, layer.position = chain, position
    config = layers[0].config
    chain.introduce(reach(config.shortcut, config.pre_num, len(layers)))
    if root is not None:
        scope_pass(root, [chain])
    return chain


def _signature(layer: AdapterLayer) -> tuple[Any, ...]:
    config = layer.config
    sizes = layer.in_features, layer.out_features, config.r, config.shortcut, config.pre_num
    if isinstance(layer, ResLoRALinear):
        return (*sizes, *layer.form(layer.holds_weight))
    return (*sizes, layer.num_experts) if isinstance(layer, ResLoRAExperts) else sizes

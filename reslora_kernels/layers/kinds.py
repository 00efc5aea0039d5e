"""Which kind of adapted layer stands in for which module, and ``link``, which makes a chain of layers by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..config import ResLoRAConfig
from ..forward_state import scope_pass
from .adapter import AdapterLayer
from .chain import Chain
from .convolution import ResLoRAConvolution, TransposedResLoRALinear
from .embedding import ResLoRAEmbedding
from .experts import ResLoRAExperts, TargetParameter, shapes
from .linear import ResLoRALinear
from .multihead_attention import AttentionOutput, ResLoRAMultiheadAttention
from .quantized_linear import QuantizedResLoRALinear
from .shortcuts import hands_on, reach
from .tensor_parallel import TensorParallelResLoRALinear

KINDS: tuple[type[ResLoRALinear], ...] = (
    QuantizedResLoRALinear, TensorParallelResLoRALinear, AttentionOutput, ResLoRALinear, TransposedResLoRALinear,
    ResLoRAConvolution, ResLoRAEmbedding, ResLoRAMultiheadAttention,
)  # fmt: skip


def kind_of(module: nn.Module) -> type[ResLoRALinear] | None:
    """The kind of adapted layer for modules of that class, fit to be adapted or not; None if there is none."""
    return next((kind for kind in KINDS if kind.stands_in_for(module)), None)


def is_linear(module: nn.Module) -> bool:
    """Whether the module is one that "all-linear" means, adapted or not."""
    kind = type(module) if isinstance(module, ResLoRALinear) else kind_of(module)
    return kind is not None and kind.is_linear


def config_of(config: ResLoRAConfig, name: str, base: Any) -> ResLoRAConfig:
    """What a model's configuration is for one of its parts, or for the adapted layer there."""
    return config.for_module(name, getattr(base, "num_experts", 0) if _is_parameter(base) else 0)


def _is_parameter(base: Any) -> bool:
    return isinstance(base, (TargetParameter, ResLoRAExperts))


def shapes_of(base: Any, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of A and B with that rank, for what is to be adapted or an adapted layer."""
    of_base = shapes(base, r) if _is_parameter(base) else known_kind_of(base).matrices(base, r)
    return of_base["A"], of_base["B"]


def weight_of(base: Any) -> Any:
    """The frozen weight of what is to be adapted, or of an adapted layer."""
    return base.weight if _is_parameter(base) else known_kind_of(base).weight_of(base)


def known_kind_of(module: nn.Module) -> type[ResLoRALinear]:
    """The kind of an adapted layer, or of one for a module that can be adapted."""
    kind = type(module) if isinstance(module, ResLoRALinear) else kind_of(module)
    assert kind is not None
    return kind


def signature_of(base: Any) -> tuple[Any, ...]:
    """What the layers of a chain agree in: K, N, the number of experts, and how a convolution runs over its input."""
    if _is_parameter(base):
        return base.in_features, base.out_features, base.num_experts
    kind = known_kind_of(base)
    return (*kind.sizes(base), *kind.form(base))


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
                f"layers must agree in (in_features, out_features, r, shortcut, pre_num, gates): layers[{i}] has "
                f"{_signature(layer)}, layers[0] has {_signature(layers[0])}"
            )
    if len({id(layer) for layer in layers}) != len(layers):
        raise ValueError("layers must not hold the same layer twice")
    if root is not None and not isinstance(root, nn.Module):
        raise TypeError(f"root must be an nn.Module or None, got {type(root).__name__}")
    chain = Chain(layers, name)
    for position, layer in enumerate(layers):
        layer.chain, layer.position = chain, position
        layer.fit_gates()
    config = layers[0].config
    chain.introduce(reach(config.shortcut, config.pre_num, len(layers)))
    if root is not None and hands_on(config.shortcut, config.pre_num):
        scope_pass(root, [chain])
    return chain


def _signature(layer: AdapterLayer) -> tuple[Any, ...]:
    config = layer.config
    sizes = layer.in_features, layer.out_features, config.r, config.shortcut, config.pre_num, config.gates
    if isinstance(layer, ResLoRALinear):
        return (*sizes, *layer.form(layer.holds_weight))
    return (*sizes, layer.num_experts) if isinstance(layer, ResLoRAExperts) else sizes

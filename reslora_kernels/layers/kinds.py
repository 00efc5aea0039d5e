"""Which kind of adapted layer stands in for which module."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..config import ResLoRAConfig
from .adapter import AdapterLayer
from .experts import ResLoRAExperts, TargetParameter, shapes
from .linear import ResLoRALinear
from .quantized_linear import QuantizedResLoRALinear
from .tensor_parallel import TensorParallelResLoRALinear
from .transposed_linear import TransposedResLoRALinear

KINDS: tuple[type[ResLoRALinear], ...] = (
    QuantizedResLoRALinear,
    TensorParallelResLoRALinear,
    ResLoRALinear,
    TransposedResLoRALinear,
)


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
    if _is_parameter(base):
        of_parameter = shapes(base, r)
        return of_parameter["A"], of_parameter["B"]
    k, n = sizes_of(base)
    return (r, k), (n, r)


def sizes_of(module: Any) -> tuple[int, int]:
    """K and N of what is to be adapted, or of an adapted layer."""
    if isinstance(module, (AdapterLayer, TargetParameter)):
        return module.in_features, module.out_features
    kind = kind_of(module)
    assert kind is not None
    return kind.sizes(module)

"""Which kind of adapted layer stands in for which module."""

from __future__ import annotations

from torch import nn

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


def sizes_of(module: nn.Module) -> tuple[int, int]:
    """K and N of a module to adapt, or of an adapted layer."""
    if isinstance(module, ResLoRALinear):
        return module.in_features, module.out_features
    kind = kind_of(module)
    assert kind is not None
    return kind.sizes(module)

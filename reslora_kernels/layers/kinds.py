"""Which kind of adapted layer stands in for which module."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..config import ResLoRAConfig
from .convolution import ResLoRAConvolution
from .embedding import ResLoRAEmbedding
from .experts import ResLoRAExperts, TargetParameter, shapes
from .linear import ResLoRALinear
from .multihead_attention import AttentionOutput, ResLoRAMultiheadAttention
from .quantized_linear import QuantizedResLoRALinear
from .tensor_parallel import TensorParallelResLoRALinear
from .transposed_linear import TransposedResLoRALinear

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

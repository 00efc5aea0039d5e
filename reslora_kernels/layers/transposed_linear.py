"""TransposedResLoRALinear: a ResLoRALinear around GPT-2's Conv1D, which holds its weight as [K, N]."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from .linear import ResLoRALinear
from .offloading import hold


class TransposedResLoRALinear(ResLoRALinear):
    """y = x W + b + the low-rank term, with ``weight`` W [K, N] as ``transformers.pytorch_utils.Conv1D`` has it.

    Every pass reads W by its strides; nothing is copied. A, B and merged updates are those of the linear layer with Wᵀ.
    """

    @property
    def frozen_weight(self) -> Tensor:
        weight: Tensor = self.weight
        return weight.T

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        return super().dense_weight(dtype).T

    def frozen_forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.T, self.bias)

    def set_merged(self, weight: Tensor) -> None:
        hold(self.holds_weight, weight.T)
        self.merged = True

    @staticmethod
    def stands_in_for(module: nn.Module) -> bool:
        return (kind := _kind()) is not None and isinstance(module, kind)

    @staticmethod
    def why_not(module: Any) -> str | None:
        held_names = {*module._parameters, *module._buffers, *module._modules}
        if held_names != {"weight", "bias"}:
            return (
                f"a {type(module).__name__} that holds {', '.join(sorted(held_names))}: not a weight and a bias alone"
            )
        if type(module).forward is not getattr(_kind(), "forward", None):
            return f"a {type(module).__name__}, whose forward is not that of Conv1D"
        return None

    @staticmethod
    def sizes(module: Any) -> tuple[int, int]:
        k, n = module.weight.shape
        return k, n


def _kind() -> type[nn.Module] | None:
    """Transformers' Conv1D; None while that library is not imported, as no model can hold one then."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)

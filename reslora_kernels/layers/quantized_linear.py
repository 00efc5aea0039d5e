"""QuantizedResLoRALinear: a ResLoRALinear around a frozen layer whose weight another library holds quantised."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import ResLoRAConfig
from ..quantizers import QuantizedWeight, held_in, quantizer_of
from .linear import ResLoRALinear
from .offloading import bare_forward, hook_like, unhooked
from .standing_in import share_hooks


class QuantizedResLoRALinear(ResLoRALinear):
    """y = x Wᵀ + b + the low-rank term, with W dequantised to x's dtype for each forward and each backward.

    The quantised layer is the child ``base_layer``, as in PEFT. One dequantised weight [N, K] exists at a time, while
    its pass runs; no pass keeps one for the next. LLM.int8's rounding of x (bitsandbytes) is not repeated.
    """

    holds_all_it_reads: ClassVar[bool] = False

    base_layer: nn.Linear

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """The weight as its library holds it."""
        return held_in(self.base_layer)

    @property
    def bias(self) -> Any:  # type: ignore[override]
        return self.base_layer.bias

    @property
    def frozen_weight(self) -> Any:
        return QuantizedWeight(self.base_layer)

    @property
    def frozen_bias(self) -> Any:
        return self.base_layer.bias

    @property
    def merged_dtype(self) -> torch.dtype:
        return QuantizedWeight(self.base_layer).dtype

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        if self.merged:
            return self.base_layer.weight.detach().to(dtype)
        return QuantizedWeight(self.base_layer).unpacked(dtype)

    def frozen_forward(self, x: Tensor) -> Tensor:
        """By the library's own matmul, where it has one here; merged, in the merged weight's dtype."""
        if not self.merged and not (weight := QuantizedWeight(self.base_layer)).runs:
            return nn.functional.linear(x, weight.unpacked(x.dtype), self.bias)
        dtype = self.base_layer.weight.dtype if self.merged else x.dtype
        y: Tensor = bare_forward(self.base_layer)(x.to(dtype))  # its hooks are this layer's, which have run
        return y.to(x.dtype)

    @staticmethod
    def stands_in_for(module: nn.Module) -> bool:
        return quantizer_of(module) is not None

    @staticmethod
    def why_not(module: Any) -> str | None:
        quantizer = quantizer_of(module)
        return None if quantizer is None else quantizer.why_not(module)

    @staticmethod
    def refuses(module: Any, config: ResLoRAConfig) -> str | None:
        if config.bias == "none" or module.bias is None or isinstance(module.bias, nn.Parameter):
            return None
        return f"its bias is held as no parameter, so that bias={config.bias!r} would not train it: take 'none'"

    @staticmethod
    def weight_of(module: Any) -> Any:
        return held_in(module.base_layer if isinstance(module, QuantizedResLoRALinear) else module)

    @classmethod
    def check_base(cls, linear: Any) -> None:
        if not cls.stands_in_for(linear):
            raise TypeError(f"linear must hold a quantised weight, got {type(linear).__name__}")

    def share_base(self, linear: nn.Linear) -> None:
        self.in_features, self.out_features = self.sizes(linear)
        self.base_layer = linear
        share_hooks(linear, self)
        self.training = linear.training
        hook_like(linear, self, self._share_weights)

    def _share_weights(self, linear: nn.Module) -> None:
        """They are the base layer's already."""

    def leave(self) -> nn.Linear:
        unhooked(self)
        share_hooks(self, self.base_layer)  # merged, it is not the layer that they were put on
        self.base_layer.train(self.training)
        return self.base_layer

    def take_place_of(self, linear: nn.Linear) -> None:
        self.share_base(linear)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Merged, with the names of the plain layer that it is."""
        state, prefix = super().state_dict(*args, **kwargs), kwargs.get("prefix", "")
        inner = f"{prefix}base_layer."
        for key in [key for key in state if key.startswith(inner)] if self.merged else ():
            state[prefix + key.removeprefix(inner)] = state.pop(key)
        return state

    def original(self) -> nn.Linear:
        return self.base_layer

    def set_merged(self, weight: Tensor) -> None:
        """A plain linear layer with W* takes the quantised one's index."""
        dense = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        dense.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().to(weight.dtype), requires_grad=False)
        self._replace_base(dense)
        self.merged = True

    def restore(self, original: nn.Linear) -> None:
        self._replace_base(original)
        self.merged = False

    def _replace_base(self, base: nn.Linear) -> None:
        self.base_layer = base

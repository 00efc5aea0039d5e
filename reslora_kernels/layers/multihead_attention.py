"""ResLoRAMultiheadAttention: an nn.MultiheadAttention with adapters on its packed in_proj and on its out_proj."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..config import ResLoRAConfig
from ..forward_state import recomputing
from .adapter import joined
from .linear import ResLoRALinear
from .offloading import is_hooked
from .shortcuts import hands_on


class AttentionOutput(ResLoRALinear):
    """The out_proj of an nn.MultiheadAttention, which reads its weight and never runs it."""

    fused: ClassVar[bool] = False
    shares_projections: ClassVar[bool] = False
    takes_samples: ClassVar[bool] = False
    holds_all_it_reads: ClassVar[bool] = False

    @staticmethod
    def stands_in_for(module: nn.Module) -> bool:
        return isinstance(module, NonDynamicallyQuantizableLinear)


class ResLoRAMultiheadAttention(ResLoRALinear, nn.MultiheadAttention):
    """Attention with in_proj W + s B A, A [r, E] and B [3E, r], and out_proj, an adapted layer by itself, likewise.

    PyTorch reads both weights and runs neither projection, so that the sums are formed in every forward, as in PEFT:
    "none" and "block" only, no dropout of x, and no fused kernel.
    """

    is_linear: ClassVar[bool] = False
    fused: ClassVar[bool] = False
    shares_projections: ClassVar[bool] = False
    takes_samples: ClassVar[bool] = False
    holds_all_it_reads: ClassVar[bool] = False

    @property
    def weight(self) -> Any:  # type: ignore[override]
        return self.in_proj_weight

    @property
    def bias(self) -> Any:  # type: ignore[override]
        return self.in_proj_bias

    def share_base(self, linear: Any) -> None:
        super().share_base(linear)
        self.__dict__["_modules"] = linear._modules  # one dict: out_proj gets its adapter in the frozen one's place

    def leave(self) -> Any:
        plain = super().leave()
        plain.__dict__["_modules"] = self._modules
        return plain

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As ``nn.MultiheadAttention.forward``."""
        if self.observer is not None and not recomputing():
            self._observe(query, None)
        return nn.MultiheadAttention.forward(_Summed(self), query, key, value, *args, **kwargs)  # type: ignore[arg-type]

    @property
    def exports(self) -> str | None:
        return "PEFT adds the update of its out_proj twice (as of 0.21), which is another model"

    @staticmethod
    def stands_in_for(module: nn.Module) -> bool:
        return isinstance(module, nn.MultiheadAttention)

    @staticmethod
    def why_not(module: Any) -> str | None:
        if type(module).forward is not nn.MultiheadAttention.forward:
            return f"a {type(module).__name__}, whose forward is not that of MultiheadAttention"
        if is_hooked(module):
            return f"a {type(module).__name__} that accelerate has hooked: only layers with one weight are adapted so"
        if module._parameters.get("in_proj_weight") is None:
            return f"a {type(module).__name__} without a packed in_proj: query, key and value must be of one size"
        return None

    @staticmethod
    def refuses(module: Any, config: ResLoRAConfig) -> str | None:
        if hands_on(config.shortcut, config.pre_num):
            return (
                f"shortcut={config.shortcut!r} hands on what becomes of a layer's input, of which PyTorch runs no "
                "projection: take 'block' or 'none'"
            )
        if config.linear_start:
            return f"init_lora_weights={config.init_lora_weights!r} is for linear layers: take True, 'pissa' or 'olora'"
        if config.use_dora:
            return "use_dora is for linear layers: set it to False"
        if config.backend in ("triton", "cuda"):
            return f"backend={config.backend!r} has no kernel for it: take 'auto', with which it runs on library calls"
        return None

    @staticmethod
    def weight_of(module: Any) -> Any:
        return module.in_proj_weight

    @staticmethod
    def sizes(module: Any) -> tuple[int, int]:
        return module.embed_dim, 3 * module.embed_dim

    @staticmethod
    def parts(module: Any) -> dict[str, nn.Module]:
        return {"out_proj": module.out_proj}


class _Summed:
    """What ``nn.MultiheadAttention.forward`` reads of itself, with the weights of the moment."""

    def __init__(self, layer: ResLoRAMultiheadAttention) -> None:
        out_proj = layer.out_proj
        self._layer = layer
        self.in_proj_weight = _summed(layer)
        summed = _summed(out_proj) if isinstance(out_proj, ResLoRALinear) else out_proj.weight
        self.out_proj = SimpleNamespace(weight=summed, bias=out_proj.bias)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def _summed(layer: ResLoRALinear) -> Tensor:
    """W + s B A of all adapters in force, or W where they are passed over."""
    weight: Tensor = layer.weight
    if layer.merged or layer.disabled:
        return weight
    for each in layer.in_sum:
        call = each._call(())
        a, b = joined(call.a_stack, 0), joined(call.b_stack, 1)
        weight = torch.addmm(weight, b.to(weight.dtype), a.to(weight.dtype), alpha=each.scaling)
    return weight

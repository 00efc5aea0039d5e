"""ResLoRAExperts: the adapter of a parameter that its module multiplies by, a matrix or one for each of E experts.

Transformers holds the experts of a layer as one tensor, ``gate_up_proj`` [E, 2I, H] and ``down_proj`` [E, H, I] say, or
transposed (GPT-OSS, Llama 4). The module that holds it stays, with its class, its forward and its state dict's names;
while it runs an ``AdaptedWeight`` is what it reads under the parameter's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..backends.select import BackendChoice, explain
from ..checks import check_floating
from ..config import PARAMETER_ADAPTER, ResLoRAConfig, checked_config
from ..forward_state import recomputing
from ..ops.grouped import fuses
from .adapted_weight import AdaptedWeight
from .adapter import AdapterLayer
from .wrappers import module_at


@dataclass(frozen=True, eq=False)
class TargetParameter:
    """A parameter to adapt and the module that holds it."""

    owner: nn.Module
    parameter_name: str

    @property
    def weight(self) -> Tensor:
        parameter = self.owner._parameters[self.parameter_name]
        assert parameter is not None
        return parameter

    @property
    def num_experts(self) -> int:
        """E of a parameter [E, ., .]; 0 of a matrix."""
        return self.weight.shape[0] if self.weight.dim() == 3 else 0

    @property
    def transposed(self) -> bool:
        """Whether experts are held as [E, in, out], by what their module says of it (``is_transposed``)."""
        return self.num_experts > 0 and bool(getattr(self.owner, "is_transposed", False))

    @property
    def in_features(self) -> int:
        return self.weight.shape[-2 if self.transposed else -1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[-1 if self.transposed else -2]


class ResLoRAExperts(AdapterLayer):
    """A_e [r, K] and B_e [N, r] for each expert e of a parameter W [E, N, K], or A and B of a matrix [N, K].

        y = x W_eᵀ + s Σ_k (x A_{n-k,e}ᵀ) B_{n-k,e}ᵀ          (``none``: k = 0 only; ``block``: Eq. 3 for each expert)

    A token's expert index selects the matrices in its own block and in the earlier ones. ``input`` and ``middle`` hand
    tokens' values from block to block, and an expert sees other tokens in each: with those the layer is plain LoRA.
    Gates are the same for all experts of a block.

    As PEFT has it for ``target_parameters``, which dimension is N and which is K is read off the layout: [E, N, K],
    or [E, K, N] where the module has ``is_transposed``. Llama 4's experts are transposed without saying so, so that A
    is on the side of their output; ΔW is the same product of the same shapes.

    Attributes:
        lora_A: [E, r, in_features]; lora_B: [E, out_features, r]; of a matrix without E.
        owner: the module that holds the parameter. This layer is its child ``<parameter_name>_reslora``.
    """

    bias = None
    owner: nn.Module
    parameter_name: str

    @classmethod
    def from_linear(
        cls,
        base: TargetParameter,
        config: ResLoRAConfig,
        adapter_dtype: torch.dtype | None = None,
        *,
        init_values: bool = True,
    ) -> ResLoRAExperts:
        """The adapter of ``base``, not yet attached (``take_place_of``); arguments as for ``ResLoRALinear``."""
        checked_config(config)
        check_floating("adapter_dtype", adapter_dtype)
        layer = cls()
        layer._share(base)
        layer._adapt(config, adapter_dtype, init_values)
        return layer

    def _share(self, base: TargetParameter) -> None:
        self.__dict__["owner"] = base.owner  # no child: it is the parent
        self.parameter_name = base.parameter_name
        self.in_features, self.out_features = base.in_features, base.out_features
        self.num_experts, self.transposed = base.num_experts, base.transposed
        self.training = base.owner.training

    def _shape_of(self, kind: str) -> tuple[int, ...]:
        return shapes(self, self.config.r)[kind]

    @property
    def base(self) -> TargetParameter:
        return TargetParameter(self.owner, self.parameter_name)

    @property
    def weight(self) -> Any:
        """The frozen parameter."""
        return self.base.weight

    def take_place_of(self, base: TargetParameter) -> None:
        self._share(base)
        owner, name = base.owner, base.parameter_name
        owner.register_module(name + PARAMETER_ADAPTER, self)
        self.__dict__["_handles"] = [
            owner.register_forward_pre_hook(_StandIn(name)),
            owner.register_forward_hook(_StandDown(name), always_call=True),
        ]

    def leave(self) -> TargetParameter:
        handles: list[RemovableHandle] = self.__dict__.pop("_handles", [])
        for handle in handles:
            handle.remove()
        del self.owner._modules[self.parameter_name + PARAMETER_ADAPTER]
        return self.base

    def base_in(self, root: nn.Module, name: str) -> TargetParameter:
        owner, _, own = name.rpartition(".")
        return TargetParameter(module_at(root, owner), own.removesuffix(PARAMETER_ADAPTER))

    def factors(self) -> list[tuple[Tensor, Tensor]]:
        """A and B, its own and those of the earlier blocks that its shortcut reads, on one device; of all in force."""
        device, found = self.lora_A.device, []
        for layer in self.in_sum:
            earlier = layer.neighbours.earlier if layer.config.shortcut == "block" else ()
            ratio = layer.scaling / self.scaling
            gates = (None,) * (1 + len(earlier)) if layer.gates is None else layer.gates.unbind()
            for part, gate in zip((layer, *earlier), gates, strict=True):
                b = part.lora_B.to(device)
                b = b if gate is None else b * gate.to(device)
                found.append((part.lora_A.to(device), b if ratio == 1 else b * ratio))
        return found

    def forward(self, *_: Any) -> Tensor:
        """An adapter of a parameter is not called: it takes part while the module runs that holds the parameter.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(f"{self.parameter_name!r} is a parameter: call the module that holds it")

    @property
    def a_stack(self) -> tuple[Tensor, ...]:
        return tuple(a for a, _ in self.factors())

    @property
    def execution_device(self) -> torch.device:
        return self.weight.device  # type: ignore[no-any-return]

    @property
    def merged_dtype(self) -> torch.dtype:
        return self.weight.dtype  # type: ignore[no-any-return]

    def backend_choice(self, tokens: int) -> BackendChoice:
        if not self.num_experts:
            x = self.weight.new_empty(1, self.in_features).expand(tokens, -1)
            return explain(self.config.backend, x, self.weight, sum(a.shape[-2] for a in self.a_stack))
        if fuses(self.config.backend):
            return BackendChoice("triton", "experts: both products in one accumulator, tokens gathered on load")
        return BackendChoice("torch", "experts: the module's own product, and grouped low-rank products on top of it")

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        weight: Tensor = self.weight
        return weight.detach().to(torch.promote_types(weight.dtype, dtype))

    def with_update(self, delta: Tensor) -> Tensor:
        return self.dense_weight(torch.float32) + (delta.mT if self.transposed else delta)

    def original(self) -> Tensor:
        return self.weight.detach().to("cpu", copy=True)  # type: ignore[no-any-return]

    def set_merged(self, weight: Tensor) -> None:
        self.weight.data.copy_(weight)
        self.merged = True

    def restore(self, original: Tensor) -> None:
        self.weight.data.copy_(original)
        self.merged = False

    def extra_repr(self) -> str:
        experts = f"num_experts={self.num_experts}, " if self.num_experts else ""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{self.parameter_name}, {experts}{sizes}, {self._describe()}"


def shapes(base: TargetParameter | ResLoRAExperts, r: int) -> dict[str, tuple[int, ...]]:
    """The shapes of A and B."""
    experts = (base.num_experts,) if base.num_experts else ()
    return {"A": (*experts, r, base.in_features), "B": (*experts, base.out_features, r)}


class _StandIn:
    """Forward pre-hook of the owner: from now on it reads the adapted weight."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, owner: nn.Module, args: Any) -> None:
        layer: Any = owner._modules[self.name + PARAMETER_ADAPTER]
        if layer.observer is not None and args and not recomputing():
            layer.observer.observe(args[0], layer.lora_A, None)  # that it ran: nothing is fitted to experts
        if not (layer.merged or layer.disabled):
            owner.__dict__[self.name] = AdaptedWeight(layer, lambda: TargetParameter(owner, self.name).weight)


class _StandDown:
    """Forward hook of the owner, called in any case: the parameter is what it was."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, owner: nn.Module, args: Any, output: Any) -> None:
        owner.__dict__.pop(self.name, None)

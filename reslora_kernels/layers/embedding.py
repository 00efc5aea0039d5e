"""ResLoRAEmbedding: the adapted form of nn.Embedding, whose A is looked up as its weight is."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import ResLoRAConfig
from ..dtensors import is_dtensor
from .adapter import joined
from .linear import ResLoRALinear
from .offloading import hold
from .shortcuts import Call, hands_on


class ResLoRAEmbedding(ResLoRALinear):
    """y = e (W[x] + s (A[:, x])ᵀ Bᵀ): the linear layer on one-hot rows, with K tokens and N values each, looked up.

    ``weight`` is W [K, N] as ``nn.Embedding`` has it, A [r, K], B [N, r]; e is the ``embed_scale`` that some models
    have (Gemma 3, BART), else 1. As in PEFT, A starts at zero and B at random, nothing is dropped out, and the token
    ``padding_idx`` does not train. There is nothing of the tokens to hand on: "none" and "block" only. There is no
    fused kernel: both parts are library calls.
    """

    is_linear: ClassVar[bool] = False
    fused: ClassVar[bool] = False
    shares_projections: ClassVar[bool] = False
    zero_at_start: ClassVar[str] = "lora_A"
    bias = None  # type: ignore[assignment]

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        return super().dense_weight(dtype).T

    def set_merged(self, weight: Tensor) -> None:
        hold(self.holds_weight, weight.T)
        self.merged = True

    def frozen_forward(self, x: Tensor) -> Tensor:
        return scaled(self.holds_weight, self._looked_up(x, self.weight))

    def leading(self, x: Tensor) -> torch.Size:
        return x.shape

    def _observe(self, x: Tensor, residual: Tensor | None) -> None:
        """A column of ones is as long as the one-hot rows: their norm is all that is asked of them."""
        super()._observe(self.lora_A.new_ones(x.numel(), 1), residual)

    def refuses_samples(self) -> str | None:
        tied = "has its adapter in a head too (ensure_weight_tying)" if self.config.ensure_weight_tying else None
        return super().refuses_samples() or tied

    def reset_lora_parameters(self) -> None:
        with torch.no_grad():
            nn.init.zeros_(self.lora_A)
            nn.init.normal_(self.lora_B)
        self.reset_gates()

    def _low_rank(self, x: Tensor, bias: Tensor | None, p: float, call: Call) -> tuple[Tensor, Tensor | None]:
        y = self._looked_up(x, self.weight)
        u = self._projected(x, call.a_stack, p) if call.residual is None else call.residual
        b = joined(call.b_stack, 1)
        y = torch.add(y, F.linear(u.to(y.dtype), b.to(y.dtype)), alpha=self.scaling)
        return scaled(self.holds_weight, y), None

    def _projected(self, x: Tensor, a_stack: tuple[Tensor, ...], p: float) -> Tensor:
        return joined(tuple(self._looked_up(x, a.T) for a in a_stack), -1)

    def _looked_up(self, x: Tensor, table: Tensor) -> Tensor:
        base: Any = self.holds_weight
        return F.embedding(x, table, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)

    @staticmethod
    def stands_in_for(module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding)

    @staticmethod
    def why_not(module: Any) -> str | None:
        kind = f"a {type(module).__name__}"
        others = {*module._parameters, *module._buffers, *module._modules} - {"weight", "embed_scale"}
        if others or module._parameters.get("weight") is None:
            return f"{kind} that holds {', '.join(sorted(others)) or 'no weight'}: not one weight that is a parameter"
        if is_dtensor(module.weight):
            return f"{kind} that a tensor parallel plan spreads: only linear layers are adapted so"
        if not module.weight.is_floating_point():
            return f"{kind} with a quantised weight: only linear layers are adapted quantised"
        if module.max_norm is not None:
            return f"{kind} with max_norm={module.max_norm}, which changes its weight in every forward"
        return None if _is_a_table(module) else f"{kind}, whose forward is no lookup of its own weight, scaled or not"

    @staticmethod
    def refuses(module: Any, config: ResLoRAConfig) -> str | None:
        if hands_on(config.shortcut, config.pre_num):
            return (
                f"shortcut={config.shortcut!r} hands on what becomes of a layer's input, and token ids are no vectors: "
                "take 'block' or 'none', or train the embedding in modules_to_save"
            )
        if config.use_dora:
            return "use_dora is for linear layers: set it to False, or train the embedding in modules_to_save"
        if config.has_start or config.linear_start:
            return f"init_lora_weights={config.init_lora_weights!r} is for linear layers: take True"
        if config.backend in ("triton", "cuda"):
            return f"backend={config.backend!r} has no kernel for it: take 'auto', with which it runs on library calls"
        return None

    @staticmethod
    def sizes(module: Any) -> tuple[int, int]:
        k, n = module.weight.shape
        return k, n

    @classmethod
    def peft_matrices(cls, module: Any, r: int) -> dict[str, tuple[int, ...]]:
        k, n = cls.sizes(module)
        return {"lora_embedding_A": (r, k), "lora_embedding_B": (n, r)}


def scaled(table: nn.Module, rows: Tensor) -> Tensor:
    """What an embedding makes of the rows that it looked up."""
    scale = getattr(table, "embed_scale", None)
    if scale is None:
        return rows
    return rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)


@torch.no_grad()
def _is_a_table(module: Any) -> bool:
    """Whether the forward looks its weight up, and at most scales what it finds by ``embed_scale``; tried on a few."""
    if type(module).forward is nn.Embedding.forward:
        return True
    weight, tokens = torch.arange(1.0, 13.0).view(4, 3), torch.tensor([[0, 3, 2]])
    buffers = {name: torch.tensor(2.0) for name in module._buffers}
    kind: type[nn.Module] = type(module)
    twin = kind.__new__(kind)
    twin.__dict__.update(vars(module), num_embeddings=4, embedding_dim=3, padding_idx=None, _buffers=buffers)
    twin.__dict__["_parameters"] = {"weight": nn.Parameter(weight)}
    scale = buffers.get("embed_scale", getattr(module, "embed_scale", 1.0))
    try:
        found = type(module).forward(twin, tokens)
    except (TypeError, ValueError, IndexError, RuntimeError, AttributeError):  # of a forward that is no lookup
        return False
    return isinstance(found, Tensor) and torch.equal(found, weight[tokens] * scale)

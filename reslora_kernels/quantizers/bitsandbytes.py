"""bitsandbytes: NF4, FP4 and LLM.int8 weights (Transformers' ``BitsAndBytesConfig``)."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

LIBRARY = "bitsandbytes"


def recognises(linear: nn.Linear) -> bool:
    return type(linear).__module__.startswith("bitsandbytes.")


def shards(linear: nn.Linear) -> bool:
    """4 bits are cut as packed; the scales, an eighth of them, stay whole. LLM.int8 hangs its scales on the weight."""
    return _state(linear) is not None


def dtype(linear: nn.Linear) -> torch.dtype:
    state = _state(linear)
    return torch.float16 if state is None else state.dtype  # LLM.int8 computes in float16


def dequantize(linear: nn.Linear) -> Tensor:
    """RuntimeError while the weight is not quantised yet: bitsandbytes does that when it moves to its device."""
    from bitsandbytes import functional

    weight: Any = linear.weight
    state = _state(linear)
    if getattr(state, "packing_format_for_cpu", False):  # another order, since an evaluation on a CPU with AVX512-BF16
        return _read_by_multiplying(weight.data, state)
    if state is not None:
        return functional.dequantize_4bit(weight.data, state)
    scales = getattr(weight, "SCB", None)
    if scales is None:  # after the first forward of the layer by itself, bitsandbytes keeps them elsewhere
        scales = getattr(getattr(linear, "state", None), "SCB", None)
    if weight.dtype != torch.int8 or scales is None:
        kind = type(linear).__name__
        raise RuntimeError(f"a {kind}'s weight is not quantised yet: move the model to its device first")
    return cast(Tensor, functional.int8_vectorwise_dequant(weight.data, scales))


def _state(linear: nn.Linear) -> Any:
    """What 4 bits are read with. FSDP2 takes another parameter for the weight, without it; the module has it too."""
    return getattr(linear.weight, "quant_state", None) or getattr(linear, "quant_state", None)


def keep_order(model: nn.Module) -> None:
    """Switch off what reorders 4-bit weights in an evaluation: from then on no gradient would pass them."""
    for layer in model.modules():
        if "support_avx512bf16_for_cpu" in vars(layer):
            vars(layer)["support_avx512bf16_for_cpu"] = False


def _read_by_multiplying(packed: Tensor, state: Any) -> Tensor:
    """W as the identity times Wᵀ, which is how the library reads this order of its own."""
    from bitsandbytes import functional

    identity = torch.eye(state.shape[1], dtype=torch.bfloat16)
    return cast(Tensor, functional.gemv_4bit(identity, packed, state=state)).T.contiguous()

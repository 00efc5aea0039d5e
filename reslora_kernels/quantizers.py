"""Frozen weights that another library holds quantised: how to know them, and how to read them.

Each library is a ``Quantizer`` in ``QUANTIZERS``. It is imported when a weight is read.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn


class Quantizer(Protocol):
    """A library that holds weights quantised; ``library`` is what it is called in messages."""

    library: str

    def recognises(self, linear: nn.Linear) -> bool:
        """Whether the module's weight is held by it; it is asked of every one, and must not import the library."""

    def shards(self, linear: nn.Linear) -> bool:
        """Whether FSDP2 can cut the weight as it is held, and ``dequantize`` read it put together."""

    def dtype(self, linear: nn.Linear) -> torch.dtype:
        """The floating dtype that the weight was quantised from, or is computed in."""

    def dequantize(self, linear: nn.Linear) -> Tensor:
        """The weight [N, K] in floating point, a new tensor on the weight's device."""


class BitsAndBytes:
    """NF4, FP4 and LLM.int8 weights (Transformers' ``BitsAndBytesConfig``)."""

    library = "bitsandbytes"

    def recognises(self, linear: nn.Linear) -> bool:
        return type(linear).__module__.startswith("bitsandbytes.")

    def shards(self, linear: nn.Linear) -> bool:
        """4 bits are cut as packed; the scales, an eighth of them, stay whole. LLM.int8's scales hang on the weight."""
        return _four_bit_state(linear) is not None

    def dtype(self, linear: nn.Linear) -> torch.dtype:
        state = _four_bit_state(linear)
        return torch.float16 if state is None else state.dtype  # LLM.int8 computes in float16

    def dequantize(self, linear: nn.Linear) -> Tensor:
        """RuntimeError while the weight is not quantised yet: bitsandbytes does that when it moves to its device."""
        from bitsandbytes import functional

        weight: Any = linear.weight
        state = _four_bit_state(linear)
        if getattr(state, "packing_format_for_cpu", False):  # reordered in an evaluation on a CPU with AVX512-BF16
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


class TorchAO:
    """int8, int4 and float8 weight-only tensors (``quantize_``, Transformers' ``TorchAoConfig``)."""

    library = "torchao"

    def recognises(self, linear: nn.Linear) -> bool:
        return type(linear) is nn.Linear and type(linear.weight).__module__.startswith("torchao.")

    def shards(self, linear: nn.Linear) -> bool:
        return False

    def dtype(self, linear: nn.Linear) -> torch.dtype:
        return linear.weight.dtype

    def dequantize(self, linear: nn.Linear) -> Tensor:
        weight: Any = linear.weight
        return cast(Tensor, weight.dequantize())


QUANTIZERS: tuple[Quantizer, ...] = (BitsAndBytes(), TorchAO())


def quantizer_of(module: nn.Module) -> Quantizer | None:
    """The quantiser that holds the module's weight; None for a plain weight and for what is no linear layer."""
    if not isinstance(module, nn.Linear):
        return None
    return next((quantizer for quantizer in QUANTIZERS if quantizer.recognises(module)), None)


class QuantizedWeight:
    """The weight [N, K] of a quantised linear layer for ``ops.lora_linear``, which unpacks it for each pass."""

    def __init__(self, linear: nn.Linear) -> None:
        quantizer = quantizer_of(linear)
        assert quantizer is not None
        self.linear, self._quantizer = linear, quantizer
        self.shape = torch.Size((linear.out_features, linear.in_features))

    @property
    def device(self) -> torch.device:
        return self.linear.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype that the weight was quantised from, or is computed in."""
        return self._quantizer.dtype(self.linear)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """W in ``dtype``, a new tensor."""
        with torch.no_grad():
            return self._quantizer.dequantize(self.linear).to(dtype)


def keep_order(model: nn.Module) -> None:
    """Switch off bitsandbytes' reordering of 4-bit weights in an evaluation: no gradient would pass them after it."""
    for layer in model.modules():
        if "support_avx512bf16_for_cpu" in vars(layer):
            vars(layer)["support_avx512bf16_for_cpu"] = False


def _four_bit_state(linear: nn.Linear) -> Any:
    """What 4 bits are read with. FSDP2 takes another parameter for the weight, without it; the module has it too."""
    return getattr(linear.weight, "quant_state", None) or getattr(linear, "quant_state", None)


def _read_by_multiplying(packed: Tensor, state: Any) -> Tensor:
    """W as the identity times Wᵀ, which is how the library reads this order of its own."""
    from bitsandbytes import functional

    identity = torch.eye(state.shape[1], dtype=torch.bfloat16)
    return cast(Tensor, functional.gemv_4bit(identity, packed, state=state)).T.contiguous()

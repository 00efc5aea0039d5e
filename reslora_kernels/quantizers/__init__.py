"""Frozen weights that another library holds quantised: how to know them, and how to read them.

A quantiser is one module of this folder with

    LIBRARY                     what it is called in messages
    recognises(linear) -> bool  whether the module's weight is held by it; asked of every ``nn.Linear``, so it must not
                                import the library
    shards(linear) -> bool      whether FSDP2 can cut the weight as it is held, and ``dequantize`` read it put together
    dtype(linear)               the floating dtype that the weight was quantised from, or is computed in
    dequantize(linear)          the weight [N, K] in floating point, a new tensor on the weight's device

and a place in ``QUANTIZERS``. Its library is imported when a weight is read.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn

from . import bitsandbytes, torchao

QUANTIZERS = (bitsandbytes, torchao)


def quantizer_of(module: nn.Module) -> ModuleType | None:
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
        dtype: torch.dtype = self._quantizer.dtype(self.linear)
        return dtype

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """W in ``dtype``, a new tensor."""
        with torch.no_grad():
            weight: Tensor = self._quantizer.dequantize(self.linear)
            return weight.to(dtype)

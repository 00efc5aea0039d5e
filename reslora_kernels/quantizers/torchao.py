"""torchao: int8, int4 and float8 weight-only tensors (``quantize_``, Transformers' ``TorchAoConfig``)."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

LIBRARY = "torchao"


def recognises(linear: nn.Linear) -> bool:
    return type(linear) is nn.Linear and type(linear.weight).__module__.startswith("torchao.")


def shards(linear: nn.Linear) -> bool:
    return False


def dtype(linear: nn.Linear) -> torch.dtype:
    return linear.weight.dtype


def dequantize(linear: nn.Linear) -> Tensor:
    weight: Any = linear.weight
    return cast(Tensor, weight.dequantize())

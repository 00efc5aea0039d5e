"""The CUDA extension: whether there is one that runs, and its values, made of tensors as csrc/params.h has them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from .. import dropout as masks
from ..dropout import Dropout
from ..tuning.launch import Sum, precision

MODULE = "reslora_kernels._cuda"
TYPE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}  # as in csrc/params.h
BF16, FP16, TF32, IEEE = range(4)


@cache
def load() -> Any:
    """The compiled module; None where this build has none."""
    return importlib.import_module(MODULE) if importlib.util.find_spec(MODULE) else None


def why_not_built() -> str:
    try:
        from .._build_info import CUDA_REASON
    except ImportError:
        return "it was not installed by pip; run: pip install ."
    return f"{CUDA_REASON}; with nvcc at hand, run: RESLORA_CUDA=1 pip install ."


def launch_failure() -> str | None:
    """Why a small kernel does not run, None when it does: a driver too old, an architecture that was not built for."""
    ones = torch.ones(16, device="cuda")
    try:
        load().finish(device_of(ones), sum_of(Sum(ones[None], torch.empty_like(ones), 1.0)), None)
        torch.cuda.synchronize()
    except RuntimeError as error:
        return f"{error}; update the driver, or build for this GPU: RESLORA_CUDA=1 pip install --no-cache-dir ."
    return None


def matrix(tensor: Tensor) -> Any:
    return load().Matrix(tensor.data_ptr(), *tensor.stride(), *tensor.shape, TYPE[tensor.dtype])


def output(tensor: Tensor) -> Any:
    return load().Output(tensor.data_ptr(), tensor.shape[-1], TYPE[tensor.dtype])


def sum_of(left: Sum) -> Any:
    out = output(left.out)
    return load().Sum(left.partial.data_ptr(), out, left.partial.shape[0], left.out.numel(), left.scale)


def side_channel(
    extra: Tensor | None,
    extra_start: int,
    inner: Tensor | None,
    raw: Tensor | None,
    raw_start: int,
    factor: float,
    raw_factor: float,
) -> Any:
    """The side channel of a product: see csrc/params.h."""
    return load().SideChannel(
        extra=None if extra is None else matrix(extra), extra_start=extra_start,
        inner=None if inner is None else output(inner),
        raw=None if raw is None else output(raw), raw_start=raw_start, factor=factor, raw_factor=raw_factor,
    )  # fmt: skip


def drawn(dropout: Dropout | None) -> dict[str, int]:
    """Dropout as csrc/params.h has it."""
    if dropout is None:
        return {"seed": 0, "threshold": 0}
    return {"seed": dropout.seed.data_ptr(), "threshold": masks.threshold(dropout.p)}


def math_of(dtype: torch.dtype) -> int:
    if dtype == torch.float32:
        return TF32 if precision(dtype) == "tf32" else IEEE
    return BF16 if dtype == torch.bfloat16 else FP16


def device_of(tensor: Tensor) -> Any:
    """The current stream of the tensor's GPU, and how many multiprocessors it has."""
    return load().Device(stream_of(tensor.device)(), processors(tensor))


def stream_of(device: torch.device) -> Callable[[], int]:
    """What tells the address of the device's current stream."""
    if device.type != "cuda":
        return lambda: 0
    return partial(torch._C._cuda_getCurrentRawStream, device.index)


@cache
def _processors_of(index: int) -> int:
    count: int = torch.cuda.get_device_properties(index).multi_processor_count
    return count


def processors(tensor: Tensor) -> int:
    return _processors_of(tensor.device.index) if tensor.is_cuda else 4

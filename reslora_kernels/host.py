"""Both passes of a layer on a CPU as one call each, and the dropout mask: ``csrc/host.cpp``, where it was built.

A call of one of PyTorch's operations from Python costs microseconds, which a small layer spends a dozen times. The
module ``_host`` makes all of them in one call, without Python and the dispatcher. It needs no header of PyTorch and so
knows it only from outside: what it reads of a tensor is looked for here, in a few tensors, before anything is served.
For tensors of other devices it says of what kind a call is and allocates, which takes Python microseconds too.
Without the module, or with a PyTorch that is not as it expects, everything runs as it does for other devices.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64)  # that it serves
INTERFACE = 4  # what the module's functions take: a module of an earlier build may take something else
CODES = {  # c10::ScalarType
    torch.float32: 6, torch.float64: 7, torch.int64: 4, torch.bool: 11, torch.float16: 5, torch.bfloat16: 15,
    torch.uint8: 0,
}  # fmt: skip


def _sample(tensor: Tensor) -> tuple[Tensor, Any, int]:
    """A tensor, a pointer to the at::Tensor of it and its dispatch keys."""
    return tensor, torch._C._aoti.unsafe_alloc_void_ptr_from_tensor(tensor), torch._C._dispatch_keys(tensor).raw_repr()


def _opened() -> tuple[ModuleType | None, str]:
    """The module, ready to be called, or why it cannot be."""
    try:
        module = importlib.import_module("reslora_kernels._host")
    except ImportError:
        return None, _why_not_built()
    if getattr(module, "INTERFACE", 1) != INTERFACE:
        return None, f"{module.__file__} was built from other sources: build it anew"
    folder = os.path.join(os.path.dirname(torch.__file__), "lib")
    libraries = [os.path.join(folder, f"lib{name}.so") for name in ("torch_cpu", "torch_python")]
    with torch.inference_mode():
        inference = torch.empty(1)
    try:
        samples = [_sample(tensor) for tensor in (torch.empty(1), inference, torch._neg_view(torch.empty(1)))]
        module.open(*libraries, (Tensor, torch.nn.Parameter), tuple(samples), tuple(CODES.values())[:4])
    except (AttributeError, RuntimeError) as error:
        return None, str(error)
    return module, f"built for {_built_for(module)}"


def _built_for(module: ModuleType) -> str:
    return os.path.basename(module.__file__ or "").partition(".")[2].removesuffix(".so")


def _why_not_built() -> str:
    try:
        reason: str = importlib.import_module("reslora_kernels._build_info").HOST_REASON
    except (ImportError, AttributeError):
        return "this installation was not built with it"
    return reason


module: Any
module, why = _opened()


def keep_mask(seed: Tensor, rows: int, columns: int, least: int) -> Tensor | None:
    """The mask of ``dropout.keep_mask``, bit for bit; None where the module does not serve.

    Args:
        least: ``dropout.threshold`` of the probability.
    """
    if torch.compiler.is_compiling() or module is None or not seed.is_cpu or torch._C._len_torch_dispatch_stack():
        return None
    mask: Tensor | None = module.keep_mask(seed, rows, columns, least)
    return mask

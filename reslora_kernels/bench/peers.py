"""Other libraries' LoRA layers. Each is imported when asked for, and left out with the reason where it is not there.

Their faults, worked around: Unsloth's fused forms write over x, so its plain form LoRA_W is timed; it takes 3-D inputs
and knows no dropout. LoRAFusion takes 3-D inputs and needs p > 0; the seed comes from Python's ``random`` unless given,
and its dropout, like its sums by atomics, is not reproducible bit for bit.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from reslora_kernels.bench.cases import Case, Method
from reslora_kernels.bench.workload import Layers, Workload


def peft(workload: Workload, method: Method, autocast_adapter_dtype: bool) -> Layers:
    from peft import LoraConfig, get_peft_model

    case, count = workload.case, workload.case.layers
    config = LoraConfig(
        r=case.r, lora_alpha=2 * case.r, lora_dropout=case.p, target_modules=[str(n) for n in range(count)]
    )
    stack: Any = get_peft_model(
        nn.Sequential(*workload.linears()),
        config,
        autocast_adapter_dtype=autocast_adapter_dtype,
    )
    stack.train()
    layers = [stack.base_model.model[n] for n in range(count)]
    parameters = [layer.lora_A["default"].weight for layer in layers]
    parameters += [layer.lora_B["default"].weight for layer in layers]
    for parameter, value in zip(parameters, [*workload.a, *workload.b], strict=True):
        parameter.data.copy_(value)
    return Layers(lambda xs: [layer(x) for layer, x in zip(layers, xs, strict=True)], parameters)


def peft_missing(case: Case, method: Method, device: torch.device, half_only: bool = False) -> str | None:
    if half_only and case.torch_dtype == torch.float32:
        return "the same as peft where the weights are float32"
    return None if importlib.util.find_spec("peft") else "peft is not installed"


def unsloth(workload: Workload, method: Method) -> Layers:
    function = _unsloth().LoRA_W.apply
    a, b, scaling = _copies(workload.a), _copies(workload.b), 2.0

    def run(xs: Sequence[Tensor]) -> list[Tensor]:
        stacks = zip(xs, workload.weights, a, b, strict=True)
        return [function(x.unsqueeze(0), weight, None, m, n, scaling).squeeze(0) for x, weight, m, n in stacks]

    return Layers(run, [*a, *b])


def unsloth_missing(case: Case, method: Method, device: torch.device) -> str | None:
    has_none = "it has no dropout" if case.p else None
    return _gpu_library_missing("unsloth", _unsloth, device) or has_none


@cache
def _unsloth() -> Any:
    return importlib.import_module("unsloth.kernels.fast_lora")


def lorafusion(workload: Workload, method: Method) -> Layers:
    function = _lorafusion().fused_linear_lora
    a, b, p = _copies(workload.a), _copies(workload.b), workload.case.p

    def run(xs: Sequence[Tensor]) -> list[Tensor]:
        stacks = zip(xs, workload.weights, a, b, strict=True)
        return [
            function(x.unsqueeze(0), weight, m, n, alpha=2.0, seed=1, dropout_p=p).squeeze(0)
            for x, weight, m, n in stacks
        ]

    return Layers(run, [*a, *b])


def lorafusion_missing(case: Case, method: Method, device: torch.device) -> str | None:
    needs_dropout = None if case.p else "it needs dropout p > 0"
    return _gpu_library_missing("lorafusion", _lorafusion, device) or needs_dropout


@cache
def _lorafusion() -> Any:
    return importlib.import_module("lorafusion.ops.lora_v1")


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.clone().requires_grad_() for t in tensors]


def _gpu_library_missing(name: str, load: Any, device: torch.device) -> str | None:
    if importlib.util.find_spec(name) is None:
        return f"{name} is not installed"
    if device.type != "cuda":
        return f"{name} needs a GPU"
    try:
        load()
    except Exception as error:  # whatever its import raises on this machine is the reason
        return f"{name} cannot be imported: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    return None

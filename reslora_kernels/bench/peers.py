"""LoRA as others have it: written by hand, and other libraries' layers.

Each library is imported when asked for, and left out with the reason where it is not there. Their faults, worked
around: Unsloth's fused forms write over x, so its form of one projection, LoRA_W, is timed; it takes 3-D inputs, and
dropout in newer versions only. LoRAFusion takes 3-D inputs and needs p > 0; the seed comes from Python's ``random``
unless given, and its dropout, like its sums by atomics, is not reproducible bit for bit.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from reslora_kernels.bench.cases import Case, Method
from reslora_kernels.bench.workload import Layers, Workload

SCALING = 2.0  # s, as lora_alpha = 2 r makes it


class HandWritten(torch.autograd.Function):
    """y = x Wᵀ + b + s x Aᵀ Bᵀ with three products forward, five backward, and no option at all."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        u = x @ a.T
        ctx.save_for_backward(x, weight, a, b, u)
        ctx.scaling = scaling
        y = (u * scaling) @ b.T if bias is None else torch.addmm(bias, u, b.T, alpha=scaling)
        return y.addmm_(x, weight.T)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, u = ctx.saved_tensors
        du = (dy @ b) * ctx.scaling
        return (du @ a).addmm_(dy, weight), None, None, du.T @ x, (dy.T @ u) * ctx.scaling, None


def hand_written(workload: Workload, method: Method) -> Layers:
    def layer(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y: Tensor = HandWritten.apply(x, weight, None, a, b, SCALING)  # type: ignore[no-untyped-call]
        return y

    return _layer_by_layer(workload, layer)


def hand_written_missing(case: Case, method: Method, device: torch.device) -> str | None:
    return "it has no dropout" if case.p else None


def addmm(workload: Workload, method: Method) -> Layers:
    """One ``torch.addmm`` on the frozen linear's result; autograd does the backward."""
    p = workload.case.p

    def layer(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        dropped = nn.functional.dropout(x, p) if p else x
        return torch.addmm(nn.functional.linear(x, weight), dropped @ a.T, b.T, alpha=SCALING)

    return _layer_by_layer(workload, layer)


def _layer_by_layer(workload: Workload, layer: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Layers:
    a, b = _copies(workload.a), _copies(workload.b)
    return Layers(lambda xs: list(map(layer, xs, workload.weights, a, b)), [*a, *b])


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
    function, dropout = _unsloth().LoRA_W.apply, (workload.case.p,) if workload.case.p else ()

    def layer(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y: Tensor = function(x.unsqueeze(0), weight, None, a, b, SCALING, *dropout)
        return y.squeeze(0)

    return _layer_by_layer(workload, layer)


def unsloth_missing(case: Case, method: Method, device: torch.device) -> str | None:
    if (reason := _gpu_library_missing("unsloth", _unsloth, device)) or not case.p:
        return reason
    takes_it = "dropout_p" in inspect.signature(_unsloth().LoRA_W.forward).parameters
    return None if takes_it else "this version of it has no dropout"


@cache
def _unsloth() -> Any:
    return importlib.import_module("unsloth.kernels.fast_lora")


def lorafusion(workload: Workload, method: Method) -> Layers:
    function, p = _lorafusion().fused_linear_lora, workload.case.p

    def layer(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y: Tensor = function(x.unsqueeze(0), weight, a, b, alpha=SCALING, seed=1, dropout_p=p)
        return y.squeeze(0)

    return _layer_by_layer(workload, layer)


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

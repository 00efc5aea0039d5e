"""Checks of arguments, which name the argument, the value and what is allowed; and whether a linear layer is one."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

PROBE = (2, 3, 7, 5)  # leading dimensions, in_features and out_features of what a subclass is tried on


def check_module(name: str, value: Any) -> None:
    """Raise a TypeError unless ``value`` is an ``nn.Module``."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be an nn.Module, got {type(value).__name__}")


def check_bool(name: str, value: Any) -> None:
    """Raise a TypeError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_int(name: str, value: Any, low: int, high: int | None) -> None:
    """Raise a TypeError or ValueError unless ``value`` is an int from ``low`` to ``high``, None for no limit."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < low or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be {allowed}, got {value}")


def check_number(name: str, value: Any, allowed: str, holds: Any) -> None:
    """Raise a TypeError or ValueError unless ``value`` is a finite number that ``holds``; ``allowed`` says which do."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be {allowed}, got {value!r}")
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an int that no float can hold
        finite = False
    if not finite or not holds(value):
        raise ValueError(f"{name} must be {allowed}, got {value!r:.80}")


def check_floating(name: str, value: Any) -> None:
    """Raise a TypeError or ValueError unless ``value`` is a floating ``torch.dtype`` or None."""
    if value is not None and not isinstance(value, torch.dtype):
        raise TypeError(f"{name} must be a torch.dtype or None, got {value!r}")
    if value is not None and not value.is_floating_point:
        raise ValueError(f"{name} must be a floating dtype, got {value}")


def why_not_linear(module: nn.Linear) -> str | None:
    """What keeps ``module`` from being the plain map of an ``nn.Linear``; None where nothing does.

    It may hold nothing beside weight and bias, from which its weight could be computed (weight_norm, spectral_norm,
    pruning); and if its class has a forward of its own, that is tried on small values, in training and in evaluation.
    """
    others = [name for kind in (module._parameters, module._buffers, module._modules) for name in kind]
    others = [name for name in others if name not in ("weight", "bias")]
    if others or module._parameters.get("weight") is None:
        return (
            f"a {type(module).__name__} that holds {', '.join(others) or 'no weight'}: only a weight and a bias that "
            "are parameters can be adapted. Remove weight_norm, spectral_norm or pruning first "
            "(torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm, remove_spectral_norm, "
            "prune.remove); from a conversion (QAT, float8) leave out the layers to adapt (filter_fn, module_filter_fn)"
        )
    if nn.parameter.is_lazy(module.weight):
        return f"a {type(module).__name__} whose sizes are not known before its first forward"
    if module.weight.is_complex():
        return f"a {type(module).__name__} with a complex weight"
    if type(module).forward is nn.Linear.forward:
        return None
    kind = f"a {type(module).__name__}, which is no plain torch.nn.Linear"
    if len(inspect.signature(type(module).forward).parameters) != 2:
        return f"{kind}: its forward takes other arguments than the input"
    return next((f"{kind}: {fault}" for training in (True, False) if (fault := _fault(module, training))), None)


def _fault(module: nn.Linear, training: bool) -> str | None:
    """How the forward of a copy of ``module`` with a small weight differs from the linear map."""
    batch, tokens, k, n = PROBE
    dtype = module.weight.dtype if module.weight.is_floating_point() else torch.float32
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((batch, tokens, k), (n, k), (n,))
    )
    twin = type(module).__new__(type(module))
    twin.__dict__.update(vars(module), in_features=k, out_features=n, training=training)
    twin.__dict__["_parameters"] = {
        "weight": nn.Parameter(weight),
        "bias": None if module.bias is None else nn.Parameter(bias),
    }
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            found = type(module).forward(twin, x)
    except Exception as error:  # whatever a forward that is no linear map may raise
        return f"its forward fails on a small weight ({type(error).__name__}: {error})"
    return None if _is_near(found, x, weight, twin.bias) else "its forward computes another function than x Wᵀ + b"


def _is_near(found: object, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether ``found`` is x Wᵀ + b within the rounding of its dtype."""
    if not isinstance(found, Tensor) or found.dtype != x.dtype or found.shape != (*x.shape[:-1], len(weight)):
        return False
    x64, w64 = x.double(), weight.double()
    b64 = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.detach().double()
    exact, size = nn.functional.linear(x64, w64, b64), nn.functional.linear(x64.abs(), w64.abs(), b64.abs())
    return bool(((found.double() - exact).abs() <= (weight.shape[1] + 2) * torch.finfo(x.dtype).eps * size).all())

"""Whether a module that calls itself a linear layer is one: x Wᵀ + b of its own weight and bias, and nothing else."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

PROBE = (2, 3, 7, 5)  # leading dimensions, in_features and out_features of what a subclass is tried on


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
            "prune.remove)"
        )
    if nn.parameter.is_lazy(module.weight):
        return f"a {type(module).__name__} whose sizes are not known before its first forward"
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

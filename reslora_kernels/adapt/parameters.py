"""Which parameters ``target_parameters`` means, by PEFT's rule, and why one of them cannot be adapted."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..config import PARAMETER_ADAPTER, ResLoRAConfig
from ..layers.experts import TargetParameter
from ..layers.offloading import offloader
from ..quantizers import quantizer_of
from .matching import matches


def find_parameters(
    model: nn.Module, config: ResLoRAConfig, modules: Mapping[str, nn.Module]
) -> dict[str, TargetParameter]:
    """The parameters to adapt, by the names that their adapters get, in registration order.

    Args:
        modules: what is adapted as a whole module.

    Raises:
        ValueError: an entry matches nothing, or a parameter that no adapter can follow; the message says what instead.
    """
    wanted = config.target_parameters or ()
    found: dict[str, TargetParameter] = {}
    for owner_name, owner in model.named_modules() if wanted else ():
        for own in owner._parameters:
            name = f"{owner_name}.{own}" if owner_name else own
            if owner._parameters[own] is not None and matches(name, wanted):
                found[name] = TargetParameter(owner, own)
    missing = [ending for ending in wanted if not any(matches(name, [ending]) for name in found)]
    if missing:
        there = ", ".join(_experts(model)) or "none here, where target_modules may name nn.Linear experts"
        raise ValueError(f"target_parameters: {missing[0]!r} matches no parameter; those of experts are {there}")
    for name, target in found.items():
        if fault := _why_not(name, target, modules, config):
            raise ValueError(f"target_parameters {list(wanted)} matches {name!r}, {fault}")
    return {name + PARAMETER_ADAPTER: target for name, target in found.items()}


def _why_not(name: str, target: TargetParameter, modules: Mapping[str, nn.Module], config: ResLoRAConfig) -> str | None:
    """Why the parameter cannot be adapted, and what can be done instead."""
    owner, weight = target.owner, target.weight
    if owner in modules.values():
        return "whose module is in target_modules as well: leave it out of one of the two"
    if quantizer_of(owner) is not None or not weight.is_floating_point() or weight.dtype.itemsize == 1:
        return f"which is quantised ({weight.dtype}): load the model dequantised, or adapt its nn.Linear layers alone"
    if weight.dim() not in (2, 3):
        return f"of shape {list(weight.shape)}, neither a matrix nor one for each expert: name it in modules_to_save"
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        return "which is looked up, not multiplied by: train it in modules_to_save"
    if weight.is_meta or offloader(owner) is not None:
        return "which has no values here (meta device, or offloaded by accelerate): keep its module on a device"
    if config.backend == "cuda" and target.num_experts:
        return "experts, which backend='cuda' has no kernel for: take backend='auto', or 'triton'"
    return None


def _experts(model: nn.Module) -> list[str]:
    """Endings of the parameters that hold one matrix for each expert, each once."""
    names = [name for name, parameter in model.named_parameters() if parameter.dim() == 3 and "conv" not in name]
    return list(
        dict.fromkeys(".".join([part for part in name.split(".") if not part.isdecimal()][-3:]) for name in names)
    )

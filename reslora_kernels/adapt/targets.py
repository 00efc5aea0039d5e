"""Which layers and parameters a configuration means, with PEFT's matching rules, and why each other one is left out."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..config import ALL_LINEAR, PARAMETER_ADAPTER, ResLoRAConfig, matches, pattern_matches, with_parents
from ..layers.adapter import AdapterLayer
from ..layers.experts import TargetParameter
from ..layers.kinds import is_linear, kind_of, known_kind_of
from ..layers.offloading import offloader
from ..layers.wrappers import COMPILED, at, module_at, modules_of, unwrapped
from ..quantizers import quantizer_of
from .checkpoints import output_head, task_heads
from .obstacles import read_past, reader_of_given

LORA_PARAMETERS = frozenset(("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"))  # as LoRA libraries name them


@dataclass(frozen=True)
class Targets:
    """What to adapt by name, modules in their order, then parameters; every other linear layer with the reason."""

    matched: Mapping[str, Any]
    unmatched: tuple[tuple[str, str], ...]


def role_of(name: str) -> str:
    """The last component of a module's name that is not a number: what the layer is for ("q_proj")."""
    words = [part for part in name.split(".") if not part.isdecimal()]
    return words[-1] if words else name


def find_targets(model: nn.Module, config: ResLoRAConfig) -> Targets:
    """Match ``config`` against the model's modules.

    Warns of an entry of ``target_modules`` or ``layers_to_transform`` that matches nothing beside others that do, and
    of a layer asked for by name whose owner reads its weight past it, so that an adapter in it has no effect.

    Raises:
        ValueError: nothing matches, a matched module does not compute ``nn.Linear``'s map of its own weight (see
            ``why_not_linear``) or may not be adapted (Mamba's out_proj), an entry of ``rank_pattern`` or
            ``alpha_pattern`` matches none of those found, one of ``modules_to_save`` no module, or the model is adapted
            already.
    """
    _refuse_adapted(model)
    head = output_head(model)
    matched: dict[str, Any] = {}
    unmatched: list[tuple[str, str]] = []
    for name, module in modules_of(model):
        if name in matched:
            continue
        reason = _left_out(name, module, config, head) or passed_over(model, name, module, config)
        if reason is None:
            _refuse_compiled(model, name)
            matched[name] = adaptable(name, module, config, model)
            matched |= {f"{name}.{part}": inner for part, inner in known_kind_of(module).parts(module).items()}
        elif is_linear(module):
            unmatched.append((name, reason))
    matched |= find_parameters(model, config, matched)
    if not matched:
        raise ValueError(_nothing_matched(model, config))
    for ending in config.modules_to_save or ():
        if not any(matches(name, [ending]) for name, _ in modules_of(model)):
            raise ValueError(f"modules_to_save: {ending!r} matches no module of the model")
    refuse_idle_patterns(config, matched)
    _warn_of_unused(model, config)
    return Targets(matched, tuple(unmatched))


def refuse_idle_patterns(config: ResLoRAConfig, adapted: Collection[str]) -> None:
    """ValueError, which names it, for a ``rank_pattern`` or ``alpha_pattern`` that means none of the adapted layers."""
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field):
            if not any(pattern_matches(key, name.removesuffix(PARAMETER_ADAPTER)) for name in adapted):
                raise ValueError(f"{field} key {key!r} matches no adapted layer; they are {', '.join(adapted)}")


def with_heads_saved(config: ResLoRAConfig, model: nn.Module) -> ResLoRAConfig:
    """``config`` with the model's task heads in ``modules_to_save``, but for those that it adapts by name."""
    heads = [
        head
        for head in task_heads(model)
        if not any(matches(head, [ending]) for ending in config.modules_to_save or ())
        and (
            config.target_modules == ALL_LINEAR
            or not any(matches(name, config.target_modules) for name in _within(model, head))
        )
    ]
    return config.replace(modules_to_save=[*(config.modules_to_save or ()), *heads]) if heads else config


def _within(model: nn.Module, name: str) -> list[str]:
    return [".".join(filter(None, (name, inner))) for inner, _ in model.get_submodule(name).named_modules()]


def _left_out(name: str, module: nn.Module, config: ResLoRAConfig, head: nn.Module | None) -> str | None:
    """Why the configuration does not mean the module; None where it does."""
    if not name:
        return "the model itself, which has no parent to swap it in"
    if config.modules_to_save and any(matches(module, config.modules_to_save) for module in with_parents(name)):
        return "in modules_to_save: trained whole"
    if config.exclude_modules and matches(name, config.exclude_modules):
        return "in exclude_modules"
    if config.target_modules == ALL_LINEAR:
        if not is_linear(module):
            return "not a linear layer"
        if module is head:
            return "the model's output head, which 'all-linear' leaves out"
    elif not matches(name, config.target_modules):
        return "not in target_modules"
    if config.layers_to_transform is not None:
        index = _layer_index(name)
        assert not isinstance(config.layers_to_transform, int)  # the config stores a tuple
        if index not in config.layers_to_transform:
            return f"layer index {index} is not in layers_to_transform"
    return None


def passed_over(model: nn.Module, name: str, module: nn.Module, config: ResLoRAConfig) -> str | None:
    """Why 'all-linear' leaves out a layer that cannot be adapted, or not with effect; None where it takes it."""
    kind = kind_of(module)
    if config.target_modules != ALL_LINEAR or kind is None:
        return None
    return kind.why_not(module) or _incompatible(model, name) or _without_effect(model, name)


def adaptable(name: str, module: nn.Module, config: ResLoRAConfig, model: nn.Module) -> nn.Module:
    """The module that was asked for by name, if it can be adapted; warns where that has no effect."""
    asked = f"target_modules {config.target_modules!r} matches {name!r}"
    kind = kind_of(module)
    if kind is None:
        raise ValueError(
            f"{asked}, a {type(module).__name__}; only linear layers, convolutions, embeddings and "
            "nn.MultiheadAttention can be adapted. Another module can be trained whole: name it in modules_to_save"
        )
    if fault := kind.why_not(module):
        raise ValueError(f"{asked}, {fault}")
    if fault := kind.refuses(module, config.for_module(name)):
        raise ValueError(f"{asked}, a {type(module).__name__}, but {fault}")
    if fault := _incompatible(model, name):
        raise ValueError(f"{asked}, {fault}: leave it out of target_modules")
    if isinstance(module, nn.Embedding) and (reader := reader_of_given(model)):
        raise ValueError(f"{asked}, whose weight {reader} reads past an adapter: leave it out of target_modules")
    if fault := _without_effect(model, name):
        warnings.warn(f"{asked}, but an adapter there has no effect: {fault}", stacklevel=4)
    return module


def _incompatible(model: nn.Module, name: str) -> str | None:
    """Why a layer of a state-space mixer cannot be adapted."""
    owner, child = _owner(model, name)
    if child == "out_proj" and _is_mixer(owner) and read_past(owner, child):
        return f"of which the fused training path of {type(owner).__name__} reads the weight past an adapter"
    return None


def _without_effect(model: nn.Module, name: str) -> str | None:
    """Why an adapter in a layer would never run."""
    owner, child = _owner(model, name)
    how = read_past(owner, child)
    if how == "only":
        return f"{type(owner).__name__} reads its weight and never runs it"
    if how == "instead" and _is_mixer(owner) and quantizer_of(getattr(owner, child)) is None:
        return f"{type(owner).__name__} reads its weight and runs it where it is quantised only"
    return None


def _is_mixer(owner: nn.Module) -> bool:
    """Whether it is a state-space mixer: its decay has this name in every one."""
    return "A_log" in owner._parameters


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, child = name.rpartition(".")
    return module_at(model, parent), child


def _refuse_compiled(model: nn.Module, name: str) -> None:
    """ValueError for a layer that is compiled by itself: it would go on to run as it is now."""
    around = at(model, name)
    while around is not None and around is not unwrapped(around):
        inner = around._modules.get(COMPILED)
        if inner is not None and inner is unwrapped(inner):
            raise ValueError(
                f"{name!r} is compiled by itself, and would run without its adapter: adapt the model first, then "
                "compile layers of it, or compile what is around the layer"
            )
        around = next(iter(around.children()))


def _layer_index(name: str) -> int | None:
    """The first number in a module's name, its own last component left out: which block it is in."""
    return next((int(part) for part in name.split(".")[:-1] if part.isdecimal()), None)


def _warn_of_unused(model: nn.Module, config: ResLoRAConfig) -> None:
    names = [name for name, _ in modules_of(model) if name]
    for field in ("target_modules", "exclude_modules"):
        given = getattr(config, field) or ()
        unused = [] if isinstance(given, str) else [t for t in given if not any(matches(name, [t]) for name in names)]
        if unused or (field == "exclude_modules" and given and not any(matches(name, given) for name in names)):
            warnings.warn(f"{field}: {_listed(unused or [given])} matches no module of the model", stacklevel=4)
    assert not isinstance(config.layers_to_transform, int)
    if config.layers_to_transform is not None:
        head = output_head(model)
        there = {_layer_index(name) for name, m in modules_of(model) if _left_out(name, m, config, head) is None}
        missing = [index for index in config.layers_to_transform if index not in there]
        if missing:
            warnings.warn(
                f"layers_to_transform: {_listed(missing)} is no layer that target_modules means", stacklevel=4
            )


def _listed(values: Sequence[object]) -> str:
    return ", ".join(map(repr, values))


def endings_of(root: nn.Module, names: Sequence[str]) -> list[str] | str:
    """``target_modules`` that mean the modules ``names`` and no others.

    Last name components, as people write them, where they do; full names elsewhere; one regular expression where even a
    full name is the ending of another module's.
    """
    every = [name for name, _ in modules_of(root)]
    wanted, chosen = set(names), set()

    def means_others(ending: str) -> bool:
        return any(other == ending or other.endswith("." + ending) for other in every if other not in wanted)

    for name in names:
        ending = name.rpartition(".")[2]
        chosen.add(name if means_others(ending) or ending.isdecimal() else ending)
    if any(means_others(name) for name in chosen):
        return "|".join(re.escape(name) for name in sorted(names))
    return sorted(chosen)


def _refuse_adapted(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, AdapterLayer):
            raise ValueError(f"model is already adapted: {name!r} is a {type(module).__name__}")
    for name, _ in model.named_parameters():
        if not LORA_PARAMETERS.isdisjoint(name.split(".")):
            raise ValueError(f"model already holds LoRA parameters ({name!r}); merge or unload them first")


def _nothing_matched(model: nn.Module, config: ResLoRAConfig) -> str:
    if isinstance(model, nn.Linear):
        return "model is itself a linear layer and has no parent to swap it in: use ResLoRALinear.from_linear"
    roles: dict[str, list[str]] = {}
    for name, module in modules_of(model):
        kind = kind_of(module)
        if kind is not None and kind.is_linear and kind.why_not(module) is None:
            roles.setdefault(role_of(name), []).append(name)
    asked = f"target_modules={config.target_modules!r}"
    if config.exclude_modules:
        asked += f", exclude_modules={config.exclude_modules!r}"
    if config.layers_to_transform is not None:
        asked += f", layers_to_transform={config.layers_to_transform!r}"
    if not roles:
        return f"{asked} matches nothing: the model has no torch.nn.Linear"
    listed = "; ".join(f"{role} ({len(names)}x, e.g. {names[0]!r})" for role, names in sorted(roles.items()))
    return f"{asked} matches no linear layer of the model; candidates: {listed}"


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
    for owner_name, owner in modules_of(model) if wanted else ():
        for own in owner._parameters:
            name = f"{owner_name}.{own}" if owner_name else own
            if owner._parameters[own] is not None and matches(name, wanted):
                found[name] = TargetParameter(owner, own)
    missing = [ending for ending in wanted if not any(matches(name, [ending]) for name in found)]
    if missing:
        there = ", ".join(_experts(model)) or "none here, where target_modules may name nn.Linear experts"
        raise ValueError(f"target_parameters: {missing[0]!r} matches no parameter; those of experts are {there}")
    for name, target in found.items():
        if fault := _why_not(target, modules, config):
            raise ValueError(f"target_parameters {list(wanted)} matches {name!r}, {fault}")
    return {name + PARAMETER_ADAPTER: target for name, target in found.items()}


def _why_not(target: TargetParameter, modules: Mapping[str, nn.Module], config: ResLoRAConfig) -> str | None:
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

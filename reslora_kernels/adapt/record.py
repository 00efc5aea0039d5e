"""What a model remembers of its adaptation, and how the rest of the package finds it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_module
from ..config import ResLoRAConfig
from ..layers.adapter import AdapterLayer
from ..layers.chain import Chain, SharedInput
from ..layers.wrappers import at, unwrapped, without_wrappers

TOKENS = "trained_tokens"  # the parameter of an embedding that holds the rows which train whole


class Noted(dict[str, Any]):
    """What parameters were like, by name, when they were first seen to train.

    Copies of a model share it: an average of it (EMA), whose own parameters never train, changes where it has trained.
    """

    def __deepcopy__(self, memo: dict[int, object]) -> Noted:
        return self

    def note(self, name: str, parameter: Tensor) -> None:
        """Remember ``parameter``, unless it is one that ``functional_call`` has put in for a while."""
        if isinstance(parameter, nn.Parameter):
            self[name] = _fingerprint(parameter)

    def has_changed(self, name: str, parameter: Tensor) -> bool:
        """Whether a parameter that was noted has other values than then; of one that is spread that is not known."""
        return name in self and (self[name] is None or self[name] != _fingerprint(parameter))


def _fingerprint(parameter: Tensor) -> tuple[float, float] | None:
    """Sum and norm: optimizers that are fused, and writes to ``data``, leave a tensor's version as it was."""
    if type(parameter) is not nn.Parameter or parameter.is_meta:
        return None
    values = parameter.detach()
    return values.sum(dtype=torch.float64).item(), torch.linalg.vector_norm(values, dtype=torch.float64).item()


@dataclass
class Record:
    """What a model remembers of its adaptation; hangs on the adapted root as ``_reslora``."""

    config: ResLoRAConfig
    unmatched: tuple[tuple[str, str], ...]
    name: str = "default"
    order: str = "the structure"  # where the chains come from
    note: str = ""
    given: bool = False  # whether chains= named some of them
    experts: set[str] = field(default_factory=set)  # names of layers that see a choice of the tokens
    chains: list[Chain[AdapterLayer]] = field(default_factory=list)
    same_input: list[list[str]] = field(default_factory=list)  # names of layers that read one tensor
    groups: list[SharedInput] = field(default_factory=list)  # the same, as layers, where they share their projection
    layer_names: list[str] = field(default_factory=list)  # of the adapted layers, as they were found
    kept: set[str] = field(default_factory=set)  # other parameters that are saved though frozen: the base lacks them
    noted: Noted = field(default_factory=Noted)  # those that were seen to train: saved though frozen since
    statistics: dict[str, Tensor] = field(default_factory=dict)  # running ones of the model before it trained
    tables: dict[str, Any] = field(default_factory=dict)  # embeddings of which some rows train whole, by name
    tied: list[Any] = field(default_factory=list)  # what gives heads the adapters of embeddings, as chains are active
    watches: list[Any] = field(default_factory=list)  # what sees to it that a head runs, as chains are active
    spread: str = ""  # why the adapters here are not those that were trained, while they are not
    restarts: int = 0  # how often restart_reslora has changed the weights for good
    merged: Any = None  # what merge_reslora did, while it is in force
    hooks: list[Any] = field(default_factory=list)  # handles of those that open the chains' forward passes, and others
    others: dict[str, SetAside] = field(default_factory=dict)  # the model's other adapters
    together: tuple[str, ...] = ()  # which of those are in force beside this one
    layers: dict[str, AdapterLayer] | None = None  # those beside linear layers (PEFT); None: those in their places

    def put_in_force(self, active: bool) -> None:
        """Let the hooks of this adapter open forward passes, or not."""
        for chain in self.chains:
            chain.active = active
        for part in (*self.groups, *self.tied, *self.watches):
            part.active = active


@dataclass
class SetAside:
    """An adapter that is not in its model now."""

    record: Record
    layers: dict[str, AdapterLayer]


def checked_name(adapter_name: str) -> str:
    """The name of an adapter; TypeError or ValueError if it cannot be one."""
    if not isinstance(adapter_name, str):
        raise TypeError(f"adapter_name must be a str, got {adapter_name!r}")
    if not re.fullmatch(r"[A-Za-z0-9_\-]+", adapter_name):
        raise ValueError(f"adapter_name must be letters, digits, '_' and '-', got {adapter_name!r}")
    return adapter_name


def adapted_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """The adapted layers by name, in registration order; wrappers' prefixes (DDP, torch.compile) are left off.

    Raises:
        ValueError: several adapters are in force, and whoever asks means one.
    """
    record = record_of(model)
    if record.together:
        names = [record.name, *record.together]
        raise ValueError(
            f"adapters {names} are in force together, and this is for one: call set_adapter(model, {names[0]!r}), or "
            "say which where there is an adapter_name=. add_weighted_adapter makes one of several"
        )
    return layers_in_place(model)


def layers_in_place(model: nn.Module) -> dict[str, AdapterLayer]:
    """The same, whatever is in force: of several adapters in one place the layer of the first."""
    beside = record_of(model).layers
    if beside is not None:
        return dict(beside)
    return layers_by_name(root_of(model))


def is_adapted(model: nn.Module) -> bool:
    """Whether an adapted layer is anywhere in ``model``."""
    return any(isinstance(module, AdapterLayer) for module in model.modules())


def in_force(model: nn.Module) -> list[tuple[Record, dict[str, AdapterLayer]]]:
    """The record and the layers by name of each adapter in force."""
    record = record_of(model)
    placed = layers_in_place(model)
    if record.together and record.layers is None:
        placed = {name: layer for name, layer in placed.items() if name in record.layer_names}
    return [(record, placed), *((record.others[name].record, record.others[name].layers) for name in record.together)]


def layers_by_name(root: nn.Module) -> dict[str, AdapterLayer]:
    """Every adapted layer inside ``root``."""
    return {without_wrappers(name): m for name, m in root.named_modules() if isinstance(m, AdapterLayer)}


def complete_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """``adapted_layers``; ValueError, which names it, if one is no longer in the model or was trained elsewhere."""
    layers = adapted_layers(model)
    refuse_incomplete(root_of(model), record_of(model), layers)
    return layers


def refuse_incomplete(root: nn.Module, record: Record, layers: Mapping[str, AdapterLayer]) -> None:
    """The same for one of the adapters in force."""
    if record.spread:
        raise ValueError(record.spread)
    refuse_lost(root, record, layers)
    for name, layer in layers.items():
        _refuse_computed(name, layer, getattr(layer, "holds_weight", layer), getattr(layer, "owner", layer))


def refuse_lost(root: nn.Module, record: Record, layers: Mapping[str, AdapterLayer]) -> None:
    """ValueError, which names it, for a layer that is no longer in the model, or that only a copy of a block holds."""
    if record.layers is not None:
        for name, layer in layers.items():
            refuse_replaced(*place_of(root, record, name, layer), layer, name)
    for name in sorted(set(record.layer_names) - layers.keys()):
        raise ValueError(gone(name, at(root, name)))
    for name in sorted(layers.keys() - set(record.layer_names)) if record.layers is None else ():
        raise ValueError(copied(name))
    for name, rows in record.tables.items():
        refuse_replaced(*place_of(root, record, name, rows.table), rows.table, name)


def _refuse_computed(name: str, *modules: nn.Module) -> None:
    """ValueError if a parameter of an adapted layer is computed from others, which a merge would not reach."""
    for module in modules:
        own = module._parameters
        made = [key.removesuffix("_orig") for key in own if key.endswith("_orig")]
        made += [key.removesuffix("_g") for key in own if key.endswith("_g") and f"{key[:-2]}_v" in own]
        made += getattr(module, "parametrizations", {})
        if made:
            raise ValueError(
                f"{made[0]!r} of layer {name!r} is computed in each forward since the layer was adapted (weight_norm, "
                "spectral_norm, pruning, a parametrization): make it permanent first (prune.remove, "
                "remove_parametrizations)"
            )


def place_of(root: nn.Module, record: Record, name: str, layer: Any) -> tuple[nn.Module | None, str]:
    """The module that has ``layer`` as a child, and as which."""
    if record.layers is not None:
        return layer.holder.reslora_adapter, record.name
    path, _, child = name.rpartition(".")
    parent = at(root, path)
    return None if parent is None else unwrapped(parent), child


def holds(place: nn.Module | None, layer: Any) -> bool:
    """Whether ``layer`` is in force at a place, by itself or beside that of another adapter."""
    if place is layer or not isinstance(place, AdapterLayer):
        return place is layer
    return any(layer is other for part in place.division for other in part.layers)


def refuse_replaced(parent: nn.Module | None, child: str, layer: Any, name: str) -> None:
    """ValueError if ``parent`` has another module in the place of ``layer``, and not one around it."""
    there = None if parent is None else parent._modules.get(child)
    if there is not None and not any(holds(module, layer) for module in there.modules()):
        raise ValueError(gone(name, there))


def gone(name: str, there: nn.Module | None) -> str:
    """What is wrong with an adapted layer in whose place ``there`` is."""
    if there is None:
        return f"layer {name!r} was adapted and is gone. Change the model first, then adapt it"
    if isinstance(there, AdapterLayer):
        return f"layer {name!r} was adapted and is gone: a copy of it, or another one, is in its place"
    if is_adapted(there):
        return (
            f"layer {name!r} was adapted, and is inside a {type(there).__module__}.{type(there).__name__} now: another "
            "adapter was put around it, which fits the merged model. Call merge_reslora first, then add the other"
        )
    return (
        f"layer {name!r} was adapted and is gone: a {type(there).__name__} is in its place. What puts its own layers "
        "in the place of linear ones (float8, QAT, quantize_dynamic, resize_token_embeddings) takes adapted ones, too: "
        "leave them out of it (module_filter_fn, filter_fn), or change the model first, then adapt it"
    )


def copied(name: str) -> str:
    """What is wrong with an adapted layer that the record does not know."""
    return (
        f"layer {name!r} is a copy of an adapted one that came into the model later, where no save or merge knows it: "
        "copy blocks first, then adapt the model"
    )


def root_of(model: nn.Module) -> nn.Module:
    """The module that apply_reslora was given, which may sit inside a wrapper such as DDP.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: there is none, or more than one, or ``model`` is a part of one.
    """
    check_module("model", model)
    modules = model.named_modules()
    roots: dict[str, nn.Module] = {
        name: each for name, each in modules if isinstance(vars(each).get("_reslora"), Record)
    }
    if not roots and is_adapted(model):
        raise ValueError(
            "model is a part of an adapted model, or a copy of a part: give, or copy, the whole that apply_reslora was "
            "given"
        )
    if not roots:
        raise ValueError(
            "model has no ResLoRA adapters: call apply_reslora(model, config) or load_adapter(model, path) first"
        )
    if len(roots) == 1:
        return next(iter(roots.values()))
    parts = [reached(name) for name in roots if name]
    if model is roots.get(""):
        raise ValueError(
            f"model was adapted, and {parts[0]} inside it by itself: merge_and_unload({parts[0]}) first, or adapt both "
            "as one"
        )
    raise ValueError(f"model holds {len(roots)} adapted models, and this is for one: give {' or '.join(parts)}")


def reached(name: str) -> str:
    """How Python reaches the module of that name."""
    numbered = any(part.isdecimal() for part in name.split("."))
    return f"model.get_submodule({name!r})" if numbered else f"model.{name}"


def record_of(model: nn.Module) -> Record:
    """The record of an adapted model; ValueError if it is not adapted."""
    record: Record = root_of(model).__dict__["_reslora"]
    return record


def refuse_beside(model: nn.Module, verb: str, instead: str) -> None:
    """Raise a ValueError if the adapters stand beside the linear layers, where PEFT holds them."""
    if record_of(model).layers is not None:
        raise ValueError(f"the model's adapters are held by PEFT and cannot be {verb} here: {instead}")


def refuse_restarted(model: nn.Module) -> None:
    """Raise a ValueError if the frozen weights are no longer those of the base model."""
    if record_of(model).restarts:
        raise ValueError(
            "model was restarted (restart_reslora): its weights hold updates that an adapter alone would lose. "
            "Save the whole model, with save_pretrained or state_dict"
        )

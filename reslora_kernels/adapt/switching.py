"""Several adapters on one base model: one is in force, or some that sum; the others are set aside, chains and all.

An adapter that is set aside is not part of the model: neither ``parameters()`` nor ``state_dict()`` hold it, and its
layers share the base's weights. Switching puts its layers back in their places; no value is copied or computed. Where
several are in force, the first one's layer is in the place, and the others' parameters are those of its children.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..checks import check_int
from ..config import ResLoRAConfig, checked_config
from ..dtensors import refuse_sharded
from ..layers.adapter import AdapterLayer, not_started
from ..layers.several import BASE, names_by_module, parts_for
from .apply import adapt, apply_reslora, put_in_place, replace_modules
from .execution import find_samples
from .linking import Chains, structural_chains
from .record import (
    Record,
    SetAside,
    checked_name,
    is_adapted,
    layers_by_name,
    layers_in_place,
    record_of,
    refuse_beside,
    root_of,
)  # fmt: skip
from .targets import find_targets


def adapter_names(model: nn.Module) -> list[str]:
    """The names of all adapters of the model, the one in force first."""
    record = record_of(model)
    return [*dict.fromkeys((record.name, *record.together, *record.others))]


def add_adapter(
    model: nn.Module,
    adapter_name: str,
    config: ResLoRAConfig,
    *,
    example_inputs: Any = None,
    autocast_adapter_dtype: bool = True,
    chains: Chains | None = None,
) -> nn.Module:
    """Give an adapted model another adapter, with its own layers, ranks and shortcut; ``set_adapter`` puts it in force.

    Arguments and errors are those of ``apply_reslora``. Both adapters need ``bias="none"`` and no ``modules_to_save``,
    as those would train the base model that they share. On an error the model is as it was.

    Returns:
        ``model``.
    """
    checked_config(config)
    if adapter_name in adapter_names(model):
        raise ValueError(f"adapter_name must be a new one, got {adapter_name!r}: the model has {adapter_names(model)}")
    with in_place_of_the_active_one(model, adapter_name):
        apply_reslora(
            root_of(model),
            config,
            example_inputs=example_inputs,
            autocast_adapter_dtype=autocast_adapter_dtype,
            chains=chains,
        )
        _refuse_shared(config)
    return model


def set_adapter(model: nn.Module, adapter_name: str | Sequence[str]) -> nn.Module:
    """Put another adapter in force. Do so before the model is wrapped (DDP) or sharded, and build an optimizer for it.

    Several names put all of them in force: a layer then computes x Wᵀ + b + the sum of their low-rank terms, each with
    its own scaling, dropout and chain, and all of them train. ``merge_reslora`` merges their sum; ``save_adapter`` and
    ``export_peft`` take one of them by its name. What is for one adapter (``inspect``, ...) is refused meanwhile.

    Returns:
        ``model``.

    Raises:
        TypeError, ValueError: no adapter has this name, or the model is merged or sharded; or several are named of
            which one uses DoRA, whose norm is of one update, or is spread by a tensor parallel plan. Nothing is changed
            then.
        RuntimeError: statistics of the model are being collected.
    """
    given: Any = adapter_name
    names: list[str] = list(given) if isinstance(given, (list, tuple)) else [given]
    record = record_of(model)
    _check_names(record, names)
    if names == [record.name, *record.together]:
        return model
    root = _ready(model)
    if len(names) > 1:
        refuse_in_sum({name: _layers(root, name) for name in names})
    known = record.others | {record.name: _set_aside(root)}
    record.together = ()
    known[names[0]].record.together = tuple(names[1:])
    _put_back(root, known.pop(names[0]), known)
    return model


def _check_names(record: Record, names: Sequence[str]) -> None:
    if not names or len(set(names)) != len(names):
        raise ValueError(f"adapter_name must be a name, or a list of names that differ, got {names!r}")
    for name in names:
        if checked_name(name) != record.name:
            _known(record, name)


def refuse_in_sum(adapters: Mapping[str, Mapping[str, AdapterLayer]]) -> None:
    """ValueError for adapters, by name and layer, that cannot be in force together."""
    for adapter, layers in adapters.items():
        for name, layer in layers.items():
            if layer.config.use_dora:
                raise ValueError(
                    f"adapter {adapter!r} cannot be in force with others: layer {name!r} uses DoRA, whose norm is of "
                    "one update. Put it in force alone, or merge it"
                )
            if layer.unstarted:
                raise ValueError(f"adapter {adapter!r} cannot be in force with others: {not_started(layer.config)}")
            if not layer.sums:
                raise ValueError(
                    f"adapter {adapter!r} cannot be in force with others: layer {name!r} is spread by a tensor "
                    "parallel plan. Put it in force alone, or make one adapter of several (add_weighted_adapter)"
                )


@contextmanager
def adapters_per_sample(model: nn.Module, names: Sequence[str], *, num_beams: int = 1) -> Iterator[None]:
    """Inside the ``with`` block, sample i of every batch runs through adapter ``names[i]``; "__base__" is none of them.

    For inference. Every sample gets what it would get alone, whatever the adapters' shortcuts: each layer runs the
    samples of one adapter together. Biases and modules that train are everyone's.

    Args:
        names: a name for each sample of the batch, its first dimension.
        num_beams: that of ``generate``, which repeats every sample so often, but for an encoder.

    Raises:
        TypeError: ``names`` is no list or tuple.
        ValueError: the model is in training mode, merged or sharded, no adapter has such a name, or one of them holds
            what cannot run for some samples only: DoRA, experts, ``nn.MultiheadAttention``, tensor parallel layers, a
            tied head, trained tokens. Inside the block: a layer sees another number of samples.
    """
    check_int("num_beams", num_beams, 1, None)
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"names must be a list of names, one for each sample, got {names!r}")
    if model.training:
        raise ValueError(
            "adapters for single samples are for inference, and the model is in training mode: call eval()"
        )
    record, root = record_of(model), _ready(model)
    before = [record.name, *record.together]
    used = [name for name in dict.fromkeys(names) if name != BASE] or before
    _check_names(record, used)
    adapters = {name: _layers(root, name) for name in used}
    refuse_samples(adapters)
    if record.tables:
        raise ValueError("trained tokens (trainable_token_indices) are those of every sample: split the batch")
    set_adapter(model, used)
    places = layers_in_place(model)
    find_samples(root, places.values())
    sums = {name: layer.division for name, layer in places.items()}
    names_of = names_by_module(root, names, num_beams)
    try:
        for name, layer in places.items():
            own = {adapter: layers[name] for adapter, layers in adapters.items() if name in layers}
            layer.division = parts_for(names_of(layer), own)
        yield
    finally:
        for name, layer in places.items():
            layer.division = sums[name]
        set_adapter(model, before)


def refuse_samples(adapters: Mapping[str, Mapping[str, AdapterLayer]]) -> None:
    """ValueError for adapters that cannot run for some samples of a batch only."""
    for adapter, layers in adapters.items():
        for name, layer in layers.items():
            if (what := layer.refuses_samples()) is not None:
                raise ValueError(
                    f"adapter {adapter!r} cannot run for single samples of a batch: layer {name!r} {what}. Split the "
                    "batch, and call set_adapter for each part"
                )


def _layers(root: nn.Module, adapter_name: str) -> dict[str, AdapterLayer]:
    """The layers of an adapter by name, in force or not."""
    record = record_of(root)
    if adapter_name != record.name:
        return record.others[adapter_name].layers
    return {name: layer for name, layer in layers_in_place(root).items() if name in record.layer_names}


def delete_adapter(model: nn.Module, adapter_name: str) -> nn.Module:
    """Forget an adapter that is not in force.

    Returns:
        ``model``.

    Raises:
        TypeError, ValueError: no adapter has this name, or it is in force.
    """
    record = record_of(model)
    if checked_name(adapter_name) in (record.name, *record.together):
        raise ValueError(f"adapter {adapter_name!r} is in force: put another in force first (set_adapter)")
    _known(record, adapter_name)
    for hook in record.others.pop(adapter_name).record.hooks:
        hook.remove()
    return model


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Inside the ``with`` block the model computes what its base does; biases and modules that train stay as they are.

    So it does with any other of its adapters that ``set_adapter`` or ``adapters_per_sample`` puts in force there.

    Raises:
        ValueError: the model is merged: its weights hold the update. Inside the block: an adapter is added.
    """
    record = record_of(model)
    if record.merged is not None:
        raise ValueError("model is merged: call unmerge_reslora(model) first")
    if record.together:
        refuse_beside(model, "disabled", "call disable_adapter() of the PeftModel")
    layers = [*layers_in_place(model).values()]
    layers += [layer for other in record.others.values() for layer in other.layers.values()]
    parts = (*layers, *record.tables.values())
    before = {part: part.disabled for part in parts}
    try:
        for part in before:
            part.disabled = True
        yield
    finally:
        for part, disabled in before.items():
            part.disabled = disabled


@contextmanager
def only_in_force(model: nn.Module, adapter_name: str | None) -> Iterator[None]:
    """For the block, one adapter in force by itself; None: those that are in force."""
    record = record_of(model)
    before = [record.name, *record.together]
    if adapter_name is None or [adapter_name] == before:
        yield
        return
    set_adapter(model, adapter_name)
    try:
        yield
    finally:
        set_adapter(model, before)


@contextmanager
def in_place_of_the_active_one(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """For the block, the adapter ``adapter_name`` in force; none if there is none, which the block then adds.

    Afterwards the one that was in force is so again; if the block fails the adapters are those from before.
    """
    checked_name(adapter_name)
    root, record = _ready(model), record_of(model)
    if adapter_name not in record.others:
        _refuse_shared(record.config)
        if any(layer.disabled for layer in layers_in_place(model).values()):
            raise ValueError("the model's adapters are disabled: leave disable_adapter before one is added")
    trained = {parameter: parameter.requires_grad for parameter in root.parameters()}
    others, active = dict(record.others), _set_aside(root)
    known = others.pop(adapter_name, None)
    if known is not None:
        _put_back(root, known, {})
    try:
        yield
        record_of(root).name = adapter_name
        others[adapter_name] = _set_aside(root)
    except BaseException:
        if is_adapted(root):
            for hook in _set_aside(root).record.hooks if known is None else ():
                hook.remove()
        if known is not None:
            others[adapter_name] = known
        raise
    finally:
        for parameter, flag in trained.items():
            parameter.requires_grad_(flag)
        _put_back(root, active, others)


def adapt_anew(model: nn.Module, config: ResLoRAConfig) -> nn.Module:
    """Put new layers as ``config`` says in the place of the adapter in force, which is forgotten.

    Layers that it does not target lose their adapters; no chain hands anything on before and afterwards.

    Returns:
        ``model``; on an error it is as it was.
    """
    root, record = _ready(model), record_of(model)
    trained = {parameter: parameter.requires_grad for parameter in root.parameters()}
    autocast = all(layer.lora_A.dtype.itemsize >= 4 for layer in layers_in_place(root).values())
    others, old = dict(record.others), _set_aside(root)
    try:
        targets = find_targets(root, config)
        reads = ([name for name in names if name in targets.matched] for names in record.same_input)
        new = Record(config, targets.unmatched, record.name, record.order, record.note)
        new.same_input = [names for names in reads if len(names) > 1]
        adapt(root, targets.matched, new, structural_chains(root, targets.matched, config), autocast)
    except BaseException:
        _put_back(root, old, others)
        raise
    new.others = others
    for hook in record.hooks:
        hook.remove()
    for parameter in root.parameters():
        parameter.requires_grad_(trained.get(parameter, parameter.requires_grad))
    return model


def _ready(model: nn.Module) -> nn.Module:
    """The adapted root, if its adapters can be switched now."""
    refuse_beside(model, "switched", "call add_adapter and set_adapter of the PeftModel")
    refuse_sharded(model, "switched to another adapter", "do that before shard_reslora")
    if record_of(model).merged is not None:
        raise ValueError("model is merged: call unmerge_reslora(model) before its adapters are switched")
    if any(layer.observer is not None for layer in layers_in_place(model).values()):
        raise RuntimeError("statistics of this model are being collected: switch its adapters after that")
    return root_of(model)


def _known(record: Record, adapter_name: str) -> None:
    if adapter_name not in record.others:
        raise ValueError(f"adapter_name must be one of {[record.name, *record.others]}, got {adapter_name!r}")


def _refuse_shared(config: ResLoRAConfig) -> None:
    if config.bias != "none" or config.modules_to_save or config.trainable_token_indices:
        raise ValueError(
            "several adapters need bias='none', modules_to_save=None and trainable_token_indices=None, as they share "
            f"the base model: got bias={config.bias!r}, modules_to_save={config.modules_to_save!r}, "
            f"trainable_token_indices={config.trainable_token_indices!r}"
        )


def _set_aside(root: nn.Module) -> SetAside:
    """Take the adapters in force out of the model; plain linear layers take their places."""
    record, places = record_of(root), layers_in_place(root)
    for layer in places.values():
        layer.stand_alone()
    for name in record.together:
        record.others[name].record.put_in_force(False)
    record.put_in_force(False)
    own = _layers(root, record.name)
    record.others = {}
    replace_modules(root, {id(layer): layer.leave() for layer in places.values()})
    return SetAside(record, own)


def _put_back(root: nn.Module, adapter: SetAside, others: dict[str, SetAside]) -> None:
    """The inverse, on the base as it is now: it may have moved to another device since."""
    _place(root, adapter.layers)
    adapter.record.put_in_force(True)
    for name in adapter.record.together:
        places = layers_by_name(root)
        for layer_name in places.keys() & others[name].layers.keys():
            places[layer_name].stand_beside(name, others[name].layers[layer_name])
        _place(root, {name: layer for name, layer in others[name].layers.items() if name not in places})
        others[name].record.put_in_force(True)
    root.__dict__["_reslora"] = adapter.record
    adapter.record.others = others


def _place(root: nn.Module, layers: Mapping[str, AdapterLayer]) -> None:
    """Put layers in the places that they have by name."""
    pairs: list[tuple[Any, AdapterLayer]] = []
    for name, layer in layers.items():
        base = layer.base_in(root, name)
        if isinstance(base, nn.Module):
            layer.take_place_of(base)
        for parameter in layer.adapter_parameters().values():
            parameter.data = parameter.data.to(layer.execution_device)
        pairs.append((base, layer))
    put_in_place(root, pairs)

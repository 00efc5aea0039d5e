"""Several adapters on one base model: one is in force, the others are set aside with their layers and chains.

An adapter that is set aside is not part of the model: neither ``parameters()`` nor ``state_dict()`` hold it, and its
layers share the base's weights. Switching puts its layers back in their places; no value is copied or computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..config import ResLoRAConfig, checked_config
from ..dtensors import refuse_sharded
from ..layers.adapter import AdapterLayer
from .apply import apply_reslora, put_in_place, replace_modules
from .record import Record, SetAside, adapted_layers, checked_name, record_of, refuse_beside, root_of
from .structure import Chains


def adapter_names(model: nn.Module) -> list[str]:
    """The names of all adapters of the model, the one in force first."""
    record = record_of(model)
    return [record.name, *record.others]


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


def set_adapter(model: nn.Module, adapter_name: str) -> nn.Module:
    """Put another adapter in force. Do so before the model is wrapped (DDP) or sharded, and build an optimizer for it.

    Returns:
        ``model``.

    Raises:
        TypeError, ValueError: no adapter has this name, or the model is merged or sharded. Nothing is changed then.
        RuntimeError: statistics of the model are being collected.
    """
    record = record_of(model)
    if checked_name(adapter_name) == record.name:
        return model
    _known(record, adapter_name)
    root = _ready(model)
    others, active = record.others, _set_aside(root)
    _put_back(root, others.pop(adapter_name), others | {record.name: active})
    return model


def delete_adapter(model: nn.Module, adapter_name: str) -> nn.Module:
    """Forget an adapter that is not in force.

    Returns:
        ``model``.

    Raises:
        TypeError, ValueError: no adapter has this name, or it is in force.
    """
    record = record_of(model)
    if checked_name(adapter_name) == record.name:
        raise ValueError(f"adapter {adapter_name!r} is in force: put another in force first (set_adapter)")
    _known(record, adapter_name)
    for hook in record.others.pop(adapter_name).record.hooks:
        hook.remove()
    return model


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Inside the ``with`` block the model computes what its base does; biases and modules that train stay as they are.

    Raises:
        ValueError: the model is merged: its weights hold the update.
    """
    if record_of(model).merged is not None:
        raise ValueError("model is merged: call unmerge_reslora(model) first")
    parts = (*adapted_layers(model).values(), *record_of(model).tables.values())
    before = {part: part.disabled for part in parts}
    try:
        for part in before:
            part.disabled = True
        yield
    finally:
        for part, disabled in before.items():
            part.disabled = disabled


@contextmanager
def in_place_of_the_active_one(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """For the block, the adapter ``adapter_name`` in force; none if there is none, which the block then adds.

    Afterwards the one that was in force is so again; if the block fails the adapters are those from before.
    """
    checked_name(adapter_name)
    root, record = _ready(model), record_of(model)
    if adapter_name not in record.others:
        _refuse_shared(record.config)
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
        if any(isinstance(module, AdapterLayer) for module in root.modules()):
            for hook in _set_aside(root).record.hooks if known is None else ():
                hook.remove()
        if known is not None:
            others[adapter_name] = known
        raise
    finally:
        for parameter, flag in trained.items():
            parameter.requires_grad_(flag)
        _put_back(root, active, others)


def _ready(model: nn.Module) -> nn.Module:
    """The adapted root, if its adapters can be switched now."""
    refuse_beside(model, "switched", "call add_adapter and set_adapter of the PeftModel")
    refuse_sharded(model, "switched to another adapter", "do that before shard_reslora")
    if record_of(model).merged is not None:
        raise ValueError("model is merged: call unmerge_reslora(model) before its adapters are switched")
    if any(layer.observer is not None for layer in adapted_layers(model).values()):
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
    """Take the adapter in force out of the model; plain linear layers take its places."""
    record, layers = record_of(root), adapted_layers(root)
    record.put_in_force(False)
    record.others = {}
    replace_modules(root, {id(layer): layer.leave() for layer in layers.values()})
    return SetAside(record, layers)


def _put_back(root: nn.Module, adapter: SetAside, others: dict[str, SetAside]) -> None:
    """The inverse, on the base as it is now: it may have moved to another device since."""
    pairs: list[tuple[Any, AdapterLayer]] = []
    for name, layer in adapter.layers.items():
        base = layer.base_in(root, name)
        if isinstance(base, nn.Module):
            layer.take_place_of(base)
        for parameter in layer.adapter_parameters().values():
            parameter.data = parameter.data.to(layer.execution_device)
        pairs.append((base, layer))
    put_in_place(root, pairs)
    adapter.record.put_in_force(True)
    root.__dict__["_reslora"] = adapter.record
    adapter.record.others = others

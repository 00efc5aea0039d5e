"""save_adapter and load_adapter: trained adapters of a model, to and from the files of ``adapter_format``."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapt.apply import adapt, without_hand_over
from ..adapt.checkpoints import Beside, beside, check_shared, named_buffers, named_parameters
from ..adapt.linking import ChainPlan, confirm_order, names_of_experts, structural_chains
from ..adapt.obstacles import refuse_foreign_hooks
from ..adapt.record import (
    Record,
    adapted_layers,
    checked_name,
    complete_layers,
    is_adapted,
    reached,
    record_of,
    refuse_beside,
    refuse_restarted,
    root_of,
)
from ..adapt.switching import in_place_of_the_active_one, only_in_force
from ..adapt.targets import find_targets
from ..adapt.trained_tokens import token_shapes
from ..checks import check_bool, check_module
from ..dtensors import fill, gathered, is_fsdp, one_writer, refuse_flat, refuse_partitioned, reshard, whole_shape
from ..layers.adapter import AdapterLayer, not_started
from ..layers.kinds import config_of, shapes_of, signature_of, weight_of
from ..layers.offloading import offloader
from ..layers.shortcuts import gates_shape, hands_on
from .adapter_format import CONFIG_NAME, WEIGHTS_NAME, SavedAdapter, checked_folder, encoded, parsed, read, write


def settled_chains(saved: SavedAdapter, model: nn.Module, layers: Mapping[str, nn.Module]) -> list[ChainPlan]:
    """The chains to link in ``model``: those of the file, which the adapter was trained in.

    Earlier versions read chains off a run, by the last part of a name and the shapes of the tokens. Where the structure
    gives others, a warning says so.

    Raises:
        ValueError: in the file of an earlier version, layers of experts were handed the rows of other tokens, or took
            their own input twice, which is not computed any more.
    """
    structural = structural_chains(model, layers, saved.config)
    if saved.chains is None or saved.chains_from == "given":
        return saved.chains or structural
    experts = names_of_experts(structural)
    if saved.chains_from is None and experts and hands_on(saved.config.shortcut, saved.config.pre_num):
        raise ValueError(
            f"{CONFIG_NAME}: an earlier version trained this adapter with {saved.config.shortcut!r} along layers of "
            f"experts ({experts[0]!r} and {len(experts) - 1} more), which see a choice of the tokens and hand nothing "
            "on any more. Train it again, or leave those layers out with exclude_modules"
        )
    same = sorted(plan.names for plan in saved.chains) == sorted(plan.names for plan in structural)
    if not same:
        known = [plan.names for plan in structural]
        other = [f"{plan.title!r} ({', '.join(plan.names)})" for plan in saved.chains if plan.names not in known]
        warnings.warn(
            f"the adapter was trained in other chains than the model's structure gives: {'; '.join(other)}. They are "
            "used as stored; train a new adapter to use those of the structure",
            stacklevel=3,
        )
    return structural if same else saved.chains


_MUST_AGREE = (
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "split_expert_r", "use_rslora", "use_dora", "has_start",
    "shortcut", "pre_num", "gates", "trainable_token_indices", "ensure_weight_tying",
)  # fmt: skip


def save_adapter(model: nn.Module, path: str | os.PathLike[str], adapter_name: str | None = None) -> Path:
    """Save the adapters, and what else a base model loaded anew would lack, to the folder ``path``.

    That is every other trained parameter, and frozen ones which the base checkpoint does not define: task heads,
    resized embeddings, and what an earlier adapter's file had given values to. And running statistics (batch norm's)
    that are not as they were when the model was adapted.

    Everything that ``load_adapter`` refuses is refused here, before anything is replaced. The folder is made if need
    be; other files in it are left alone. A crash at any moment leaves the previous adapter or the new one, whole. File
    modes follow the umask. With a model sharded over processes all of them call this: the adapters are gathered, the
    first process writes them under their usual names, and all return when it has.

    Args:
        adapter_name: which adapter of the model, in force or not; None is the one in force.

    Returns:
        the folder.

    Raises:
        TypeError, ValueError: ``model`` is not adapted, was restarted or has lost an adapted layer; its adapters wait
            for ``start_adapters``; its parameters are on the meta device, or hold NaN or Inf. The folder is as it was
            then.
        NotADirectoryError: ``path`` is a file.
        RuntimeError: the process that writes failed.
    """
    with only_in_force(model, adapter_name):
        return _save(model, path)


def refuse_unsaved(model: nn.Module) -> None:
    """ValueError if ``save_adapter`` would refuse the model whatever is in it."""
    refuse_beside(model, "saved", "call save_pretrained of the PeftModel, then reslora_kernels.peft.to_native")
    refuse_flat(model)
    complete_layers(model)
    refuse_restarted(model)


def _save(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    refuse_unsaved(model)
    layers = adapted_layers(model)
    if any(layer.unstarted for layer in layers.values()):
        raise ValueError(f"nothing was saved: {not_started(record_of(model).config)}")
    reshard(model)  # what is unsharded is let go of with this
    others = beside(model)
    tensors = _own_parameters(layers) | others.trained | others.frozen
    if any(tensor.is_meta for tensor in tensors.values()):
        raise ValueError("model has parameters on the meta device: there are no values to save")
    whole, mesh = gathered(tensors)
    with one_writer(mesh) as writes:
        if writes:
            files = encoded(_described(model, others), whole)
            try:
                check_fit(parsed(*files), root_of(model), layers)
            except ValueError as error:
                raise ValueError(f"nothing was saved: load_adapter would refuse it: {error}") from None
            write(checked_folder(path), *files)
    return Path(path)


def _described(model: nn.Module, others: Beside) -> dict[str, Any]:
    """What the config file says of the adapters."""
    record = record_of(model)
    names = {id(layer): name for name, layer in adapted_layers(model).items()}
    return {
        "config": record.config.to_dict(),
        "chains": [
            {"name": chain.name, "layers": members, "experts": not record.experts.isdisjoint(members)}
            for chain in record.chains
            if (members := [names[id(layer)] for layer in chain.layers])
        ],
        "chains_from": "given" if record.given else "structure",
        "same_input": record.same_input,
        "trained_parameters": sorted(others.trained),
        "frozen_parameters": sorted(others.frozen),
        "base_model_name_or_path": getattr(getattr(root_of(model), "config", None), "_name_or_path", None) or None,
    }


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    adapter_name: str | None = None,
    *,
    low_cpu_mem_usage: bool = True,
) -> nn.Module:
    """Load what ``save_adapter`` wrote: adapt a plain model as it was adapted then, or fill the adapters it has.

    Everything is checked before the model is touched: file types, the hash, keys, shapes, dtypes and values. Links to
    files are followed, so a snapshot in the Hub's cache loads as it is. Every process of a sharded model must call
    this.

    Args:
        adapter_name: which adapter of the model to fill, or the name of a new one, which ``set_adapter`` puts in force;
            None is the one in force, or "default" on a plain model.
        low_cpu_mem_usage: taken for those who know it from PEFT, and either way the same: new adapters are made without
            a start and filled from the file.

    Returns:
        ``model``.

    Raises:
        FileNotFoundError: the folder holds no adapter.
        ValueError: the files are damaged, or do not fit the model; the message says where. The model is unchanged.
    """
    check_module("model", model)
    check_bool("low_cpu_mem_usage", low_cpu_mem_usage)
    if adapter_name is not None:
        checked_name(adapter_name)
    saved = read(checked_folder(path))
    adapted = is_adapted(model)
    if adapted:
        refuse_beside(model, "loaded", "call reslora_kernels.peft.from_native, then load_adapter of the PeftModel")
    refuse_flat(model)
    refuse_partitioned(model)
    if not adapted and is_fsdp(model):
        raise ValueError("model is sharded over processes: load the adapter first, then call shard_reslora")
    if adapted and adapter_name not in (None, record_of(model).name):
        assert adapter_name is not None
        if saved.beside:
            raise ValueError(
                f"adapter {adapter_name!r} comes with parameters of the base model ({saved.beside[0]!r}), which the "
                "model's other adapters share; load it into a model of its own"
            )
        with in_place_of_the_active_one(model, adapter_name):
            load_adapter(root_of(model), path)
        return model
    if adapted:
        model_root = root_of(model)
        record, layers = record_of(model), dict[str, Any](adapted_layers(model))
    else:
        model_root = model
        targets = find_targets(model, saved.config)
        refuse_foreign_hooks(model, targets.matched, saved.config)
        record, layers = Record(saved.config, targets.unmatched, adapter_name or "default"), dict(targets.matched)
    if not saved.layers & layers.keys():
        saved = saved.unwrapped()
    if adapted:
        _check_agreement(record, saved, {id(layer): name for name, layer in layers.items()})
    _refuse_without_values(layers)
    check_fit(saved, model_root, layers)
    if not adapted:
        plans = settled_chains(saved, model, layers)
        record.given = plans is saved.chains  # not those of the structure
        if saved.chains is None:
            confirm_order(model, layers, plans, None, record)
        else:
            record.order, record.same_input = "adapter file", saved.same_input
        adapt(model, layers, record, plans, autocast_adapter_dtype=True, init_values=False)
    reshard(model)
    values = named_parameters(root_of(model)) | named_buffers(root_of(model))
    record_of(model).kept |= set(saved.beside)
    with torch.no_grad():
        for key, tensor in saved.tensors.items():
            fill(values[key], tensor)
            if key in saved.trained:
                values[key].requires_grad_(True)
    for layer in adapted_layers(model).values():
        layer.unstarted = False
    return model


def _own_parameters(layers: Mapping[str, AdapterLayer]) -> dict[str, Tensor]:
    return {
        f"{name}.{own}": value for name, layer in layers.items() for own, value in layer.adapter_parameters().items()
    }


def _check_agreement(record: Record, saved: SavedAdapter, names: Mapping[int, str]) -> None:
    """An adapted model takes an adapter only if both were made the same way."""
    if record.merged is not None:
        raise ValueError("model is merged; call unmerge_reslora(model) before loading another adapter")
    for name in _MUST_AGREE:
        own, other = getattr(record.config, name), getattr(saved.config, name)
        if own != other:
            raise ValueError(f"the model's adapters have {name}={own!r}, the saved ones {name}={other!r}")
    own_chains = sorted([names[id(layer)] for layer in chain.layers] for chain in record.chains)
    if saved.chains is not None and own_chains != sorted(plan.names for plan in saved.chains):
        raise ValueError(
            "the saved adapter links other layers, or in another order, than the model does: load it into the plain "
            "model, or adapt the model with chains= as in its file"
        )


def _refuse_without_values(layers: Mapping[str, Any]) -> None:
    for name, layer in layers.items():
        if weight_of(layer).is_meta and (not isinstance(layer, nn.Module) or offloader(layer) is None):
            raise ValueError(f"model has no values yet: weight of {name!r} is on the meta device")


def _shapes_of_gates(saved: SavedAdapter, root: nn.Module, layers: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """By the places in the chains that are linked in a model which loads the adapter."""
    if saved.config.gates == "none":
        return {}
    shapes: dict[str, tuple[int, ...]] = {}
    for _, names, experts in saved.chains or structural_chains(root, layers, saved.config):
        for position, name in enumerate(names):
            config = config_of(saved.config, name, layers.get(name))
            shape = gates_shape(without_hand_over(config) if experts else config, position)
            if shape is not None and name in layers:
                shapes[f"{name}.lora_gates"] = shape
    return shapes


def _why_shifted(saved: Collection[str], layers: Collection[str]) -> str:
    """How the names go together, if those of the file and of the model differ by a part in front alone."""
    if len(saved) != len(layers) or not saved:
        return ""
    longer, shorter = (saved, layers) if len(min(saved, key=len)) > len(min(layers, key=len)) else (layers, saved)
    first = min(shorter, key=len)
    for name in longer:
        part = name.removesuffix(f".{first}")
        if part != name and {f"{part}.{other}" for other in shorter} == set(longer):
            if longer is layers:
                return f". It was trained on what this model has as its {part!r}: load_adapter({reached(part)}, ...)"
            return f". It was trained on a model that has one like this as its {part!r}: load it into such a one"
    return ""


def check_fit(saved: SavedAdapter, root: nn.Module, layers: Mapping[str, Any]) -> None:
    """Refuse an adapter that is not this model's: same layers, sizes, chains that cover each layer once."""
    missing, unexpected = sorted(layers.keys() - saved.layers), sorted(saved.layers - layers.keys())
    if missing or unexpected:
        raise ValueError(
            f"the adapter does not fit the model: layers missing {missing[:5]}, unexpected {unexpected[:5]}"
            + _why_shifted(saved.layers, layers)
        )
    shapes: dict[str, tuple[int, ...]] = {}
    signatures = {name: signature_of(layer) for name, layer in layers.items()}
    for name, layer in layers.items():
        of_a, of_b = shapes_of(layer, config_of(saved.config, name, layer).r)
        for kind in ("lora", "start") if saved.config.has_start else ("lora",):
            if saved.config.use_dora:
                shapes[f"{name}.lora_magnitude_vector"] = (signatures[name][1],)
            shapes[f"{name}.{kind}_A"], shapes[f"{name}.{kind}_B"] = of_a, of_b
    shapes |= _shapes_of_gates(saved, root, layers)
    others = {name: whole_shape(value) for name, value in (named_parameters(root) | named_buffers(root)).items()}
    tokens = token_shapes(root, saved.config)
    for name in (*saved.beside, *(tokens.keys() - set(saved.beside))):
        if name not in others | tokens or name in shapes or name not in saved.tensors:
            raise ValueError(f"the adapter does not fit the model: there is no parameter {name!r}")
        shapes[name] = (others | tokens)[name]
    if shapes.keys() != saved.tensors.keys():
        absent, extra = sorted(shapes.keys() - saved.tensors.keys()), sorted(saved.tensors.keys() - shapes.keys())
        raise ValueError(f"{WEIGHTS_NAME}: tensors missing {absent[:5]}, unexpected {extra[:5]}")
    for key, tensor in saved.tensors.items():
        if tuple(tensor.shape) != shapes[key]:
            raise ValueError(f"{WEIGHTS_NAME}: tensor {key!r} must be {list(shapes[key])}, got {list(tensor.shape)}")
    check_shared(root, saved.beside, saved.tensors)
    if saved.chains is not None:
        linked = [name for plan in saved.chains for name in plan.names]
        if sorted(linked) != sorted(layers):
            raise ValueError(f"{CONFIG_NAME}: chains must hold each adapted layer exactly once")
        grouped = [name for names in saved.same_input for name in names]
        if len(set(grouped)) != len(grouped) or not set(grouped) <= layers.keys():
            raise ValueError(f"{CONFIG_NAME}: same_input must hold adapted layers, each once at most")
        for names in saved.same_input:
            if len({signatures[name][0] for name in names}) != 1:
                raise ValueError(f"{CONFIG_NAME}: same_input {names} have inputs of different sizes")
        for title, names, _ in saved.chains:
            sizes = {(*signatures[name], config_of(saved.config, name, layers[name]).r) for name in names}
            if len(sizes) != 1:
                raise ValueError(f"{CONFIG_NAME}: chain {title!r} links layers of different sizes {sizes}")

"""apply_reslora: freeze a model, swap its linear layers, link them in the order in which they execute."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .backends import select
from .chain import Chain, SharedInput, scope_pass
from .checkpointing import CarryThroughCheckpoints
from .config import ResLoRAConfig
from .execution import Execution, call_with, record_order, replayable, undisturbed
from .execution import example_inputs as derive_inputs
from .linear import ResLoRALinear, link
from .quantized_linear import QuantizedResLoRALinear
from .quantizers import quantizer_of
from .sharding import refuse_sharded
from .shortcuts import hands_on
from .targets import find_targets, matches, role_of, stack_of


@dataclass
class Record:
    """What a model remembers of its adaptation; hangs on the adapted root as ``_reslora``."""

    config: ResLoRAConfig
    unmatched: tuple[tuple[str, str], ...]
    name: str = "default"
    order: str = "not recorded yet"
    note: str = ""
    chains: list[Chain] = field(default_factory=list)
    same_input: list[list[str]] = field(default_factory=list)  # names of layers that read one tensor
    groups: list[SharedInput] = field(default_factory=list)  # the same, as layers, where they share their projection
    restarts: int = 0  # how often restart_reslora has changed the weights for good
    merged: Any = None  # what merge_reslora did, while it is in force
    hooks: list[RemovableHandle] = field(default_factory=list)  # those that open the chains' forward passes
    others: dict[str, SetAside] = field(default_factory=dict)  # the model's other adapters

    def put_in_force(self, in_force: bool) -> None:
        """Let the hooks of this adapter open forward passes, or not."""
        for chain in self.chains:
            chain.in_force = in_force
        for group in self.groups:
            group.in_force = in_force


@dataclass
class SetAside:
    """An adapter that is not in its model now."""

    record: Record
    layers: dict[str, ResLoRALinear]


def apply_reslora(
    model: nn.Module,
    config: ResLoRAConfig,
    *,
    example_inputs: Any = None,
    autocast_adapter_dtype: bool = True,
    adapter_name: str = "default",
) -> nn.Module:
    """Adapt ``model`` in place: freeze it, swap every targeted ``nn.Linear`` for a ``ResLoRALinear``, link the chains.

    A chain holds the layers of one role (last non-numeric component of the module's name), equal ``in_features``,
    ``out_features`` and rank and the same tokens, in the order in which they execute. The order is read off a dry run
    with ``example_inputs``; without them, off small inputs derived from the config of a Transformers model or a
    diffusers UNet; for any other model off the first real forward, which then runs once more before it.

    Args:
        model: any module; it is changed and returned.
        config: what to adapt and how.
        example_inputs: a dict of keyword arguments, a tuple or list of positional ones, or one tensor.
        autocast_adapter_dtype: keep adapters in float32 when the weights are float16 or bfloat16, as PEFT does.
        adapter_name: what to call the adapter where the model gets more than one (``add_adapter``).

    Returns:
        ``model``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: nothing matches, a match is no plain ``nn.Linear``, or the model is adapted or sharded over
            processes already. The message lists the candidates.
        RuntimeError: ``config.backend`` cannot run on this machine. In every case the model is left as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(config, ResLoRAConfig):
        raise TypeError(f"config must be a ResLoRAConfig, got {type(config).__name__}")
    if not isinstance(autocast_adapter_dtype, bool):
        raise TypeError(f"autocast_adapter_dtype must be True or False, got {autocast_adapter_dtype!r}")
    refuse_sharded(model, "adapted", "call apply_reslora first, then shard_reslora")
    checked_name(adapter_name)
    select.check(config.backend)
    targets = find_targets(model, config)
    record = Record(config, targets.unmatched, adapter_name)
    chains = dry_run_chains(model, targets.matched, example_inputs, record)
    adapt(model, targets.matched, record, chains, autocast_adapter_dtype)
    return model


def checked_name(adapter_name: str) -> str:
    """The name of an adapter; TypeError or ValueError if it cannot be one."""
    if not isinstance(adapter_name, str):
        raise TypeError(f"adapter_name must be a str, got {adapter_name!r}")
    if not re.fullmatch(r"[A-Za-z0-9_\-]+", adapter_name):
        raise ValueError(f"adapter_name must be letters, digits, '_' and '-', got {adapter_name!r}")
    return adapter_name


def adapt(
    model: nn.Module,
    targets: Mapping[str, nn.Linear],
    record: Record,
    chains: Iterable[tuple[str, Sequence[str]]] | None,
    autocast_adapter_dtype: bool,
    init_values: bool = True,
) -> None:
    """Swap ``targets``, freeze the rest, link ``chains`` (name, layer names); None reads them off the first forward."""
    _swap(model, targets, record.config, autocast_adapter_dtype, init_values)
    first = "_reslora" not in model.__dict__
    model.__dict__["_reslora"] = record
    if first:
        complete = _RefusePartial()
        model.register_load_state_dict_pre_hook(complete.before)  # type: ignore[no-untyped-call]
        model.register_load_state_dict_post_hook(complete.after)  # type: ignore[no-untyped-call]
    if chains is None:
        model.register_forward_pre_hook(_RecordFirstForward(), with_kwargs=True, prepend=True)
    else:
        build_chains(model, chains)


def adapted_layers(model: nn.Module) -> dict[str, ResLoRALinear]:
    """The adapted layers by name, in registration order; wrappers' prefixes (DDP, torch.compile) are left off."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    layers = {name: m for name, m in root_of(model).named_modules() if isinstance(m, ResLoRALinear)}
    return {name.replace("_orig_mod.", ""): layer for name, layer in layers.items()}


def root_of(model: nn.Module) -> nn.Module:
    """The module that apply_reslora was given, which may sit inside a wrapper such as DDP.

    Raises:
        ValueError: there is none.
    """
    for module in model.modules():
        if isinstance(module.__dict__.get("_reslora"), Record):
            return module
    raise ValueError(
        "model has no ResLoRA adapters: call apply_reslora(model, config) or load_adapter(model, path) first"
    )


def record_of(model: nn.Module) -> Record:
    """The record of an adapted model; ValueError if it is not adapted."""
    record: Record = root_of(model).__dict__["_reslora"]
    return record


def chains_of(
    executed: Sequence[Execution], layers: Mapping[str, nn.Linear], config: ResLoRAConfig
) -> list[tuple[str, list[str]]]:
    """Chains as (name, layer names): one per role, feature sizes, rank, token shape and stack.

    A layer that did not run is alone, under a name that says so. An encoder and a decoder never share a chain: either
    may run without the other.
    """
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, tokens, _ in executed:
        layer = layers[name]
        key = (
            role_of(name), layer.in_features, layer.out_features, config.for_module(name).r, tokens, stack_of(name)
        )  # fmt: skip
        groups.setdefault(key, []).append(name)
    named: dict[str, list[str]] = {}
    for (role, k, n, *_), members in groups.items():
        alone = sum(key[0] == role for key in groups) == 1
        title = role if alone else f"{role} {k}->{n}"
        same = sum(other.split("#")[0] == title for other in named)
        named[title if not same else f"{title}#{same + 1}"] = members
    ran = {execution.name for execution in executed}
    return [*named.items(), *((f"{name} (did not run)", [name]) for name in layers if name not in ran)]


def same_input(executed: Sequence[Execution]) -> list[list[str]]:
    """The names of layers that ran one after the other on the same tensor, where there is more than one."""
    groups: dict[int, list[str]] = {}
    for execution in executed:
        groups.setdefault(execution.source, []).append(execution.name)
    return [names for names in groups.values() if len(names) > 1]


def build_chains(model: nn.Module, chains: Iterable[tuple[str, Sequence[str]]]) -> None:
    """Link the layers of an adapted model, and open their forward passes."""
    layers = adapted_layers(model)
    record = record_of(model)
    record.chains += [link([layers[name] for name in names], name=title) for title, names in chains]
    if record.config.stack_projections:
        record.groups += [SharedInput([layers[name] for name in names]) for names in record.same_input]
    _open_passes(model)


def _open_passes(model: nn.Module) -> None:
    """Make each module that holds a whole chain open its forward passes, and the innermost one those of a group."""
    record = record_of(model)
    names = {id(layer): name for name, layer in adapted_layers(model).items()}
    scopes: dict[str, list[Chain | SharedInput]] = {}
    for chain in record.chains:
        if hands_on_in(chain, record.config):
            for ancestor in _common_ancestors([names[id(layer)] for layer in chain.layers]):
                scopes.setdefault(ancestor, []).append(chain)
    carries = bool(scopes)
    for group in record.groups:
        ancestors = _common_ancestors([names[id(layer)] for layer in group.layers])
        runs = [a for a in ancestors if not isinstance(model.get_submodule(a), (nn.ModuleList, nn.ModuleDict))]
        scopes.setdefault(runs[-1], []).append(group)
    for ancestor, held in scopes.items():
        module = model.get_submodule(ancestor)
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            record.hooks += scope_pass(module, held)
    if carries:
        record.hooks.append(model.register_forward_pre_hook(CarryThroughCheckpoints(record.chains)))


def hands_on_in(chain: Chain, config: ResLoRAConfig) -> bool:
    """Whether the chain's layers pass tensors to each other, so that it needs forward passes opened for it."""
    return len(chain) > 1 and hands_on(config.shortcut, config.pre_num)


def _common_ancestors(names: Sequence[str]) -> list[str]:
    """Names of the modules that hold every one of ``names``, the root ("") first."""
    paths = [name.split(".")[:-1] for name in names]
    shared: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return [".".join(shared[:depth]) for depth in range(len(shared) + 1)]


def dry_run_chains(
    model: nn.Module, targets: Mapping[str, nn.Linear], given: Any, record: Record
) -> list[tuple[str, list[str]]] | None:
    """Chains read off a dry run; None when no inputs are known or derived ones fail, which is noted."""
    inputs = given if given is not None else derive_inputs(model)
    if inputs is None:
        return None
    try:
        with undisturbed(model):
            executed = record_order(targets, lambda: call_with(model, inputs))
    except Exception as error:
        if given is not None:
            raise ValueError(
                f"example_inputs do not run through the model ({type(error).__name__}: {error}); they must be a dict "
                "of keyword arguments, a tuple or list of positional ones, or one tensor"
            ) from error
        record.note = f"dry run with derived inputs failed ({type(error).__name__}: {error})"
        return None
    record.order = "dry run"
    record.same_input = same_input(executed)
    return chains_of(executed, targets, record.config)


def _swap(
    model: nn.Module, targets: Mapping[str, nn.Linear], config: ResLoRAConfig, autocast: bool, init_values: bool
) -> None:
    """Replace the targets wherever they are registered; nothing is changed if building a layer fails."""
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        new = {
            id(linear): _kind_of(linear).from_linear(
                linear,
                config.for_module(name),
                None if autocast or not linear.weight.is_floating_point() else linear.weight.dtype,
                init_values=init_values,
            )
            for name, linear in targets.items()
        }
    except Exception:
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
        raise
    replace_modules(model, new)
    model.requires_grad_(False)
    for name, module in model.named_modules():
        if config.modules_to_save and matches(name, config.modules_to_save):
            module.requires_grad_(True)
    for layer in new.values():
        for name, parameter in layer.adapter_parameters().items():
            parameter.requires_grad_(name.startswith("lora_"))
        if layer.bias is not None and config.bias == "lora_only":
            layer.bias.requires_grad_(True)
    if config.bias == "all":
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.requires_grad_(True)


def _kind_of(linear: nn.Linear) -> type[ResLoRALinear]:
    return ResLoRALinear if quantizer_of(linear) is None else QuantizedResLoRALinear


def refuse_restarted(model: nn.Module) -> None:
    """Raise a ValueError if the frozen weights are no longer those of the base model."""
    if record_of(model).restarts:
        raise ValueError(
            "model was restarted (restart_reslora): its weights hold updates that an adapter alone would lose. "
            "Save the whole model, with save_pretrained or state_dict"
        )


def replace_modules(model: nn.Module, new: Mapping[int, nn.Module]) -> None:
    """Put ``new`` in the place of the modules with these ids, wherever they are registered."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and id(child) in new:
                parent._modules[name] = new[id(child)]
                if isinstance(parent, nn.TransformerEncoderLayer):
                    parent.activation_relu_or_gelu = 0  # no fused inference: it reads linear1.weight past the adapter


@contextmanager
def _unobserved(layers: Iterable[ResLoRALinear]) -> Iterator[None]:
    """A dry run is no batch: whoever gathers statistics must not see it."""
    observers = [(layer, layer.observer) for layer in layers]
    try:
        for layer, _ in observers:
            layer.observer = None
        yield
    finally:
        for layer, observer in observers:
            layer.observer = observer


class _RefusePartial:
    """Hooks of an adapted root around load_state_dict: adapters for some layers only are no base checkpoint.

    A layer by itself takes a checkpoint without its adapters for one of the base model; only the root sees all keys.
    """

    def __init__(self) -> None:
        self.absent: list[str] = []

    def before(self, module: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
        adapters = [
            [f"{prefix}{name}.{own}" for own in child.adapter_parameters()]
            for name, child in module.named_modules()
            if isinstance(child, ResLoRALinear)
        ]
        known = any(key in state for keys in adapters for key in keys)
        self.absent = [key for keys in adapters if not state.keys() & set(keys) for key in keys] if known else []

    def after(self, module: nn.Module, incompatible: Any) -> None:
        incompatible.missing_keys.extend(self.absent)
        self.absent = []


class _RecordFirstForward:
    """Pre-hook of a model whose order is not known: runs the forward once to read it off, then the real one follows."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        record = record_of(module)
        if record.chains:
            return
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "the execution order of the layers is not known yet and cannot be read off while torch.compile traces: "
                "pass example_inputs to apply_reslora, or run one forward before compiling"
            )
        layers = adapted_layers(module)
        dry_args, dry_kwargs = replayable(args, kwargs)
        with undisturbed(module), _unobserved(layers.values()):
            executed = record_order(layers, lambda: module.forward(*dry_args, **dry_kwargs))
        record.same_input = same_input(executed)
        build_chains(module, chains_of(executed, layers, record.config))
        record.order = "first forward"
        for chain in record.chains:
            if hands_on_in(chain, record.config):
                chain.passes.open(module)

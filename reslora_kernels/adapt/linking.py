"""Chains: which layers form one, and the hooks of a model that open their forward passes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..config import ResLoRAConfig
from ..forward_state import scope_pass
from ..layers.chain import Chain
from ..layers.checkpointing import CarryThroughCheckpoints
from ..layers.linear import ResLoRALinear
from ..layers.link import link
from ..layers.shared_input import SharedInput
from ..layers.shortcuts import hands_on
from .execution import Execution, call_with, record_order, replayable, undisturbed
from .execution import example_inputs as derive_inputs
from .record import Record, adapted_layers, record_of
from .targets import role_of, stack_of


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
    scopes: dict[str, list[Chain[ResLoRALinear] | SharedInput]] = {}
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


def hands_on_in(chain: Chain[ResLoRALinear], config: ResLoRAConfig) -> bool:
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

"""Linking an adapted model: its chains, the hooks that open their forward passes, and a run that confirms the order."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..dtensors import refuse_zero3
from ..forward_state import scope_pass
from ..layers.adapter import AdapterLayer
from ..layers.chain import Chain
from ..layers.checkpointing import CarryThroughCheckpoints
from ..layers.kinds import is_linear, link
from ..layers.shared_input import SharedInput
from ..layers.shortcuts import hands_on
from ..quantizers import keep_order
from .execution import Execution, call_with, record_order, undisturbed
from .execution import example_inputs as derive_inputs
from .record import Record, adapted_layers, record_of
from .structure import ChainPlan, names_of_experts


def build_chains(model: nn.Module, plans: Sequence[ChainPlan]) -> None:
    """Link the layers of an adapted model, and open their forward passes."""
    layers = adapted_layers(model)
    record = record_of(model)
    record.chains += [link([layers[name] for name in plan.names], name=plan.title) for plan in plans]
    record.experts = set(names_of_experts(plans))
    if record.config.stack_projections:
        groups = ([layers[name] for name in names] for names in record.same_input)
        record.groups += [SharedInput(group) for group in groups if all(layer.shares_projections for layer in group)]
    _open_passes(model)
    if layers:
        refuse = RefuseZeRO3(next(iter(layers.values())))
        record.hooks.append(model.register_forward_pre_hook(refuse))


class RefuseZeRO3:
    """Forward pre-hook of an adapted model, which DeepSpeed gets hold of after it was adapted."""

    def __init__(self, layer: AdapterLayer) -> None:
        self.layer = layer

    def __call__(self, model: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling() and hasattr(self.layer.lora_A, "ds_id"):
            refuse_zero3(model)


def _open_passes(model: nn.Module) -> None:
    """Make each module that holds a whole chain open its forward passes, and the innermost one those of a group."""
    record = record_of(model)
    names = {id(layer): name for name, layer in adapted_layers(model).items()}
    chains: dict[str, list[Chain[AdapterLayer]]] = {}
    groups: dict[str, list[SharedInput]] = {}
    for chain in record.chains:
        if _hands_on(chain):
            for ancestor in _common_ancestors(model, [names[id(layer)] for layer in chain.layers]):
                chains.setdefault(ancestor, []).append(chain)
    for group in record.groups:
        innermost = _common_ancestors(model, [names[id(layer)] for layer in group.layers])[-1]
        groups.setdefault(innermost, []).append(group)
    for ancestor in dict.fromkeys((*chains, *groups)):
        module = model.get_submodule(ancestor)
        record.hooks += scope_pass(module, [*chains.get(ancestor, ()), *groups.get(ancestor, ())])
        if ancestor in chains:
            carry = CarryThroughCheckpoints(module, record.chains)
            record.hooks.append(module.register_forward_pre_hook(carry))


def _hands_on(chain: Chain[AdapterLayer]) -> bool:
    """Whether the chain's layers pass tensors to each other, so that it needs forward passes opened for it."""
    config = chain.layers[0].config
    return len(chain) > 1 and hands_on(config.shortcut, config.pre_num)


def _common_ancestors(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Names of the modules with a forward that hold every one of ``names``, the root ("") first."""
    paths = [name.split(".")[:-1] for name in names]
    shared: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    ancestors = [".".join(shared[:depth]) for depth in range(len(shared) + 1)]
    return [name for name in ancestors if not isinstance(model.get_submodule(name), (nn.ModuleList, nn.ModuleDict))]


def confirm_order(
    model: nn.Module, targets: Mapping[str, nn.Module], plans: Sequence[ChainPlan], given: Any, record: Record
) -> None:
    """Run ``targets`` once, if inputs are given or known, and warn where they execute in another order than ``plans``.

    The run also tells which layers read one tensor. Where derived inputs fail, the record says so.
    """
    keep_order(model)
    modules = {name: target for name, target in targets.items() if isinstance(target, nn.Module)}
    inputs = given if given is not None else derive_inputs(model)
    if inputs is None:
        return
    try:
        with undisturbed(model):
            executed = record_order(modules, lambda: call_with(model, inputs))
    except Exception as error:
        if given is not None:
            raise ValueError(
                f"example_inputs do not run through the model ({type(error).__name__}: {error}); they must be a dict "
                "of keyword arguments, a tuple or list of positional ones, or one tensor"
            ) from error
        record.note = f"a run with derived inputs failed ({type(error).__name__}: {error})"
        return
    record.same_input = same_input([execution for execution in executed if is_linear(targets[execution.name])])
    turn = {execution.name: number for number, execution in enumerate(executed)}
    for plan in plans:
        ran = [name for name in plan.names if name in turn]
        if not plan.experts and ran != sorted(ran, key=turn.__getitem__):
            record.note = "not all chains are in the order of execution"
            warnings.warn(
                f"the layers of chain {plan.title!r} are {', '.join(plan.names)}, but they run in the order "
                f"{', '.join(sorted(ran, key=turn.__getitem__))}: pass chains=[[...], ...] with the names of the "
                "layers in their order",
                stacklevel=3,
            )
    record.order += ", confirmed by a run" if not record.note else ""


def same_input(executed: Sequence[Execution]) -> list[list[str]]:
    """The names of layers that ran one after the other on the same tensor, where there is more than one."""
    groups: dict[int, list[str]] = {}
    for execution in executed:
        groups.setdefault(execution.source, []).append(execution.name)
    return [names for names in groups.values() if len(names) > 1]

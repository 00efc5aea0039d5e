"""The chains of a model: read off the names of its modules or given, linked, and confirmed by a run where one is known.

Reading takes no forward, so no batch and no entry point can change the chains. A module's name is a path. Its depth
positions count blocks: the indices into lists of blocks, and whether a diffusers UNet's ``down_blocks``, ``mid_block``
or ``up_blocks`` holds it. The path without them is the module's role. A chain holds the layers of one role with equal
sizes and rank, ordered by depth. Where the names do not say how the layers follow, ``chains=`` of apply_reslora does.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from ..config import PARAMETER_ADAPTER, ResLoRAConfig
from ..forward_state import scope_pass
from ..layers.adapter import AdapterLayer
from ..layers.chain import Chain, Entered, SharedInput
from ..layers.checkpointing import CarryThroughCheckpoints
from ..layers.kinds import config_of, is_linear, kind_of, link, signature_of
from ..layers.shortcuts import hands_on
from ..layers.wrappers import modules_of, unwrapped
from ..quantizers import keep_order
from .checkpoints import output_head
from .execution import Execution, call_with, record_order, undisturbed
from .execution import example_inputs as derive_inputs
from .record import Record, adapted_layers, record_of
from .surroundings import Surroundings, watch_head

_UNET = ("down_blocks", "mid_block", "up_blocks")
_ATTRIBUTE = re.compile(r"(layer|block|stage)s?_?(\d+)")  # layer1, layer2, .. are a list as well
_NARROWS = "_maybe_slice_kv_shared_inputs"  # Gemma 4's: layers that share keys see only the tokens to be predicted from
_MODELS = re.compile(r"(encoder|decoder|tower|branche|model|net|view)s")  # names of lists of whole models


class ChainPlan(NamedTuple):
    """A chain by the names of its layers, in order. ``experts``: they see a choice of the tokens."""

    title: str
    names: list[str]
    experts: bool = False


def names_of_experts(plans: Iterable[ChainPlan]) -> list[str]:
    """The layers that see a choice of the tokens, chain by chain."""
    return [name for plan in plans if plan.experts for name in plan.names]


class Place(NamedTuple):
    """Where a layer stands: its role, its depth positions, and whether it belongs to an expert."""

    role: str
    depth: tuple[int, ...]
    expert: bool


def structural_chains(
    model: nn.Module, layers: Mapping[str, Any], config: ResLoRAConfig, apart: Iterable[str] = ()
) -> list[ChainPlan]:
    """The chains of ``layers``, which can be adapted and are in ``model`` by name, without those in ``apart``."""
    place, apart = places(model), set(apart)
    groups: dict[_Alike, list[str]] = {}
    for name, layer in layers.items():
        if name not in apart:
            role, _, expert = place[name]
            rank = config_of(config, name, layer).r
            role += f" ({experts} experts)" if (experts := getattr(layer, "num_experts", 0)) else ""
            groups.setdefault(_Alike(role, signature_of(layer), rank, expert), []).append(name)
    return [
        ChainPlan(_title(key, list(groups)), sorted(names, key=lambda name: place[name].depth), key.expert)
        for key, names in groups.items()
    ]


class _Alike(NamedTuple):
    """What the layers of a chain have in common."""

    role: str
    signature: tuple[Any, ...]
    rank: int
    expert: bool


def _title(key: _Alike, keys: Sequence[_Alike]) -> str:
    """The role, with the sizes, the form and the rank where they tell chains apart."""
    of_role = [other for other in keys if other.role == key.role]
    k, n, *form = key.signature
    title = key.role
    if len({other.signature[:2] for other in of_role}) > 1:
        title += f" {k}->{n}"
    if len({other.signature[2:] for other in of_role if other.signature[:2] == (k, n)}) > 1:
        title += f" {form}"
    return title + (f" r={key.rank}" if len({other.rank for other in of_role}) > 1 else "")


def places(model: nn.Module) -> dict[str, Place]:
    """The place of every layer that can be adapted of ``model``, by its name without those of wrappers.

    Of parameters too, by the names of their adapters.
    """
    found: dict[str, Place] = {}
    _descend(unwrapped(model), None, "", _Path(), found, set())
    return found


class _Path(NamedTuple):
    """The way down to a module: its name in parts, and the depth positions as (place in ``parts``, number)."""

    parts: tuple[str, ...] = ()
    depth: tuple[tuple[int, int], ...] = ()
    expert: bool = False
    repeated: bool = False  # whether the block around has others like it
    since: int = 0  # parts after the last depth position

    def named(self, part: str, expert: bool = False) -> _Path:
        return self._replace(parts=(*self.parts, part), since=self.since + 1, expert=self.expert or expert)

    def counted(self, part: str, number: int, repeated: bool) -> _Path:
        depth = (*self.depth, (len(self.parts), number))
        return self._replace(parts=(*self.parts, part), depth=depth, repeated=repeated, since=0)

    @property
    def place(self) -> Place:
        counted = [at for at, _ in self.depth]
        role = [_star(part) if at in counted else part for at, part in enumerate(self.parts)]
        for at in counted:
            if at - 1 in counted and self.parts[at - 1] in _UNET:  # down_blocks.1 stands beside mid_block
                role[at] = ""
        return Place(".".join(filter(None, role)), tuple(number for _, number in self.depth), self.expert)


def _star(part: str) -> str:
    return "*_block" if part in _UNET else re.sub(r"\d+$", "*", part)


def _descend(
    module: nn.Module, owner: nn.Module | None, name: str, path: _Path, found: dict[str, Place], seen: set[int]
) -> None:
    """Fill ``found`` for ``module``, a child of ``owner``, and all that is below it."""
    seen.add(id(module))
    if isinstance(module, nn.Linear) or kind_of(module) is not None:
        found[name] = path.place
    for own in module._parameters:
        adapter = own + PARAMETER_ADAPTER
        found[f"{name}.{adapter}" if name else adapter] = path.named(own, expert=True).place
    step = _Steps(module, owner, path)
    for part, wrapped in module.named_children():
        child = unwrapped(wrapped)
        if id(child) not in seen:
            _descend(child, module, f"{name}.{part}" if name else part, step.to(part), found, seen)


class _Steps:
    """The steps from one module to its children. A number counts blocks, or tells the roles inside a block apart."""

    def __init__(self, module: nn.Module, owner: nn.Module | None, path: _Path) -> None:
        self.path = path
        self.called = path.parts[-1] if path.parts else ""
        self.numbers = _numbers(module, inside=bool(path.depth))
        listed = isinstance(module, (nn.ModuleList, nn.ModuleDict))
        elements = [unwrapped(child) for part, child in module.named_children() if part in self.numbers]
        self.elements = [element for element in elements if _layer_names(element)]
        self.alike = len({(type(element), _layer_names(element)) for element in self.elements}) == 1
        self.blocks = self.alike and kind_of(self.elements[0]) is None and _layer_names(self.elements[0]) != _ONE
        self.normed = any("norm" in type(part).__name__.lower() for one in self.elements[:1] for part in one.modules())
        self.choice = listed and self.alike and len(self.elements) > 1 and not self.normed and bool(path.depth)
        named = listed and "expert" in self.called.lower() and "shared" not in self.called.lower()
        self.experts = named or (self.choice and _routed(module, owner, len(self.elements)))

    def to(self, part: str) -> _Path:
        """A list counts blocks at the top of a model, and as a stage: right inside a block, with like elements."""
        path, number, repeated = self.path, self.numbers.get(part), len(self.elements) > 1
        if path.expert or self.experts:
            return path.named(part, expert=True)
        if number is None or _MODELS.fullmatch(self.called):
            return path.named(part)
        if not path.depth or (self.called in _UNET and path.since == 0) or (self.blocks and path.since <= 1):
            return path.counted(part, number, repeated)
        if self.blocks and self.normed:  # the list around is one of whole models, this one of the blocks in one of them
            return path._replace(depth=()).counted(part, number, repeated)
        return path.named(part, expert=self.blocks and self.choice and path.repeated)


def _numbers(module: nn.Module, inside: bool) -> dict[str, int]:
    """The children of ``module`` that a number tells apart. ``inside`` a block, only the elements of lists are."""
    names = [part for part, _ in module.named_children()]
    numbers = {part: int(part) for part in names if part.isdecimal()}
    if sum(part in names for part in _UNET) > 1:
        numbers |= {part: _UNET.index(part) for part in names if part in _UNET}
    stems = [found for part in names if not inside and (found := _ATTRIBUTE.fullmatch(part))]
    for found in stems:
        if sum(other[1] == found[1] for other in stems) > 1:
            numbers[found[0]] = int(found[2])
    return numbers


_ONE = ("convolution",)  # with its norm and activation, it is a layer of a block and no block


def _layer_names(module: nn.Module) -> tuple[str, ...]:
    """The linear layers in a module. Of one without, only whether it holds other layers that can be adapted.

    The first block of a stage of convolutions has another one in its shortcut, and is like the others all the same.
    """
    layers = [(name, part) for name, part in modules_of(module) if kind_of(part) is not None]
    linear = tuple(name for name, part in layers if is_linear(part))
    return linear or ((_ONE if len(layers) == 1 else ("convolutions",)) if layers else ())


def _routed(container: nn.Module, owner: nn.Module | None, count: int) -> bool:
    """Whether a matrix beside ``container`` has one output for each of its ``count`` elements, as a router has."""
    beside = [child for child in owner.children() if child is not container] if owner is not None else []
    matrices = [p for child in beside for name, p in child.named_parameters() if name.count(".") < 2]
    matrices += [] if owner is None else owner.parameters(recurse=False)
    return any(p.dim() == 2 and count in p.shape and p.shape[0] != p.shape[1] for p in matrices)


Chains = Mapping[str, Sequence[str]] | Sequence[Sequence[str]]


def plan_chains(
    model: nn.Module, targets: Mapping[str, nn.Module], config: ResLoRAConfig, chains: Chains | None
) -> list[ChainPlan]:
    """The given chains, then those of the structure, of the layers that no given chain names.

    Raises:
        TypeError: ``chains`` is neither a list of lists of names nor a dict of such lists.
        ValueError: a chain is empty, names a layer that is not adapted or is in a chain already, or holds layers of
            other sizes or ranks.
    """
    given = [] if chains is None else _checked(chains, targets, config)
    named = [name for plan in given for name in plan.names]
    return given + structural_chains(model, targets, config, apart=named)


def _checked(chains: Any, targets: Mapping[str, nn.Module], config: ResLoRAConfig) -> list[ChainPlan]:
    if isinstance(chains, Mapping):
        plans = [ChainPlan(title, _names(f"chains[{title!r}]", names)) for title, names in chains.items()]
        if not all(isinstance(title, str) and title for title in chains):
            raise TypeError(f"chains must have non-empty str as keys, got {list(chains)!r}")
    elif isinstance(chains, Sequence) and not isinstance(chains, (str, bytes)):
        plans = [ChainPlan(f"chains[{i}]", _names(f"chains[{i}]", names)) for i, names in enumerate(chains)]
    else:
        raise TypeError(f"chains must be a list of lists of names, or a dict of them, got {type(chains).__name__}")
    taken: dict[str, str] = {}
    for title, names, _ in plans:
        for name in names:
            if name not in targets:
                raise ValueError(f"chains: {name!r} of chain {title!r} is no adapted layer; they are {_some(targets)}")
            if name in taken:
                raise ValueError(f"chains: {name!r} is in chain {taken[name]!r} and again in chain {title!r}")
            taken[name] = title
        sizes = {name: (*signature_of(targets[name]), config_of(config, name, targets[name]).r) for name in names}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"chains: the layers of chain {title!r} differ in (in_features, out_features, r): {sizes}")
    return plans


def _names(where: str, names: Any) -> list[str]:
    if not isinstance(names, Sequence) or isinstance(names, (str, bytes)) or not all(isinstance(n, str) for n in names):
        raise TypeError(f"{where} must be a list of names, got {names!r}")
    if not names:
        raise ValueError(f"{where} must hold at least one name, got none")
    return list(names)


def _some(names: Mapping[str, object], most: int = 20) -> str:
    listed = ", ".join(list(names)[:most])
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"


def build_chains(model: nn.Module, plans: Sequence[ChainPlan]) -> None:
    """Link the layers of an adapted model, and open their forward passes."""
    layers = adapted_layers(model)
    record = record_of(model)
    record.chains += [link([layers[name] for name in plan.names], name=plan.title) for plan in plans]
    record.experts = set(names_of_experts(plans))
    for name in record.experts:
        layers[name].expert = True
    if record.config.stack_projections:
        groups = ([layers[name] for name in names] for names in _within_blocks(record.same_input))
        record.groups += [SharedInput(group) for group in groups if all(layer.shares_projections for layer in group)]
    narrowing = [module for module in model.modules() if hasattr(module, _NARROWS)]
    for layer in (inside for module in narrowing for inside in module.modules() if isinstance(inside, AdapterLayer)):
        layer.narrows = True
    _open_passes(model)
    if layers:
        record.hooks.append(model.register_forward_pre_hook(Surroundings(model, record, layers)))
    watch_head(model, output_head(model), record, layers)


def _within_blocks(groups: Iterable[Sequence[str]]) -> list[list[str]]:
    """The parts of groups of layers that are in one block, where all that they give comes to one loss.

    Heads beside each other may have losses, and backward passes, of their own.
    """
    found: list[list[str]] = []
    for names in groups:
        of_block: dict[tuple[str, ...], list[str]] = {}
        for name in names:
            of_block.setdefault(_block_around(name), []).append(name)
        found += [part for block, part in of_block.items() if block and len(part) > 1]
    return found


def _block_around(name: str) -> tuple[str, ...]:
    """The path to the innermost numbered module around a layer, in parts; empty where there is none."""
    parts = name.split(".")
    while parts and not (parts[-1].isdecimal() or _ATTRIBUTE.fullmatch(parts[-1])):
        parts.pop()
    return tuple(parts)


def _open_passes(model: nn.Module) -> None:
    """Make each module that holds a whole chain open its forward passes, and the innermost one those of a group."""
    record = record_of(model)
    names = {id(layer): name for name, layer in adapted_layers(model).items()}
    chains: dict[str, list[Chain[AdapterLayer]]] = {}
    read: dict[str, list[Chain[AdapterLayer]]] = {}  # in which layers read what earlier ones hold
    groups: dict[str, list[SharedInput]] = {}
    for chain in record.chains:
        ancestors = _common_ancestors(model, [names[id(layer)] for layer in chain.layers])
        if passes_on(chain):
            for ancestor in ancestors:
                chains.setdefault(ancestor, []).append(chain)
        elif chain.reach[0]:
            chain.entered = False
            for ancestor in ancestors:
                read.setdefault(ancestor, []).append(chain)
    for group in record.groups:
        innermost = _common_ancestors(model, [names[id(layer)] for layer in group.layers])[-1]
        groups.setdefault(innermost, []).append(group)
    for ancestor in dict.fromkeys((*chains, *groups)):
        module = model.get_submodule(ancestor)
        record.hooks += scope_pass(module, [*chains.get(ancestor, ()), *groups.get(ancestor, ())])
    for ancestor in dict.fromkeys(("", *chains)):
        module = model.get_submodule(ancestor)
        record.hooks.append(module.register_forward_pre_hook(CarryThroughCheckpoints(module, record.chains)))
    for ancestor, entered in read.items():
        record.hooks.append(model.get_submodule(ancestor).register_forward_pre_hook(Entered(entered)))


def passes_on(chain: Chain[AdapterLayer]) -> bool:
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
    _warn_of_idle(model, {name: module for name, module in modules.items() if name not in turn})
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


def _warn_of_idle(model: nn.Module, idle: Mapping[str, Any]) -> None:
    """Layers that did not run and whose weight another module has: T5's ``shared``, beside ``encoder.embed_tokens``."""
    for name, layer in idle.items():
        weight = getattr(layer, "weight", None)
        twins = (other for other, module in model.named_modules() if module is not layer and _has(module, weight))
        if weight is not None and (twin := next(twins, None)) is not None:
            warnings.warn(
                f"{name!r} does not run: {twin!r} has its weight and may run in its place, so that an adapter of "
                f"{name!r} has no effect. Name {twin!r} instead",
                stacklevel=4,
            )


def _has(module: nn.Module, weight: Any) -> bool:
    return any(own is weight for own in module._parameters.values())


def same_input(executed: Sequence[Execution]) -> list[list[str]]:
    """The names of layers that ran one after the other on the same tensor, where there is more than one."""
    groups: dict[int, list[str]] = {}
    for execution in executed:
        groups.setdefault(execution.source, []).append(execution.name)
    return [names for names in groups.values() if len(names) > 1]

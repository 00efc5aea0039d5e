"""What keeps a layer from being adapted as it stands: an owner that reads its weight, or another library's hooks.

And what others do to a model after it was adapted: blocks taken out, adapters taken off the device, ZeRO-3, losses
that read the weight of its head, projections fused.

Owners that read the weight itself, past the module, are those of Mamba's dt_proj, of the projections of
nn.MultiheadAttention and WavLM's attention, and, in its fused training path, of Mamba's out_proj. The owner's source
tells: its forward, and the methods that it calls, name ``self.<layer>.weight`` as a value, not for its dtype or shape
alone.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..config import ResLoRAConfig, matches, with_parents
from ..dtensors import refuse_zero3
from ..forward_state import Passes, scope_pass
from ..layers.adapter import AdapterLayer
from ..layers.chain import Chain
from ..layers.offloading import is_hooked, offloader
from ..layers.tensor_parallel import is_parallelized
from .record import Record, at, holds, place_of, refuse_replaced

_FACTS = ("dtype", "device", "shape", "ndim", "size", "dim", "requires_grad", "is_cuda")  # nothing of the values
_JOINTS = {  # what diffusers' attention runs when it is fused, and in whose place
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_kv": ("add_k_proj", "add_v_proj"),
}
_CHECKS = ("isinstance", "hasattr", "getattr", "type")


def read_past(owner: nn.Module, child: str) -> str | None:
    """How ``owner`` reads the weight of its layer ``child``: "only", "instead" or "also"; None where it does not.

    "also" means that it runs the layer in any case, "instead" that it does so under a condition.
    """
    if isinstance(owner, nn.TransformerEncoderLayer):
        return None  # its fused path, which would, is switched off for an adapted layer
    kind: Any = type(owner)
    read, called, branched = _uses(kind, getattr(vars(owner).get("forward"), "__func__", None))
    if child not in read:
        return None
    return "also" if child in called else "instead" if child in branched else "only"


@functools.cache
def _uses(kind: Any, forward: Any = None) -> tuple[set[str], set[str], set[str]]:
    """What ``kind``, a class of modules, reads the weight of in its forward; what it runs there; what in branches.

    ``forward`` is what another library has put on the instance in the place of the class's.
    """
    read: set[str] = set()
    called: set[str] = set()
    branched: set[str] = set()
    waiting, seen = ["forward"], {"forward"}
    while waiting:
        method = waiting.pop()
        tree = _source(forward if method == "forward" and forward is not None else getattr(kind, method))
        for node, parent, in_branch in _nodes(tree) if tree is not None else ():
            name = _of_self(node)
            if name is not None and name not in seen and inspect.isfunction(getattr(kind, name, None)):
                seen.add(name)
                waiting.append(name)
            if isinstance(node, ast.Call) and (name := _of_self(node.func)):
                (branched if in_branch else called).add(name)
            if isinstance(node, ast.Attribute) and _is_value(node, parent) and (name := _of_self(node.value)):
                read.add(name)
    return read, called, branched


def _source(method: Any) -> ast.AST | None:
    """The syntax tree of a method; None where there is no source."""
    function = inspect.unwrap(method)
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None


def _nodes(
    tree: ast.AST, parent: ast.AST | None = None, in_branch: bool = False
) -> Iterator[tuple[ast.AST, ast.AST | None, bool]]:
    """Every node with the one around it, and whether it runs under a condition only."""
    yield tree, parent, in_branch
    for child in ast.iter_child_nodes(tree):
        yield from _nodes(child, tree, in_branch or isinstance(tree, (ast.If, ast.IfExp)))


def _of_self(node: ast.AST) -> str | None:
    """x of ``self.x``."""
    is_own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return node.attr if is_own and isinstance(node, ast.Attribute) else None


def _is_value(node: ast.Attribute, parent: ast.AST | None) -> bool:
    """Whether it is a weight whose values are used, not one of its facts, and nothing is assigned to it."""
    if node.attr != "weight" or not isinstance(node.ctx, ast.Load):
        return False
    if isinstance(parent, ast.Attribute) and parent.attr in _FACTS:
        return False
    return not (isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) and parent.func.id in _CHECKS)


def refuse_foreign_hooks(model: nn.Module, targets: Mapping[str, nn.Module], config: ResLoRAConfig) -> None:
    """Raise a ValueError that names the first module that cannot be adapted, or trained, as it stands."""
    for fault in _faults(model, targets, config):
        raise ValueError(fault)


def _faults(model: nn.Module, targets: Mapping[str, nn.Module], config: ResLoRAConfig) -> Iterator[str]:
    for name, module in model.named_modules():
        registry = vars(module).get("_diffusers_hook")
        if registry is not None and "group_offloading" in registry.hooks:
            yield f"{name or 'model'!r} is under diffusers' group offloading: call apply_reslora first, then offload"
        hook = offloader(module)
        if hook is not None and hook.place_submodules and any(target.startswith(f"{name}.") for target in targets):
            yield (
                f"accelerate loads {name!r} with all its submodules (preload_module_classes), which would look for the "
                "adapters among the offloaded weights: leave it out of preload_module_classes"
            )
        if hook is not None and _is_trained(name, module, config, targets):
            yield (
                f"{name!r} would be trained (modules_to_save, bias), but accelerate offloads it, so that every forward "
                "starts from the old value: keep it on a device in device_map"
            )
    for name, linear in targets.items():
        if fault := _fused(model, name):
            yield fault
        if isinstance(linear, nn.Module) and _is_replaced(linear):
            yield (
                f"the forward of {name!r} is replaced on the instance by {_whose(linear)}, which an adapter would "
                "lose: call apply_reslora first and replace it afterwards. For diffusers' layerwise casting that is "
                "enable_layerwise_casting(skip_modules_classes=(ResLoRALinear,)): adapters are not held in 8 bits"
            )


def refuse_fused(model: nn.Module, layers: Mapping[str, AdapterLayer]) -> None:
    """ValueError, which names it, if diffusers runs another layer in the place of one of ``layers``."""
    for fault in filter(None, (_fused(model, name) for name, layer in layers.items() if not _has_no_say(layer))):
        raise ValueError(fault)


def _fused(model: nn.Module, name: str) -> str | None:
    """What is wrong if diffusers has fused a layer's weight with its neighbours' (``fuse_qkv_projections``)."""
    path, _, child = name.rpartition(".")
    owner = at(model, path)
    if owner is None or not _is_fused(owner):
        return None
    joint = next((joint for joint, parts in _JOINTS.items() if joint in owner._modules and child in parts), None)
    if joint is None:
        return None
    return (
        f"{name!r} does not run: diffusers' fuse_qkv_projections has put {joint!r} in its place, with the weights of "
        "then. Call unfuse_qkv_projections() first; a merged model can be fused"
    )


def _is_fused(owner: nn.Module) -> bool:
    """Of some classes a processor decides, whatever the mark says after ``unfuse_qkv_projections``."""
    marked = vars(owner).get("fused_projections", False)
    processor = type(getattr(owner, "processor", None)).__name__ if marked else ""
    return marked and (hasattr(owner, "unfuse_projections") or processor.startswith("Fused"))


def _has_no_say(layer: Any) -> bool:
    return bool(layer.merged or layer.disabled)


def _is_trained(name: str, module: nn.Module, config: ResLoRAConfig, targets: Mapping[str, nn.Module]) -> bool:
    if config.modules_to_save and any(matches(parent, config.modules_to_save) for parent in with_parents(name)):
        return True
    biases = any(parameter.endswith("bias") for parameter, _ in module.named_parameters(recurse=False))
    return biases and (config.bias == "all" or (config.bias == "lora_only" and name in targets))


def _is_replaced(linear: nn.Module) -> bool:
    """Whether ``forward`` is another than the class's, and not by accelerate or Transformers' tensor parallel styles,
    which are carried over."""
    forward = vars(linear).get("forward")
    own = getattr(forward, "__func__", None) is type(linear).forward
    return forward is not None and not own and not is_hooked(linear) and not is_parallelized(linear)


def _whose(linear: nn.Module) -> str:
    registry = vars(linear).get("_diffusers_hook")
    if registry is not None and registry.hooks:
        return f"diffusers ({', '.join(registry.hooks)})"
    forward = vars(linear)["forward"]
    forward = getattr(forward, "func", forward)
    return f"{getattr(forward, '__module__', '?')}.{getattr(forward, '__qualname__', type(forward).__name__)}"


class Surroundings:
    """Forward pre-hook of an adapted model: meets what others have done to it after it was adapted."""

    def __init__(self, model: nn.Module, record: Record, layers: Mapping[str, AdapterLayer]) -> None:
        self.record, self.layers = record, layers
        self.first = next(iter(layers.values()))
        self.told: object = None  # the parameter under whose ds_id ZeRO-3 was told who reads what
        self.ends = _ends(record, layers)
        self.places = [(*place_of(model, record, name, layer), layer, name) for name, layer in layers.items()]
        owners = dict.fromkeys(at(model, name.rpartition(".")[0]) for name in layers)
        self.fusible = [owner for owner in owners if owner is not None and hasattr(owner, "fuse_projections")]

    def __call__(self, model: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        active = self.record.chains[0].active
        for parent, child, layer, name in self.places if active else ():
            if parent is not None and parent._modules.get(child) is not layer:
                refuse_replaced(parent, child, layer, name)
        for chain, name, layer in self.ends:
            if chain.active and self.record.layers is None and not holds(at(model, name), layer):
                _refuse_gone(model, chain, name, layer)
        if active and any(_is_fused(owner) for owner in self.fusible):
            refuse_fused(model, self.layers)
        a = self.first.lora_A
        if a.is_meta and a.requires_grad and torch.is_grad_enabled() and offloader(self.first) is not None:
            raise ValueError(
                "accelerate has taken the adapters off the device with the weights, where they get no gradients: call "
                "cpu_offload, disk_offload or dispatch_model first, then apply_reslora or load_adapter"
            )
        if hasattr(a, "ds_id"):
            self._under_zero3(model, a)

    def _under_zero3(self, model: nn.Module, a: Any) -> None:
        if self.record.layers is not None:
            refuse_zero3(model)
        if self.record.together or self.record.tied:
            raise ValueError(
                "several adapters in force, and heads with their embedding's adapter (ensure_weight_tying), read what "
                "DeepSpeed's ZeRO-3 does not gather for them: train with ZeRO-2, or with FSDP2 (shard_reslora)"
            )
        if self.told != (id(a), a.ds_id):
            tell_zero3(self.layers)
            self.told = id(a), a.ds_id


def _ends(record: Record, layers: Mapping[str, AdapterLayer]) -> list[tuple[Chain[AdapterLayer], str, AdapterLayer]]:
    """The first and the last layer of a chain in each stack of blocks, which are gone if some of its blocks are."""
    names = {id(layer): name for name, layer in layers.items()}
    stacks: dict[str, Chain[AdapterLayer]] = {}
    for chain in record.chains:
        if any(chain.reach):
            stacks.setdefault(re.split(r"\.\d+\.", names[id(chain.layers[0])])[0], chain)
    return [(chain, names[id(chain.layers[at])], chain.layers[at]) for chain in stacks.values() for at in (0, -1)]


def _refuse_gone(model: nn.Module, chain: Chain[AdapterLayer], name: str, layer: AdapterLayer) -> None:
    """ValueError if ``layer`` is not in the model under another name either, nor the model a part of a pipeline."""
    state = chain.passes.current()
    if (state is None or state.owner is model) and not any(holds(module, layer) for module in model.modules()):
        raise ValueError(
            f"layer {name!r} of chain {chain.name!r} is no longer in the model, and others read of it: adapt the part "
            "that is left by itself, so that its chains end with it, or let them go on with pipeline_reslora"
        )


def tell_zero3(layers: Mapping[str, AdapterLayer]) -> None:
    """Let DeepSpeed's ZeRO-3 gather for each layer what it reads of others, for its forward and for its backward.

    Raises:
        ValueError: a layer reads parameters for which that does not do: of a module inside it or around it.
    """
    from deepspeed import zero

    for name, layer in layers.items():
        if not layer.holds_all_it_reads:
            raise ValueError(
                f"layer {name!r} (a {type(layer).__name__}) reads parameters that DeepSpeed's ZeRO-3 does not gather "
                "for it: train with ZeRO-2, or with FSDP2 (shard_reslora)"
            )
        for other, kinds in layer.reads():
            for own, parameter in other.adapter_parameters().items():
                if own[-1] in kinds:
                    zero.register_external_parameter(layer, parameter)


def watch_head(model: nn.Module, head: Any, record: Record, layers: Mapping[str, AdapterLayer]) -> None:
    """See to it that forwards of ``model`` run its ``head``, if an adapter or trained tokens have an effect there."""
    name = next((name for name, module in model.named_modules() if module is head), None)
    if head is None or name is None:
        return
    changes: list[Any] = [layers[name]] if name in layers else []
    changes += [tied.layer for tied in record.tied if tied.layer.weight is head.weight]
    changes += [rows for rows in record.tables.values() if rows.table.weight is head.weight]
    if changes:
        watch = HeadRuns(name, changes)
        record.watches.append(watch)
        record.hooks += [head.register_forward_hook(watch.ran), model.register_forward_hook(watch.ended)]
        record.hooks += scope_pass(model, [watch])


class HeadRuns:
    """Hooks that meet a forward of the model in which its head has not run: a loss has read the head's weight.

    TRL's trainers, Liger's and other fused losses do so, past all that a head has beside its weight.
    """

    def __init__(self, name: str, changes: Sequence[Any]) -> None:
        self.name, self.changes = name, changes
        self.passes, self.active = Passes(), True

    @property
    def is_open(self) -> bool:
        """Whether the model runs, in this thread."""
        return self.passes.current() is not None

    def ran(self, *_: Any) -> None:
        """The head has run, or its weight has been read with all that it has beside it."""
        state = self.passes.current()
        if state is not None:
            state.reading = True

    def ended(self, model: nn.Module, args: Any, output: Any) -> None:
        state = self.passes.current()
        if state is None or state.owner is not model or state.reading:
            return
        if not all(_has_no_say(change) for change in self.changes):
            raise RuntimeError(
                f"the forward of {type(model).__name__} has not run {self.name!r}, which has an adapter or trained "
                "tokens: its loss reads the weight alone (TRL's trainers and Liger's kernels do). Train the head whole "
                "(modules_to_save), leave it as it is, or take a loss that runs it"
            )


_SWITCHES = (
    "set_adapters", "disable_lora", "enable_lora", "fuse_lora", "unfuse_lora", "unload_lora", "delete_adapters",
    "save_lora_adapter",
)  # fmt: skip


def refuse_switches(model: nn.Module, record: Record) -> None:
    """Let diffusers' switches and its scale, which would do nothing on an adapted model, say so."""
    if record.layers is None and all(hasattr(type(model), name) for name in _SWITCHES):
        record.hooks += [Switch(model, name) for name in _SWITCHES]
        record.hooks.append(model.register_forward_pre_hook(refuse_scale, with_kwargs=True))


class Switch:
    """A method of a diffusers model, before its class's, which knows PEFT's layers: ValueError where there are none."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name
        vars(model)[name] = self

    def remove(self) -> None:
        """Let the class's method be met again."""
        if vars(self.model).get(self.name) is self:
            del vars(self.model)[self.name]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not _has_tuners(self.model):
            raise ValueError(
                f"{self.name} is for adapters that PEFT holds, and would do nothing here: use set_adapter, "
                "disable_adapter, merge_reslora or save_adapter of reslora_kernels, or load in a pipeline what "
                "export_peft(model, path, layout='diffusers') writes"
            )
        return getattr(type(self.model), self.name)(self.model, *args, **kwargs)


def refuse_scale(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: ValueError for a scale that diffusers would give to PEFT's layers only."""
    for name, given in kwargs.items():
        if name.endswith("attention_kwargs") and given and given.get("scale", 1.0) != 1.0 and not _has_tuners(model):
            raise ValueError(
                f"{name}: scale={given['scale']!r} is for adapters that PEFT holds, and would do nothing here: "
                "export_peft(model, path, layout='diffusers') and load that, or disable_adapter(model) in place of 0"
            )


def _has_tuners(model: nn.Module) -> bool:
    peft = sys.modules.get("peft.tuners.tuners_utils")
    return peft is not None and any(isinstance(module, peft.BaseTunerLayer) for module in model.modules())

"""What others do to a model after it was adapted, and would lose its adapters: each is named at the model's next use.

Layers converted or quantised, blocks taken out, copied or moved, projections fused, adapters taken off the device,
ZeRO-3, losses that read the weight of the head, diffusers' switches and scale.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling

from ..dtensors import refuse_flattened, refuse_zero3
from ..forward_state import Passes, scope_pass
from ..layers.adapter import ADAPTER_PARAMETERS, AdapterLayer
from ..layers.chain import Chain
from ..layers.offloading import offloader
from ..layers.quantized_linear import QuantizedResLoRALinear
from ..layers.wrappers import at, without_wrappers
from .data_parallel import meet, running
from .obstacles import has_no_say, is_fused, refuse_fused
from .record import Record, copied, holds, place_of, refuse_replaced


class Surroundings:
    """Forward pre-hook of an adapted model: meets what others have done to it after it was adapted."""

    def __init__(self, model: nn.Module, record: Record, layers: Mapping[str, AdapterLayer]) -> None:
        self.record, self.layers = record, layers
        self.first = next(iter(layers.values()))
        self.others = [] if record.layers is not None else _places_beside(model)
        self.told: object = None  # the parameter under whose ds_id ZeRO-3 was told who reads what
        self.ends = _ends(record, layers)
        paths = dict.fromkeys(re.split(r"\.\d+\.", name)[0] for name in layers if re.search(r"\.\d+\.", name))
        lists = [(path, at(model, path)) for path in paths]
        self.blocks = [(path, one, list(one._modules.values())) for path, one in lists if one is not None]
        self.places: list[tuple[nn.Module | None, str, Any, str]] = [
            (*place_of(model, record, name, layer), layer, name) for name, layer in layers.items()
        ]
        owners = dict.fromkeys(at(model, name.rpartition(".")[0]) for name in layers)
        self.around = list(_around(model, next(iter(layers)), self.first))
        self.fusible = [owner for owner in owners if owner is not None and hasattr(owner, "fuse_projections")]

    def __call__(self, model: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            if not is_dynamo_compiling():
                self._refuse_traced_stages()
            return
        if torch.is_grad_enabled():
            self._note_what_trains()
        active = self.record.chains[0].active
        for parent, child, layer, name in self.places if active else ():
            if parent is not None and parent._modules.get(child) is not layer:
                refuse_replaced(parent, child, layer, name)
            weight = layer._parameters.get("weight")  # of PEFT's the layer around them has it
            if weight is not None and type(weight) is not nn.Parameter:
                _refuse_quantized(weight, layer, name)
        for chain, name, layer in self.ends:
            if chain.active and self.record.layers is None and not holds(at(model, name), layer):
                _refuse_gone(model, chain, name, layer)
        for path, blocks, held in self.blocks if active else ():
            if at(model, path) is not blocks or list(blocks._modules.values()) != held:
                self._refuse_moved(model)
                held[:] = blocks._modules.values()  # in wrappers now
                break
        if active and any(map(_is_group_offloaded, self.around)):
            _refuse_reads_across_groups(model, self.layers)
        if active and any(is_fused(owner) for owner in self.fusible):
            refuse_fused(model, self.layers)
        a = self.first.lora_A
        if type(a) is not nn.Parameter or a.dim() < 2:
            self._refuse_flattened(a)
        if active and a.requires_grad and torch.is_grad_enabled() and (ddp := running(model)) is not None:
            meet(ddp, model, a)
        if a.is_meta and a.requires_grad and torch.is_grad_enabled() and offloader(self.first) is not None:
            raise ValueError(
                "accelerate has taken the adapters off the device with the weights, where they get no gradients: call "
                "cpu_offload, disk_offload or dispatch_model first, then apply_reslora or load_adapter"
            )
        if hasattr(a, "ds_id"):
            self._under_zero3(model, a)

    def _refuse_traced_stages(self) -> None:
        """ValueError where PyTorch's pipelining cuts a traced model between layers that read each other's A and B.

        Each stage would get a copy of what it reads, and train it apart.
        """
        if not self._reads_across() or not self.first.lora_A.requires_grad or not _is_pipelined():
            return
        raise ValueError(
            "torch.distributed.pipelining.pipeline() cuts the traced model, and with "
            f"shortcut={self.record.config.shortcut!r} each stage would train copies of its own of the A and B that it "
            "reads of another: make the stages by hand and let the chains go on with pipeline_reslora, or take 'none' "
            "or 'middle' (for inference: requires_grad_(False))"
        )

    def _refuse_flattened(self, a: Any) -> None:
        """ValueError in FSDP1's wrapper, but for what PEFT holds and saves there, where no layer reads another's."""
        under_zero3 = hasattr(a, "ds_id")  # which empties parameters, too
        if not under_zero3 and (self.record.layers is None or self._reads_across()):
            refuse_flattened(a)

    def _reads_across(self) -> bool:
        """Whether a layer reads A or B of another block."""
        chains = (chain for chain in self.record.chains if len(chain) > 1 and any(chain.reach))
        return self.record.config.shortcut != "middle" and any(True for _ in chains)

    def _note_what_trains(self) -> None:
        """What somebody has unfrozen, which is to be saved though it be frozen again; see ``beside``."""
        noted = self.record.noted
        for name, module, own in self.others:
            parameter = module._parameters.get(own)
            if parameter is not None and parameter.requires_grad and name not in noted:
                noted.note(name, parameter)

    def _refuse_moved(self, model: nn.Module) -> None:
        """ValueError for blocks that were copied, or left out, or moved where a file would not say so."""
        if getattr(model, "_is_replica", False) or vars(model).get("_reslora") is not self.record:
            return
        if self.record.layers is not None:
            return self._refuse_moved_of_peft(model)
        known = {id(layer) for layer in self.layers.values()}
        known |= {id(layer) for other in self.record.others.values() for layer in other.layers.values()}
        for name, module in model.named_modules():
            if isinstance(module, AdapterLayer) and id(module) not in known:
                raise ValueError(copied(name))
        names = {id(layer): name for name, layer in self.layers.items()}
        for chain in self.record.chains:
            for layer in chain.layers if any(chain.reach) else ():
                _refuse_gone(model, chain, names[id(layer)], layer)

    def _refuse_moved_of_peft(self, model: nn.Module) -> None:
        """The same of adapters that PEFT holds: its files name layers by where they are, and hold no chains."""
        own, adapters = self.record.name, "reslora_adapter"
        found = [
            (name, m) for name, m in model.named_modules() if adapters in m._modules and own in m._modules[adapters]
        ]
        here = {id(module): without_wrappers(name) for name, module in found}
        names: dict[int, str] = {id(layer.holder): name for name, layer in self.layers.items()}
        for holder, name in here.items():
            if holder not in names:
                raise ValueError(copied(name))
        for chain in self.record.chains:
            for layer in chain.layers if any(chain.reach) else ():
                holder = id(layer.holder)
                if here.get(holder) != names[holder]:
                    what = "is gone" if holder not in here else f"is {here[holder]!r} now"
                    raise ValueError(
                        f"layer {names[holder]!r} was adapted and {what}, and its file would be another model's: take "
                        "blocks out and put them in order first, then call get_peft_model"
                    )

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


def _around(model: nn.Module, name: str, layer: AdapterLayer) -> Iterator[nn.Module]:
    """``layer`` and the modules around it, where they are now."""
    yield layer
    parts = name.split(".")
    around = (at(model, ".".join(parts[:depth])) for depth in range(len(parts)))
    yield from (module for module in around if module is not None)


def _is_pipelined() -> bool:
    """Whether the model is traced for pipelining, which asks torch.export for it."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("torch.distributed.pipelining"):
            return True
        frame = frame.f_back
    return False


def _is_group_offloaded(module: nn.Module) -> bool:
    registry = vars(module).get("_diffusers_hook")
    return registry is not None and "group_offloading" in registry.hooks


def _refuse_reads_across_groups(model: nn.Module, layers: Mapping[str, AdapterLayer]) -> None:
    """ValueError if a layer reads parameters of another one that diffusers' group offloading may have taken away."""
    groups: dict[int, nn.Module | None] = {}
    waiting: list[tuple[nn.Module, nn.Module | None]] = [(model, None)]
    while waiting:
        module, group = waiting.pop()
        groups[id(module)] = group = module if _is_group_offloaded(module) else group
        waiting += [(child, group) for child in module.children()]
    for name, layer in layers.items():
        for other, _ in layer.reads():
            if groups.get(id(other)) is not groups.get(id(layer)):
                raise ValueError(
                    f"diffusers' group offloading moves the adapters of each group by themselves, and layer {name!r} "
                    "reads those of another one: take shortcut 'none' or 'middle' (with stack_projections=False for "
                    "offload_type='leaf_level'), or enable_model_cpu_offload"
                )


def _places_beside(root: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """The name, the owner and the owner's key of every parameter that is no adapter's."""
    return [
        (without_wrappers(f"{path}.{own}" if path else own), module, own)
        for path, module in root.named_modules()
        for own in module._parameters
        if own not in ADAPTER_PARAMETERS
    ]


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
    if getattr(model, "_is_replica", False):
        raise ValueError(
            f"shortcut={layer.config.shortcut!r} reads earlier blocks, and nn.DataParallel makes copies that do not "
            "know each other: start a process for each GPU (torchrun, accelerate launch), or let the program see one "
            "GPU (CUDA_VISIBLE_DEVICES)"
        )
    state = chain.passes.current()
    if (state is None or state.owner is model) and not any(holds(module, layer) for module in model.modules()):
        raise ValueError(
            f"layer {name!r} of chain {chain.name!r} is no longer in the model, and others read of it: adapt the part "
            "that is left by itself, so that its chains end with it, or let them go on with pipeline_reslora"
        )


def _refuse_quantized(weight: Any, layer: AdapterLayer, name: str) -> None:
    """ValueError if torchao has quantised the weight of a layer that was adapted as a plain one."""
    kind = type(weight)
    if kind.__module__.startswith("torchao.") and not isinstance(layer, QuantizedResLoRALinear):
        raise ValueError(
            f"layer {name!r} was adapted, then its weight was quantised ({kind.__name__}): quantise the model first"
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
        if not all(has_no_say(change) for change in self.changes):
            raise RuntimeError(
                f"the forward of {type(model).__name__} has not run {self.name!r}, which has an adapter or trained "
                "tokens: its loss reads the weight alone (TRL's trainers and Liger's kernels do). Train the head whole "
                "(modules_to_save), leave it as it is, or take a loss that runs it"
            )


_SWITCHES = ("set_adapters", "disable_lora", "enable_lora", "fuse_lora", "unfuse_lora", "save_lora_adapter")
_LEAVING = ("unload_lora", "delete_adapters")
_METHODS = "_reslora_methods"


def watch_methods(root: nn.Module) -> None:
    """Let methods of Transformers and diffusers that know nothing of adapters, or PEFT's only, say so.

    Once for a model, however many adapters it gets.
    """
    if _METHODS in vars(root):
        return
    handles: list[Any] = []
    if hasattr(type(root), "save_pretrained"):
        handles.append(Save(root, "save_pretrained"))
    if all(hasattr(type(root), name) for name in (*_SWITCHES, *_LEAVING)):
        handles += [Switch(root, name) for name in (*_SWITCHES, *_LEAVING)]
        handles.append(root.register_forward_pre_hook(refuse_scale, with_kwargs=True))
    vars(root)[_METHODS] = handles


def release_methods(root: nn.Module) -> None:
    """The inverse of ``watch_methods``."""
    for handle in vars(root).pop(_METHODS, ()):
        handle.remove()


class Method:
    """A method of an adapted model that is met before its own."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name, self.before = model, name, vars(model).get(name)
        vars(model)[name] = self

    def remove(self) -> None:
        """Let its own be met again."""
        del vars(self.model)[self.name]
        if self.before is not None:
            vars(self.model)[self.name] = self.before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = self.before if self.before is not None else getattr(type(self.model), self.name).__get__(self.model)
        return own(*args, **kwargs)


class Save(Method):
    """``save_pretrained``, which writes adapters among the weights: a warning, as from_pretrained leaves them there."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layers = [module for module in self.model.modules() if isinstance(module, AdapterLayer)]
        if not all(layer.merged for layer in layers):
            warnings.warn(
                "save_pretrained writes the adapters among the weights, where from_pretrained does not look for them: "
                "save_adapter(model, path) saves them (AdapterCheckpoints in a Trainer), merge_and_unload(model) first "
                "makes a plain model",
                stacklevel=2,
            )
        return super().__call__(*args, **kwargs)


class Switch(Method):
    """A switch of a diffusers model, which knows PEFT's layers: ValueError where there are none.

    Of what takes adapters out a warning: a pipeline asks it of all its parts, for those of another.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not _has_tuners(self.model):
            message = (
                f"{self.name} is for adapters that PEFT holds, and does nothing here: use set_adapter, "
                "disable_adapter, merge_reslora, save_adapter or unload of reslora_kernels, or load in a pipeline what "
                "export_peft(model, path, layout='diffusers') writes"
            )
            if self.name not in _LEAVING:
                raise ValueError(message)
            warnings.warn(message, stacklevel=2)
        return super().__call__(*args, **kwargs)


class Fuse(Method):
    """``fuse_lora`` of a diffusers model: NotImplementedError with layers of this method, before it has scaled one."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if any("reslora_adapter" in module._modules for module in self.model.modules()):
            raise NotImplementedError(
                "ResLoRA layers merge as one: call reslora_kernels.merge_reslora(model), or load in a pipeline what "
                "export_peft(model, path, layout='diffusers') writes, and fuse that"
            )
        return super().__call__(*args, **kwargs)


def refuse_scale(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: ValueError for a scale that diffusers would give to PEFT's layers only."""
    for name, given in kwargs.items():
        if not name.endswith("attention_kwargs") or not given or given.get("scale", 1.0) == 1.0:
            continue
        layers = [module for module in model.modules() if isinstance(module, AdapterLayer)]
        if not all(map(has_no_say, layers)) and not _has_tuners(model):
            raise ValueError(
                f"{name}: scale={given['scale']!r} is for adapters that PEFT holds, and would do nothing here: "
                "export_peft(model, path, layout='diffusers') and load that, or disable_adapter(model) for 0"
            )


def _has_tuners(model: nn.Module) -> bool:
    peft = sys.modules.get("peft.tuners.tuners_utils")
    return peft is not None and any(isinstance(module, peft.BaseTunerLayer) for module in model.modules())

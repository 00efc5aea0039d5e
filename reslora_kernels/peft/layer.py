"""ResLoRALayer, a linear layer with its adapters beside it, as PEFT holds them; and all adapters of one model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..adapt.apply import replace_modules, without_hand_over
from ..adapt.checkpoints import statistics_of
from ..adapt.linking import Chains, build_chains, confirm_order, names_of_experts, plan_chains
from ..adapt.obstacles import refuse_foreign_hooks
from ..adapt.record import Record, SetAside
from ..adapt.surroundings import Fuse
from ..config import ResLoRAConfig
from ..layers.adapter import AdapterLayer
from ..layers.kinds import KINDS, kind_of
from ..layers.linear import ResLoRALinear
from ..layers.offloading import bare_forward, hook_like
from ..layers.quantized_linear import QuantizedResLoRALinear
from ..layers.several import Part, in_parts, parts_for
from ..layers.standing_in import share_hooks
from ..quantizers import held_in


class Adapters:
    """One per model, held by its root and by its layers. ``records`` has one entry per adapter.

    The record of the adapter in force hangs on the root as that of ``apply_reslora`` does, so that the rest of the
    package (``inspect``, ``collect_statistics``, ``merge_reslora``, ``export_peft``) takes the model as it is.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.records: dict[str, Record] = {}

    @property
    def in_force(self) -> str | None:
        record = self.root.__dict__.get("_reslora")
        return None if record is None else record.name

    def link(
        self, name: str, config: ResLoRAConfig, layers: Mapping[str, ResLoRALinear], chains: Chains | None
    ) -> None:
        """Make the chains of an adapter that was just added, which is in force then, and the hooks of their passes.

        Raises:
            TypeError, ValueError: as for ``apply_reslora``, ``chains`` are none of these layers, or another library's
                hooks on the model would lose the adapters, or be lost.
        """
        record = Record(config, (), name, given=chains is not None, layers=dict(layers))
        record.statistics = statistics_of(self.root)
        bases: dict[str, Any] = {layer: adapter.base_layer for layer, adapter in layers.items()}
        with plainly(self.root):
            refuse_foreign_hooks(self.root, bases, config)
            plans = plan_chains(self.root, bases, config, chains)
            confirm_order(self.root, bases, plans, None, record)
        for layer in names_of_experts(plans):
            layers[layer].config = without_hand_over(layers[layer].config)
        self.records[name] = record
        self._hang([record])
        build_chains(self.root, plans)

    def forget(self, name: str) -> None:
        record = self.records.pop(name, None)
        if record is not None:
            for hook in record.hooks:
                hook.remove()
            if self.in_force == name:
                self._hang([])

    def put_in_force(self, names: Sequence[str]) -> None:
        """Let the chains of these adapters run, and those of no other. The first one's record is the model's."""
        self._hang([self.records[name] for name in names if name in self.records])

    @contextmanager
    def for_a_while(self, names: Sequence[str]) -> Iterator[None]:
        """``put_in_force`` for the block."""
        record = self.root.__dict__.get("_reslora")
        before = [] if record is None else [record.name, *record.together]
        self.put_in_force(names)
        try:
            yield
        finally:
            self.put_in_force(before)

    def layers_of(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The layers of these adapters by name."""
        return {name: self.records[name].layers or {} for name in names if name in self.records}

    def refuse_merged_but(self, names: Sequence[str]) -> None:
        """ValueError while other adapters are merged than these."""
        held = ({record.name, *record.together} for record in self.records.values() if record.merged is not None)
        merged = next((sorted(together) for together in held if together != set(names)), None)
        if merged:
            raise ValueError(f"adapter {merged[0]!r} is merged into the weights: call unmerge_adapter() first")

    def _hang(self, chosen: Sequence[Record]) -> None:
        self.root.__dict__.pop("_reslora", None)
        for record in self.records.values():
            record.put_in_force(any(record is one for one in chosen))
            record.together, record.others = (), {}
        if chosen:
            chosen[0].together = tuple(record.name for record in chosen[1:])
            chosen[0].others = {record.name: SetAside(record, dict(record.layers or {})) for record in chosen[1:]}
            self.root.__dict__["_reslora"] = chosen[0]


def refuse_taken_off_hooks(root: nn.Module) -> None:
    """ValueError for an offloaded model without its hooks: PEFT then hooks the adapters too, which are shared."""
    places = set((getattr(root, "hf_device_map", None) or {}).values())
    offloaded = "disk" in places or ("cpu" in places and len(places) > 1)
    if offloaded and not any("_hf_hook" in vars(module) for module in root.modules()):
        raise ValueError(
            "PeftModel.from_pretrained takes accelerate's hooks off a model that is offloaded in part "
            f"(hf_device_map has {sorted(map(str, places))}), and would offload the adapters with it: call "
            "get_peft_model(model, PeftConfig.from_pretrained(path)), then "
            "set_peft_model_state_dict(peft_model, load_peft_weights(path))"
        )


@contextmanager
def plainly(root: nn.Module) -> Iterator[None]:
    """For the block, the frozen layers in their own places: the model as it was before any adapter."""
    layers: list[Any] = [module for module in root.modules() if "reslora_adapter" in module._modules]
    replace_modules(root, {id(layer): layer.base_layer for layer in layers})
    try:
        yield
    finally:
        replace_modules(root, {id(layer.base_layer): layer for layer in layers})


def adapters_of(root: nn.Module) -> Adapters:
    """Those of the model, which has none before the first call."""
    adapters: Adapters = root.__dict__.setdefault("_reslora_adapters", Adapters(root))
    if hasattr(type(root), "fuse_lora") and not isinstance(vars(root).get("fuse_lora"), Fuse):
        Fuse(root, "fuse_lora")
    return adapters


class _BesideItsBase:
    """What makes a ResLoRALinear an adapter by itself: weight and bias are those of the layer that holds it."""

    holder: ResLoRALayer

    @staticmethod
    def check_base(linear: Any) -> None:
        """Done by the layer that holds it."""

    def share_base(self, holder: Any) -> None:
        self.__dict__["holder"] = holder  # no child: the holder is the parent
        self.in_features, self.out_features = holder.in_features, holder.out_features
        self.training = holder.training

    @property
    def base_layer(self) -> Any:
        return self.holder.base_layer

    @property
    def samples_first(self) -> bool | None:
        return self.holder.samples_first

    @samples_first.setter
    def samples_first(self, known: bool | None) -> None:
        self.holder.samples_first = known

    def _replace_base(self, base: nn.Linear) -> None:
        self.holder.base_layer = base

    @property
    def holds_weight(self) -> Any:
        return self.base_layer

    @property
    def weight(self) -> Any:
        return held_in(self.base_layer)

    @property
    def bias(self) -> Any:
        return getattr(self.base_layer, "bias", None)  # an embedding has none

    def _load_from_state_dict(self, *args: Any) -> None:
        """A checkpoint without it lacks it: beside its base, an adapter is never part of a base checkpoint."""
        nn.Module._load_from_state_dict(self, *args)  # type: ignore[arg-type]
        AdapterLayer._started_by(self, *args[:2])  # type: ignore[arg-type]


ADAPTERS: dict[type[ResLoRALinear], type[ResLoRALinear]] = {
    kind: type(f"{kind.__name__}Adapter", (_BesideItsBase, kind), {"__module__": __name__}) for kind in KINDS
}
globals().update((adapter.__name__, adapter) for adapter in ADAPTERS.values())  # where pickle looks for them


def _nothing_more_to_share(base_layer: nn.Module) -> None:
    """What its hook brings is on ``base_layer``, where the adapters look for it."""


class ResLoRALayer(nn.Module, BaseTunerLayer):
    """A frozen linear layer, ``base_layer``, and its adapters by name in ``reslora_adapter``: those in force sum.

    Args:
        base_layer: a module that ``layers.kinds`` has a kind of adapted layer for. Its hooks become this layer's,
            accelerate's included.
        adapters: those of the model.

    Raises:
        TypeError: ``base_layer`` is of another kind.
    """

    base_layer: Any
    reslora_adapter: Any
    adapter_layer_names = ("reslora_adapter",)

    def __init__(self, base_layer: nn.Module, adapters: Adapters) -> None:
        super().__init__()
        self.kind = kind_of(base_layer) or ResLoRALinear
        self.kind.check_base(base_layer)
        if self.kind.parts(base_layer):
            raise ValueError(
                f"a {type(base_layer).__name__} is adapted with layers inside it, which have no place in a PeftModel: "
                "call apply_reslora on the model instead"
            )
        self.in_features, self.out_features = self.kind.sizes(base_layer)
        self.samples_first = self.kind.samples_first
        self.base_layer = base_layer
        self.reslora_adapter = nn.ModuleDict()
        self.adapters = adapters
        self.samples: list[str] | None = None  # the adapter of each sample of the batch, for the time of a forward
        self.training = base_layer.training
        share_hooks(base_layer, self)
        hook_like(base_layer, self, _nothing_more_to_share)

    def add(self, adapter_name: str, config: ResLoRAConfig, random_b: bool = False) -> None:
        """A new adapter, in the dtype of the weight as PEFT's are, which casts it afterwards if asked to."""
        dtype = self.kind.weight_of(self.base_layer).dtype
        holder: Any = self
        adapter = ADAPTERS[self.kind].from_linear(holder, config, dtype if dtype.is_floating_point else None)
        if random_b:
            nn.init.kaiming_uniform_(getattr(adapter, adapter.zero_at_start), a=math.sqrt(5))
        self.reslora_adapter[adapter_name] = adapter

    @property
    def merged_adapters(self) -> list[str]:  # type: ignore[override]
        """The names of the adapters that the weight holds."""
        return [name for name, adapter in self.reslora_adapter.items() if adapter.merged]

    @property
    def dequantized(self) -> bool:
        """Whether a plain layer with a merged weight is in the place of the quantised one."""
        return self.kind is QuantizedResLoRALinear and self.merged

    @property
    def in_force(self) -> tuple[ResLoRALinear, ...]:
        """Its adapters in force."""
        held = self.reslora_adapter
        return tuple([held[name] for name in self.active_adapters if name in held])

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's; ValueError while another adapter is merged."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.adapters.refuse_merged_but(names)
        super().set_adapter(names, inference_mode=inference_mode)
        self.adapters.put_in_force(names)

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled and self.merged:
            raise ValueError("the adapter is merged into the weights: unmerge it before it is disabled")
        super().enable_adapters(enabled)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Let s of an adapter count ``scale`` times; merges and exports see it, saves do not, as with PEFT's LoRA."""
        if adapter in self.reslora_adapter and self.reslora_adapter[adapter].factor != float(scale):
            self._refuse_merged()
            self.reslora_adapter[adapter].factor = float(scale)

    def scale_layer(self, scale: float) -> None:
        """``scale`` times what the adapters in force count: diffusers' ``cross_attention_kwargs={"scale": scale}``."""
        self._refuse_merged()
        for adapter in self.in_force:
            adapter.factor *= float(scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Takes ``scale_layer`` back; None sets all back to 1."""
        if scale == 0:
            raise ValueError("scale must not be 0, which nothing can be divided by: unscale_layer() sets all back to 1")
        self._refuse_merged()
        for adapter in self.in_force:
            adapter.factor = 1.0 if scale is None else adapter.factor / scale

    def _refuse_merged(self) -> None:
        if self.merged:
            raise ValueError("the adapter is merged into the weights at its scale: unmerge it before that is changed")

    def _freeze_non_trainable_peft_weights(self, adapter_names: Any = None) -> None:
        for adapter in self.reslora_adapter.values():
            for name, parameter in adapter.adapter_parameters().items():
                if name.startswith("start_"):
                    parameter.requires_grad_(False)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: what a layer's shortcut amounts to depends on its chain, so that a model merges as one."""
        raise NotImplementedError(
            "ResLoRA layers merge as one: call merge_adapter() or merge_and_unload() of the PeftModel, or "
            "reslora_kernels.merge_reslora(model)"
        )

    def unmerge(self) -> None:
        raise NotImplementedError(
            "ResLoRA layers unmerge as one: call unmerge_adapter() of the PeftModel, or "
            "reslora_kernels.unmerge_reslora(model)"
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] to y [..., out_features], with the adapters in force if there are any."""
        adapters = self.in_force
        if self.disable_adapters or (not adapters and self.samples is None):
            y: Tensor = bare_forward(self.base_layer)(x)  # its hooks are this layer's, which have run
            return y
        if self.samples is not None:
            held = dict(self.reslora_adapter)
            return in_parts(next(iter(held.values())), parts_for(self.samples, held), x)
        if len(adapters) > 1 and not adapters[0].merged:
            return in_parts(adapters[0], (Part(adapters),), x)
        y = adapters[0](x)
        return y

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, adapters={list(self.reslora_adapter)}"
        )

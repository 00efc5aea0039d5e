"""The adapters of one model under PEFT: what the package remembers of each, and which one is in force."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..adapt.apply import replace_modules, without_hand_over
from ..adapt.linking import Chains, build_chains, confirm_order, names_of_experts, plan_chains
from ..adapt.obstacles import refuse_foreign_hooks
from ..adapt.record import Record
from ..config import ResLoRAConfig
from ..layers.linear import ResLoRALinear


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
        """ValueError while an adapter is merged that is not one of these."""
        merged = [name for name, record in self.records.items() if record.merged is not None and name not in names]
        if merged:
            raise ValueError(f"adapter {merged[0]!r} is merged into the weights: call unmerge_adapter() first")

    def _hang(self, chosen: Sequence[Record]) -> None:
        self.root.__dict__.pop("_reslora", None)
        for record in self.records.values():
            record.put_in_force(any(record is one for one in chosen))
            record.together = ()
        if chosen:
            chosen[0].together = tuple(record.name for record in chosen[1:])
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
    return adapters

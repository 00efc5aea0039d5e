"""What an adapted model is made of: every layer with its chain, every linear layer left out with the reason."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from ..config import ResLoRAConfig
from ..layers.adapter import AdapterLayer
from ..layers.kinds import is_linear
from ..layers.shortcuts import hands_on
from .record import Record, adapted_layers, record_of, refuse_lost, root_of

NOMINAL_TOKENS = 4096  # for which the choice of a backend is shown


@dataclass(frozen=True)
class LayerRow:
    """One adapted layer. ``position`` counts from 0 along the chain.

    ``predecessor`` is the layer before it in its chain, "" for the first. ``hands_on`` says whether the layer hands
    something of its tokens on to the next one, and if not why.
    """

    name: str
    in_features: int
    out_features: int
    r: int
    chain: str
    position: int
    chain_length: int
    predecessor: str
    hands_on: str
    backend: str
    reason: str
    parameters: int


@dataclass(frozen=True)
class Coverage:
    """Every adapted layer, every linear layer that is not with the reason, and what no linear layer holds.

    ``str()`` gives tables.
    """

    shortcut: str
    pre_num: int
    gates: str
    order: str
    layers: tuple[LayerRow, ...]
    unmatched: tuple[tuple[str, str], ...]
    others: tuple[OtherRow, ...]
    trainable_parameters: int
    total_parameters: int

    @property
    def said_of_shortcut(self) -> str:
        gates = "" if self.gates == "none" else f", gates {self.gates!r}"
        return f"shortcut {self.shortcut!r}, pre_num {self.pre_num}{gates}"

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values only, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        header = ("layer", "in", "out", "r", "chain", "position", "after", "hands on", "backend", "why")
        rows = [
            (
                row.name,
                str(row.in_features),
                str(row.out_features),
                str(row.r),
                row.chain,
                f"{row.position + 1}/{row.chain_length}",
                row.predecessor or "-",
                row.hands_on,
                row.backend,
                row.reason,
            )
            for row in self.layers
        ]
        share = 100 * self.trainable_parameters / max(1, self.total_parameters)
        parts = [
            f"{self.said_of_shortcut}; chains from {self.order}",
            table(header, rows),
            f"trainable parameters: {self.trainable_parameters:,} of {self.total_parameters:,} ({share:.3f} %)",
        ]
        if self.unmatched:
            parts += ["not adapted:", table(("linear layer", "why"), self.unmatched)]
        if self.others:
            others = [(row.name, row.kind, str(row.modules), f"{row.parameters:,}") for row in self.others]
            parts += ["in no linear layer:", table(("module", "kind", "modules", "parameters"), others)]
        return "\n".join(parts)


def inspect(model: nn.Module) -> Coverage:
    """The coverage of an adapted model: its chains, backends with the reason, what is left out and why.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: it is not adapted, or an adapted layer is no longer in it.
    """
    layers, record = adapted_layers(model), record_of(model)
    refuse_lost(root_of(model), record, layers)
    names = {id(layer): name for name, layer in layers.items()}
    linked = [layer for chain in record.chains for layer in chain.layers]
    parameters = list(root_of(model).parameters())
    return Coverage(
        shortcut=record.config.shortcut,
        pre_num=record.config.pre_num,
        gates=record.config.gates,
        order=f"{record.order}; {record.note}" if record.note else record.order,
        layers=tuple(_row(layer, names, record) for layer in linked),
        unmatched=record.unmatched,
        others=other_parameters(root_of(model)),
        trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        total_parameters=sum(p.numel() for p in parameters),
    )


def table(header: tuple[str, ...], rows: Any) -> str:
    """Plain text columns."""
    cells = [header, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _whether_handed(layer: AdapterLayer, expert: bool, config: ResLoRAConfig) -> str:
    """Whether the layer hands something on to the next one of its chain, and if not why."""
    if expert:
        return "no: an expert, plain LoRA" if hands_on(config.shortcut, config.pre_num) else "no: an expert"
    if not hands_on(config.shortcut, config.pre_num):
        return f"no: shortcut {config.shortcut!r}"
    if layer.position + 1 < layer.chain_length:
        return "yes"
    return "no: last of its chain" if layer.position else "no: alone in its chain"


def _row(layer: AdapterLayer, names: Mapping[int, str], record: Record) -> LayerRow:
    assert layer.chain is not None
    name, before = names[id(layer)], layer.chain.layers[: layer.position]
    choice = layer.backend_choice(NOMINAL_TOKENS)
    return LayerRow(
        name=name,
        in_features=layer.in_features,
        out_features=layer.out_features,
        r=layer.config.r,
        chain=layer.chain.name,
        position=layer.position,
        chain_length=layer.chain_length,
        predecessor=names[id(before[-1])] if before else "",
        hands_on=_whether_handed(layer, name in record.experts, record.config),
        backend=choice.name,
        reason=choice.reason,
        parameters=sum(p.numel() for p in layer.adapter_parameters().values() if p.requires_grad),
    )


@dataclass(frozen=True)
class OtherRow:
    """Parameters that no linear layer holds: of ``modules`` modules of one kind and, but for norms, one name.

    In ``name`` an asterisk stands for the numbers in which the modules' names differ.
    """

    name: str
    kind: str
    modules: int
    parameters: int


def other_parameters(model: nn.Module) -> tuple[OtherRow, ...]:
    """One row for each kind of module and name, in registration order; a parameter in several places counts once.

    With the linear layers' own weights and biases, and the adapters, the rows add up to the model.
    """
    layers = (module for module in model.modules() if is_linear(module) or isinstance(module, AdapterLayer))
    seen: set[Tensor] = {p for layer in layers for p in layer.parameters()}
    counts: dict[tuple[str, str], tuple[int, int]] = {}
    for name, module in model.named_modules():
        own = {parameter for parameter in module._parameters.values() if parameter is not None} - seen
        if own:
            seen |= own
            kind = type(module).__name__
            key = ("(norms)" if "norm" in kind.lower() else re.sub(r"(?<![^.])\d+(?![^.])", "*", name), kind)
            modules, parameters = counts.get(key, (0, 0))
            counts[key] = modules + 1, parameters + sum(parameter.numel() for parameter in own)
    return tuple(OtherRow(*key, *numbers) for key, numbers in counts.items())

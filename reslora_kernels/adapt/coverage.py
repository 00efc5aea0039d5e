"""What an adapted model is made of: every layer with its chain, every linear layer left out with the reason."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import select
from ..layers.linear import ResLoRALinear
from .other_parameters import OtherRow, other_parameters
from .record import adapted_layers, record_of, root_of

NOMINAL_TOKENS = 4096  # for which the choice of a backend is shown


@dataclass(frozen=True)
class LayerRow:
    """One adapted layer. ``position`` counts from 0 in the order of execution."""

    name: str
    in_features: int
    out_features: int
    r: int
    chain: str
    position: int
    chain_length: int
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
    order: str
    layers: tuple[LayerRow, ...]
    unmatched: tuple[tuple[str, str], ...]
    others: tuple[OtherRow, ...]
    trainable_parameters: int
    total_parameters: int

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values only, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        header = ("layer", "in", "out", "r", "chain", "position", "backend", "why")
        rows = [
            (
                row.name,
                str(row.in_features),
                str(row.out_features),
                str(row.r),
                row.chain,
                f"{row.position + 1}/{row.chain_length}" if row.chain else "-",
                row.backend,
                row.reason,
            )
            for row in self.layers
        ]
        share = 100 * self.trainable_parameters / max(1, self.total_parameters)
        parts = [
            f"shortcut {self.shortcut!r}, pre_num {self.pre_num}; order of execution: {self.order}",
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
    """The coverage of an adapted model: chains in the order of execution, backends with the reason, what is left out.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: it is not adapted.
    """
    layers = adapted_layers(model)
    record = record_of(model)
    names = {id(layer): name for name, layer in layers.items()}
    linked = [layer for chain in record.chains for layer in chain.layers]
    ordered = linked + [layer for layer in layers.values() if layer.chain is None]
    parameters = list(root_of(model).parameters())
    return Coverage(
        shortcut=record.config.shortcut,
        pre_num=record.config.pre_num,
        order=f"{record.order}; {record.note}" if record.note else record.order,
        layers=tuple(_row(names[id(layer)], layer) for layer in ordered),
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


def _row(name: str, layer: ResLoRALinear) -> LayerRow:
    weight = layer.frozen_weight
    if not isinstance(weight, Tensor):  # unpacked to the dtype of x, which is half precision as a rule
        weight = torch.empty(weight.shape, dtype=torch.bfloat16, device=weight.device)
    x = weight.new_empty(1, layer.in_features).expand(NOMINAL_TOKENS, -1)
    choice = select.explain(layer.config.backend, x, weight, layer.rank_of_call)
    return LayerRow(
        name=name,
        in_features=layer.in_features,
        out_features=layer.out_features,
        r=layer.config.r,
        chain=layer.chain.name if layer.chain is not None else "",
        position=layer.position,
        chain_length=layer.chain_length,
        backend=choice.name,
        reason=choice.reason,
        parameters=sum(p.numel() for p in layer.adapter_parameters().values() if p.requires_grad),
    )

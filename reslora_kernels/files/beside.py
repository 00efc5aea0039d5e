"""What is saved beside the adapters: what else was trained, and what the base checkpoint does not define.

A parameter that the model holds under several names (tied embeddings) is there under each, so that a model in which
they are apart gets all of it, and one in which they are tied can tell whether it was saved from such a model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adapt.base_checkpoint import named_parameters, resized_embeddings
from ..adapt.record import adapted_layers, record_of, root_of, without_compiled


@dataclass(frozen=True)
class Beside:
    """Parameters by name: those that train, and those that are frozen and saved all the same."""

    trained: dict[str, nn.Parameter]
    frozen: dict[str, nn.Parameter]


def beside(model: nn.Module) -> Beside:
    """What of an adapted model is saved beside its adapters."""
    root, record = root_of(model), record_of(model)
    adapters = {id(p) for layer in adapted_layers(model).values() for p in layer.adapter_parameters().values()}
    others = {name: p for name, p in named_parameters(root).items() if id(p) not in adapters}
    resized = tuple(f"{without_compiled(name)}." for name in resized_embeddings(root))
    kept = {id(p) for name, p in others.items() if name in record.kept or name.startswith(resized)}
    return Beside(
        trained={name: p for name, p in others.items() if p.requires_grad},
        frozen={
            name: p for name, p in others.items() if id(p) in kept and p.is_floating_point() and not p.requires_grad
        },
    )


def check_shared(root: nn.Module, names: Collection[str], values: Mapping[str, Tensor]) -> None:
    """ValueError if ``values`` holds one of ``names`` that a shared parameter has, and not the same under all others.

    One parameter cannot take two values, nor take one while the file leaves its other name as it was.
    """
    groups: dict[int, list[str]] = {}
    for name, parameter in named_parameters(root).items():
        groups.setdefault(id(parameter), []).append(name)
    for group in groups.values():
        given = [name for name in group if name in names]
        for name in group if given else ():
            if name not in names or not torch.equal(values[name], values[given[0]]):
                raise ValueError(
                    f"the adapter was trained with {given[0]!r} apart from {name!r}, which are one parameter in this "
                    "model: untie them first (tie_word_embeddings=False, and a copy of the weight)"
                )

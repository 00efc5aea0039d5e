"""What a model holds beside its linear layers: embeddings, norms, convolutions, routers, fused experts."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor, nn

from ..layers.adapter import AdapterLayer
from ..layers.kinds import is_linear


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

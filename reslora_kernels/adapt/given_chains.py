"""``chains=`` of apply_reslora: chains by hand, where the names of the modules do not say how the layers follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..config import ResLoRAConfig
from ..layers.kinds import config_of, signature_of
from .structure import ChainPlan, structural_chains

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

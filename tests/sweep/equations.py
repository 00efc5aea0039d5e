"""ResLoRA's equations (arXiv 2402.18039, Eqs. 1 to 4), with forward hooks on a base model. Imports torch only.

Chains are read off the names: the indices into lists of blocks are a layer's depth, the rest of its path is its role.
In one pass the k-th call of a layer takes from the k-th call of the layer before it, if that has been made on tokens of
the same shape; else it counts as the first of its chain. Layers of experts neither give nor take.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

UNET = ("down_blocks", "mid_block", "up_blocks")  # one depth, in this order


class Place(NamedTuple):
    """Where a layer stands: layers with one role and equal sizes are a chain, ordered by depth."""

    role: tuple[str, ...]
    depth: tuple[int, ...]
    is_expert: bool


def place_of(model: nn.Module, name: str) -> Place:
    """The place of the layer called ``name``."""
    role: list[str] = []
    depth: list[int] = []
    module, numbered, experts = model, False, False
    for part in name.split("."):
        listed = isinstance(module, nn.ModuleList) or (isinstance(module, nn.Sequential) and not numbered)
        if part in UNET and module is model and hasattr(model, "mid_block"):
            depth.append(UNET.index(part))
        elif part.isdecimal() and listed and not experts:
            depth.append(int(part))
            numbered = True
        else:
            role.append(part)
        experts = experts or part == "experts"
        module = module.get_submodule(part)
    return Place(tuple(role), tuple(depth), experts)


def chains_of(model: nn.Module, names: list[str]) -> list[list[str]]:
    """The layers called ``names`` in chains, each in the order of depth."""
    chains: dict[Any, list[tuple[tuple[int, ...], str]]] = {}
    for name in names:
        place, layer = place_of(model, name), model.get_submodule(name)
        key = (place.role, layer.in_features, layer.out_features)
        chains.setdefault(key, []).append((place.depth, name))
    return [[name for _, name in sorted(chain)] for chain in chains.values()]


class Equations:
    """A base model whose layers get the low-rank term of one shortcut, from A and B that are given by name."""

    def __init__(
        self, model: nn.Module, a: Mapping[str, Tensor], b: Mapping[str, Tensor], shortcut: str, m: int, scaling: float
    ) -> None:
        self.model, self.a, self.b, self.shortcut, self.m, self.scaling = model, a, b, shortcut, m, scaling
        self.experts = {name for name in a if place_of(model, name).is_expert}
        self.before = {  # the layers of its chain before each, nearest first
            name: chain[:n][::-1] for chain in chains_of(model, list(a)) for n, name in enumerate(chain)
        }
        self.calls: dict[str, list[tuple[Tensor, tuple[Tensor, ...]]]] = {}
        for name in a:
            model.get_submodule(name).register_forward_hook(self._hook(name), with_kwargs=True)

    def __call__(self, **batch: Any) -> Any:
        """One pass."""
        self.calls = {}
        return self.model(**batch)

    def _hook(self, name: str) -> Any:
        def add_term(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
            x = args[0] if args else next(iter(kwargs.values()))
            return y + self.scaling * self._term(name, x)

        return add_term

    def _term(self, name: str, x: Tensor) -> Tensor:
        a, b = self.a[name], self.b[name]
        own = x @ a.T
        if self.shortcut == "block":  # Eq. 3
            return own @ b.T + sum(x @ self.a[other].T @ self.b[other].T for other in self._window(self.before[name]))
        if self.shortcut == "none" or name in self.experts:  # Eq. 1
            return own @ b.T
        received = self._received(name, x)
        self.calls.setdefault(name, []).append((x, self._window((own, *received))))
        if self.shortcut == "input":  # Eq. 2
            return (x + (received[0] if received else x)) @ a.T @ b.T
        return sum(received, own) @ b.T  # Eq. 4

    def _received(self, name: str, x: Tensor) -> tuple[Tensor, ...]:
        """What the same call of the layer before handed on: its x for ``input``, low-rank products for ``middle``."""
        k = len(self.calls.get(name, []))
        calls = self.calls.get(self.before[name][0], []) if self.before[name] else []
        if len(calls) <= k or calls[k][0].shape[:-1] != x.shape[:-1]:
            return ()
        return (calls[k][0],) if self.shortcut == "input" else calls[k][1]

    def _window(self, values: Any) -> Any:
        """The ``m`` nearest; all where m is negative."""
        return values if self.m < 0 else values[: self.m]

"""The chain that a shortcut runs along, and what its layers know of each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from ..forward_state import Member, Passes
from .shortcuts import Adapter


class Neighbour(Adapter, Member, Protocol):
    """What a layer reads of another one in its chain: A, B and where it stands."""


LayerT = TypeVar("LayerT", bound=Neighbour)


class Neighbours(NamedTuple):
    """The layers around one in its chain that its shortcut reads: those before it, nearest first, and the next."""

    earlier: tuple[Neighbour, ...] = ()
    following: Neighbour | None = None

    @property
    def predecessor(self) -> Neighbour | None:
        return self.earlier[0] if self.earlier else None


class Chain(Generic[LayerT]):
    """Layers of one role in successive blocks, with equal sizes and ranks. Not a module: it owns nothing.

    Args:
        layers: the adapted layers, in order.
        name: what ``inspect`` calls the chain.
    """

    def __init__(self, layers: Sequence[LayerT], name: str = "") -> None:
        self.layers = list(layers)
        self.name = name
        self.passes = Passes()
        self.reach = (0, 0)
        self.active = True  # False while another adapter is: its layers are not in the model

    def __len__(self) -> int:
        return len(self.layers)

    def introduce(self, reach: tuple[int, int]) -> None:
        """Tell every layer its neighbours within ``reach``: so many before it, and whether the next."""
        self.reach = before, after = reach
        for n, layer in enumerate(self.layers):
            earlier, following = self.layers[max(0, n - before) : n], self.layers[n + 1 : n + 1 + after]
            layer.__dict__["neighbours"] = Neighbours(tuple(reversed(earlier)), *following)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.introduce(self.reach)

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """One forward pass through layers that were linked by hand, without a module around them."""
        with self.passes.opened_by_hand():
            yield

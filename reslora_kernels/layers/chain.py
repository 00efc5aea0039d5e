"""What layers have in common: the chain that a shortcut runs along, and the tensor that several of them read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ..forward_state import ForwardState, Member, Passes, keeps_versions
from .shortcuts import Adapter, Call, for_others_too, rows, with_projection

MOST_ROWS = 256  # of A matrices that one layer multiplies its input by for a group


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


class Reader(Protocol):
    """What a group needs of its layers."""

    lora_A: Any
    replacement: Any
    shared: Any
    index: int

    @property
    def a_stack(self) -> tuple[Tensor, ...]: ...


class SharedInput:
    """Layers that read the same tensor, in the order in which they run: the first projects it for all of them."""

    def __init__(self, layers: Sequence[Reader]) -> None:
        self.layers = list(layers)
        self.passes = Passes()
        self.active = True  # as for a chain
        for index, layer in enumerate(self.layers):
            layer.shared, layer.index = self, index

    def run(
        self, index: int, x: Tensor, call: Call, compute: Callable[[Call], tuple[Tensor, Tensor | None]]
    ) -> tuple[Tensor, Tensor | None]:
        """What ``compute(call)`` gives the layer at ``index``, with projections used that an earlier layer made."""
        state = self._open_pass()
        if state is None or not keeps_versions(x):
            return compute(call)
        projected = state.projection_of(index, x)
        if projected is not None:
            call, handed = with_projection(call, projected)
            return compute(call)[0], handed
        later = self._later(index, call, x.device)
        if not later:
            return compute(call)
        y, h = compute(for_others_too(call, [a for stack in later.values() for a in stack]))
        assert h is not None
        own = call.hand[1] - call.hand[0] if call.hand else 0
        handed, *parts = torch.split(h, [own, *map(rows, later.values())], dim=-1)
        state.project_for(x, dict(zip(later, parts, strict=True)))
        return y, handed if call.hand else None

    def _later(self, index: int, call: Call, device: torch.device) -> dict[int, tuple[Tensor, ...]]:
        """The A stacks of the layers after ``index``, by index; none if they are too many rows for one projection."""
        layers = enumerate(self.layers[index + 1 :], index + 1)
        stacks = {other: layer.a_stack for other, layer in layers if layer.lora_A.device == device}
        return stacks if rows(call.a_stack) + sum(map(rows, stacks.values())) <= MOST_ROWS else {}

    def _open_pass(self) -> ForwardState | None:
        """The forward pass of the module around the layers, if projections can be shared in it now."""
        state = self.passes.current()
        if state is None or state.is_stale or any(layer.replacement is not None for layer in self.layers):
            return None
        return state

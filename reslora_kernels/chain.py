"""What links layers: the chain that a shortcut runs along, and the group that reads one input. Neither owns a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .forward_state import ForwardState, Passes
from .shortcuts import Plan, for_others_too, rows, with_projection

if TYPE_CHECKING:
    from .linear import ResLoRALinear

MOST_ROWS = 256  # of A matrices that one layer multiplies its input by for a group


class Neighbours(NamedTuple):
    """The layers around one in its chain that its shortcut reads: those before it, nearest first, and the next."""

    earlier: tuple[ResLoRALinear, ...] = ()
    following: ResLoRALinear | None = None

    @property
    def predecessor(self) -> ResLoRALinear | None:
        return self.earlier[0] if self.earlier else None


class Chain:
    """Layers of one role in the order in which they execute, with equal sizes and ranks. Not a module: it owns nothing.

    Args:
        layers: the adapted layers, first to execute first.
        name: what ``inspect`` calls the chain.
    """

    def __init__(self, layers: Sequence[ResLoRALinear], name: str = "") -> None:
        self.layers = list(layers)
        self.name = name
        self.passes = Passes()
        self.reach = (0, 0)
        self.in_force = True  # False while another adapter is: its layers are not in the model

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


class SharedInput:
    """Layers that read the same tensor, in the order in which they execute: the first projects it for all of them."""

    def __init__(self, layers: Sequence[ResLoRALinear]) -> None:
        self.layers = list(layers)
        self.passes = Passes()
        self.in_force = True  # as for a chain
        for place, layer in enumerate(self.layers):
            layer.shared, layer.place = self, place

    def run(
        self, place: int, x: Tensor, call: Plan, compute: Callable[[Plan], tuple[Tensor, Tensor | None]]
    ) -> tuple[Tensor, Tensor | None]:
        """What ``compute(call)`` gives the layer at ``place``, with projections used that an earlier layer made."""
        state = self._open_pass()
        if state is None:
            return compute(call)
        projected = state.projection_of(place, x)
        if projected is not None:
            call, handed = with_projection(call, projected)
            return compute(call)[0], handed
        later = self._later(place, call, x.device)
        if not later:
            return compute(call)
        y, h = compute(for_others_too(call, [a for stack in later.values() for a in stack]))
        assert h is not None
        own = call.hand[1] - call.hand[0] if call.hand else 0
        handed, *parts = torch.split(h, [own, *map(rows, later.values())], dim=-1)
        state.project_for(x, dict(zip(later, parts, strict=True)))
        return y, handed if call.hand else None

    def _later(self, place: int, call: Plan, device: torch.device) -> dict[int, tuple[Tensor, ...]]:
        """The A stacks of the layers after ``place``, by place; none if they are too many rows for one projection."""
        layers = enumerate(self.layers[place + 1 :], place + 1)
        stacks = {other: layer.a_stack for other, layer in layers if layer.lora_A.device == device}
        return stacks if rows(call.a_stack) + sum(map(rows, stacks.values())) <= MOST_ROWS else {}

    def _open_pass(self) -> ForwardState | None:
        """The forward pass of the module around the layers, if projections can be shared in it now."""
        state = self.passes.current()
        if state is None or state.is_stale or any(layer.replacement is not None for layer in self.layers):
            return None
        return state


def scope_pass(module: nn.Module, chains: Sequence[Chain | SharedInput]) -> list[RemovableHandle]:
    """Make ``module``'s forward one pass through ``chains``. The hooks hold the chains, so a deep copy has its own."""
    return [
        module.register_forward_pre_hook(_OpenPass(chains), prepend=True),
        module.register_forward_hook(_ClosePass(chains), always_call=True),
    ]


class _OpenPass:
    def __init__(self, chains: Sequence[Chain | SharedInput]) -> None:
        self.chains = list(chains)

    def __call__(self, module: nn.Module, args: Any) -> None:
        for chain in self.chains:
            if chain.in_force:
                chain.passes.open(module)


class _ClosePass(_OpenPass):
    def __call__(self, module: nn.Module, args: Any, output: Any = None) -> None:
        for chain in self.chains:
            chain.passes.close(module)


def outside(shortcut: str, name: str, position: int) -> str:
    """What to tell who runs a layer where its chain has no forward pass open."""
    where = f"layer {position} of chain {name!r}" if name else f"layer {position} of a chain"
    return (
        f"{where} with shortcut {shortcut!r} ran outside a forward pass, where no earlier layer's state exists. Call "
        "the model that apply_reslora or link(..., root=model) was given, or run the layers inside "
        "`with chain.forward_pass():`. If this happened in backward, activation checkpointing recomputes the layer: "
        "use torch.utils.checkpoint with use_reentrant=False and context_fn=checkpoint_context(model)."
    )

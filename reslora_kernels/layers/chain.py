"""What layers have in common: the chain that a shortcut runs along, and the tensor that several of them read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from ..dtensors import initialised
from ..forward_state import ForwardState, Member, Passes, keeps_versions, recomputing, version_of
from ..ops.call import Sharing
from ..ops.function import setting_of
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
        self.entered = True  # False of a model's own chains until a module around the whole chain has run

    def __len__(self) -> int:
        return len(self.layers)

    def introduce(self, reach: tuple[int, int]) -> None:
        """Tell every layer its neighbours within ``reach``: so many before it, and whether the next."""
        self.reach = before, after = reach
        for n, layer in enumerate(self.layers):
            earlier, following = self.layers[max(0, n - before) : n], self.layers[n + 1 : n + 1 + after]
            layer.__dict__["neighbours"] = Neighbours(tuple(reversed(earlier)), *following)

    def refuse_part(self, position: int) -> None:
        """RuntimeError if a layer trains where another process may train the adapters before it that it reads."""
        if Entered.compiled or not (torch.is_grad_enabled() and initialised()):
            return
        if torch.distributed.get_world_size() > 1:
            raise RuntimeError(
                f"layer {position} of chain {self.name!r} reads A and B of layers before it, and no module around them "
                "all has run in this process, one of several: a part of a model is trained alone. Let its chains go on "
                "with pipeline_reslora, adapt the part by itself, or call the model that apply_reslora was given"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.introduce(self.reach)

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """One forward pass through layers that were linked by hand, without a module around them."""
        with self.passes.opened_by_hand():
            yield


class Entered:
    """Forward pre-hook of a module around whole chains: their layers run in the model now, not in a part of it."""

    compiled: ClassVar[bool] = False  # whether any such module was in this process: no part is refused then

    def __init__(self, chains: Sequence[Chain[Any]]) -> None:
        self.chains = list(chains)

    def __call__(self, module: nn.Module, args: Any) -> None:
        if is_dynamo_compiling():
            _compiled()
        else:
            for chain in self.chains:
                chain.entered = True


def _compiled() -> bool:
    """Called as such a module is traced: after a graph break a layer in it runs by itself, with its chain unmarked."""
    Entered.compiled = True
    return True


# torch.compiler.assume_constant_result does this, and imports the compiler
_compiled.__dict__["_dynamo_marked_constant"] = True


class Reader(Protocol):
    """What a group needs of its layers."""

    lora_A: Any
    replacement: Any
    shared: Any
    index: int
    _is_full_backward_hook: Any  # False with hooks that ``register_backward_hook`` put there

    @property
    def a_stack(self) -> tuple[Tensor, ...]: ...


class Reading:
    """What the first layer to read x has made for the others, and x as it is to be read next.

    Args:
        given: x as the model gives it to each of them.
        setting: what surrounded the call.
        x: it, as the call passed it on.
        stacks: the A matrices of the others, by index in the group; ``parts`` their h [..., R_a].
    """

    __slots__ = ("given", "projected", "setting", "version", "x")

    def __init__(
        self,
        given: Tensor,
        setting: object,
        x: Tensor,
        stacks: Mapping[int, tuple[Tensor, ...]],
        parts: Sequence[Tensor],
    ) -> None:
        self.given, self.version, self.setting, self.x = given, version_of(given), setting, x
        self.projected = {
            index: (stack, [version_of(a) for a in stack], h)
            for (index, stack), h in zip(stacks.items(), parts, strict=True)
        }

    def take(self, index: int, x: Tensor, setting: object, stack: tuple[Tensor, ...]) -> Tensor | None:
        """h of the layer at ``index``, once: if it is of this very x and these A, as they are now, in this setting."""
        if self.given is not x or self.version != version_of(x) or self.setting != setting:
            return None
        if index not in self.projected:
            return None
        used, versions, h = self.projected.pop(index)
        if len(used) != len(stack):
            return None
        for one, other, version in zip(used, stack, versions, strict=True):
            if one is not other or version_of(one) != version:
                return None
        return h


class SharedInput:
    """Layers that read the same tensor, in the order in which they run: the first projects it for all of them."""

    def __init__(self, layers: Sequence[Reader]) -> None:
        self.layers = list(layers)
        self.passes = Passes()
        self.active = True  # as for a chain
        for index, layer in enumerate(self.layers):
            layer.shared, layer.index = self, index

    def run(
        self, index: int, x: Tensor, call: Call, compute: Callable[[Tensor, Call, Sharing | None], tuple[Any, ...]]
    ) -> tuple[Tensor, Tensor | None]:
        """y of the layer at ``index``, whose call on x is ``call``, and what it hands on.

        ``compute`` makes a call on x as ``ops.fused_linear`` does.
        """
        state = self._open_pass()
        if state is None or not keeps_versions(x):
            y, handed = compute(x, call, None)
            return y, handed
        own = () if call.hand is None else (call.hand[1] - call.hand[0],)
        setting, reading = setting_of(x), state.reading
        h = reading.take(index, x, setting, call.a_stack) if reading is not None else None
        if h is not None:
            mine, handed = with_projection(call, h) if call.gate is not None else (call._replace(a_stack=(), h=h), None)
            sharing = Sharing(own if mine.hand else (), passes_x=bool(reading.projected))
            y, *parts, reading.x = compute(reading.x, mine, sharing)
            if not reading.projected:
                state.reading = None
            return y, parts[0] if parts else handed
        later = self._later(index, call, x.device)
        if not later:
            y, handed = compute(x, call, None)
            return y, handed
        sharing = Sharing((*own, *map(rows, later.values())), passes_x=True)
        whole = for_others_too(call, [a for stack in later.values() for a in stack])
        y, *parts, passed = compute(x, whole, sharing)
        handed = parts.pop(0) if own else None
        state.reading = Reading(x, setting, passed, later, parts)
        return y, handed

    def _later(self, index: int, call: Call, device: torch.device) -> dict[int, tuple[Tensor, ...]]:
        """The A stacks of the layers after ``index``, by index; none if they are too many rows for one projection."""
        layers = enumerate(self.layers[index + 1 :], index + 1)
        stacks = {other: layer.a_stack for other, layer in layers if layer.lora_A.device == device}
        return stacks if rows(call.a_stack) + sum(map(rows, stacks.values())) <= MOST_ROWS else {}

    def _open_pass(self) -> ForwardState | None:
        """The forward pass of the module around the layers, if projections can be shared in it now."""
        state = self.passes.current()
        if state is None and recomputing():
            state = self.passes.open_for_backward()
        if state is None or state.is_stale or any(map(_is_apart, self.layers)):
            return None
        return state


def _is_apart(layer: Reader) -> bool:
    """Whether a layer must have calls of its own: it is replaced, or an old kind of hook looks at its gradients."""
    return layer.replacement is not None or layer._is_full_backward_hook is False

"""What flows between the layers of a chain during one forward pass. It lives here, never on a module.

A pass is opened when a module that holds the whole chain starts its forward and closed when it ends, however it ends.
Two forwards before one backward therefore never share a tensor, and nothing outlives its forward. The state is a plain
object, opaque to pytree (FSDP2 maps over dicts and dataclasses and copies them), and holds [M, r] tensors only.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.utils.hooks import RemovableHandle


class Member(Protocol):
    """A layer of a chain."""

    @property
    def position(self) -> int: ...
    @property
    def narrows(self) -> bool: ...  # whether it may see only the last of the tokens that the layer before it saw


class _Handed:
    """What one call of a layer has handed on and no call has taken yet. A link of a list, oldest first: torch.compile
    guards how long a Python list is, which would make a graph for every number of calls."""

    __slots__ = ("layer", "next", "tensors")

    def __init__(self, layer: Member, tensors: tuple[Tensor, ...]) -> None:
        self.layer = layer
        self.tensors = tensors
        self.next: _Handed | None = None


class _Sweep:
    """One way through the layers of a chain, which may pause and go on. Its calls are counted by themselves.

    A link of the list of those that pause, oldest first.
    """

    __slots__ = ("first", "last", "latest", "missed", "next")

    def __init__(self) -> None:
        self.first: _Handed | None = None
        self.last: _Handed | None = None
        self.missed: tuple[Member, Any] | None = None  # layers whose next call comes too late, as (layer, others)
        self.latest: Member | None = None
        self.next: _Sweep | None = None

    def copy(self) -> _Sweep:
        """The same, and the same of those that come after it in the list."""
        other = _Sweep()
        entry = self.first
        while entry is not None:
            other.append(entry.layer, entry.tensors)
            entry = entry.next
        other.missed, other.latest = self.missed, self.latest
        other.next = None if self.next is None else self.next.copy()
        return other

    def append(self, layer: Member, tensors: tuple[Tensor, ...]) -> None:
        """``layer`` hands on ``tensors``."""
        entry = _Handed(layer, tensors)
        if self.last is None:
            self.first = entry
        else:
            self.last.next = entry
        self.last = entry

    def take(self, giver: Member) -> tuple[Tensor, ...]:
        """What the earliest call of ``giver`` handed on of which nobody has taken it."""
        before, entry = None, self.first
        while entry is not None and not _same(entry.layer, giver):
            before, entry = entry, entry.next
        if entry is None:
            self.missed = (giver, self.missed)
            return ()
        if before is None:
            self.first = entry.next
        else:
            before.next = entry.next
        if entry.next is None:
            self.last = before
        return entry.tensors

    def comes_too_late(self, layer: Member) -> bool:
        """Whether the call that this one of ``layer`` is for has been made already; that is then forgotten."""
        passed: list[Member] = []
        rest = self.missed
        while rest is not None:
            missed, rest = rest
            if _same(missed, layer):
                for other in reversed(passed):
                    rest = (other, rest)
                self.missed = rest
                return True
            passed.append(missed)
        return False

    @property
    def can_go_on(self) -> bool:
        """Whether a call of the next layer would get something from the latest call."""
        return self.latest is not None and self.last is not None and _same(self.last.layer, self.latest)


class ForwardState:
    """What the calls of one chain's layers have handed on in one forward pass, until the calls they are for take it.

    The k-th call of a layer takes what the k-th call of the layer before it handed on. Where a module around the chain
    runs several times in the pass, or inside another one, each time is a sweep of its own, or goes on with one that
    stopped a layer before; so does what comes after it.
    """

    __slots__ = ("_backward", "_left", "_paused", "_sweep", "outer", "owner", "reading", "thread", "trains")

    def __init__(self, owner: object, outer: ForwardState | None = None) -> None:
        self.owner = owner
        self.outer = outer  # the pass in the middle of which this one is, of a model that calls itself
        self.trains = torch.is_grad_enabled()
        self.thread = _thread()
        self._backward = _running_backward()
        self._sweep = _Sweep()
        self._paused: _Sweep | None = None
        self._left = False  # whether a module around the chain has begun or ended its forward since the latest call
        self.reading: Any = None  # of a group: what ``layers.chain`` keeps of x; of a head: whether it ran

    def copy(self) -> ForwardState:
        """The same state, to go on from without changing this one."""
        other = ForwardState(self.owner)
        other._sweep = self._sweep.copy()
        other._paused = None if self._paused is None else self._paused.copy()
        other._left, other.reading, other.trains = self._left, self.reading, self.trains
        return other

    @property
    def is_stale(self) -> bool:
        """Whether a backward has started since: a layer that runs now is recomputed, and this is not its state.

        Not known in compiled code.
        """
        return not is_dynamo_compiling() and self._backward != torch._C._current_graph_task_id()

    def enter(self, layer: Member, earlier: Sequence[Member], leading: torch.Size) -> tuple[Tensor, ...]:
        """A layer, after those ``earlier``, starts on tokens of shape ``leading``: what is handed to it, nearest first.

        Nothing is where the same call of its predecessor has not been made, or saw tokens of another shape: but of the
        last of them, what is handed on there, to a layer that ``narrows``.
        """
        if self._left:
            self._left = False
            self._pause()
            self._sweep = self._going_on_from(earlier)
        self._sweep.latest = layer
        if not earlier:
            return ()
        handed = self._sweep.take(earlier[0])
        for n, h in enumerate(handed):
            if h.shape[:-1] != leading:
                return _of_last(handed, leading) if layer.narrows else handed[:n]
        return handed

    def hand_on(self, earlier: tuple[Tensor, ...], h: Tensor) -> None:
        """The layer that entered last hands on h, and of what came to it ``earlier``."""
        sweep = self._sweep
        assert sweep.latest is not None
        if sweep.missed is None or not sweep.comes_too_late(sweep.latest):
            sweep.append(sweep.latest, (h, *earlier))

    def receive(self, layer: Member, tensors: tuple[Tensor, ...]) -> None:
        """Begin with what ``layer``, which ran elsewhere, has handed on."""
        self._sweep.append(layer, tensors)
        self._sweep.latest = layer

    def handed_by(self, layer: Member) -> list[tuple[Tensor, ...]]:
        """What the calls of ``layer`` have handed on and nobody has taken."""
        found, sweep = _handed_in(self._sweep, layer), self._paused
        while sweep is not None:
            found += _handed_in(sweep, layer)
            sweep = sweep.next
        return found

    def turn(self) -> None:
        """A module around the chain, inside the one whose forward is the pass, begins its forward or has ended it."""
        self._left = self._sweep.latest is not None

    def _pause(self) -> None:
        """Put the sweep with those that pause, unless no layer could go on from it: one that left layers out."""
        if not self._sweep.can_go_on:
            return
        if self._paused is None:
            self._paused = self._sweep
            return
        last = self._paused
        while last.next is not None:
            last = last.next
        last.next = self._sweep

    def _going_on_from(self, earlier: Sequence[Member]) -> _Sweep:
        """The oldest sweep that paused at the layer before; a new one where there is none."""
        before, sweep = None, self._paused if earlier else None
        while sweep is not None and sweep.latest is not None and not _same(sweep.latest, earlier[0]):
            before, sweep = sweep, sweep.next
        if sweep is None:
            return _Sweep()
        if before is None:
            self._paused = sweep.next
        else:
            before.next = sweep.next
        sweep.next = None
        return sweep


def _of_last(handed: tuple[Tensor, ...], leading: torch.Size) -> tuple[Tensor, ...]:
    """Of each [.., T, r] the rows of the last tokens, as many as in ``leading`` [.., t], up to one that has fewer."""
    found = []
    for h in handed:
        if h.shape[:-2] != leading[:-1] or h.shape[-2] < leading[-1]:
            break
        found.append(h[..., h.shape[-2] - leading[-1] :, :].contiguous())
    return tuple(found)


def _handed_in(sweep: _Sweep, layer: Member) -> list[tuple[Tensor, ...]]:
    found, entry = [], sweep.first
    while entry is not None:
        if _same(entry.layer, layer):
            found.append(entry.tensors)
        entry = entry.next
    return found


def _same(one: Member, other: Member) -> bool:
    # torch.compile guards that two objects are one, but not that they differ; it does guard numbers.
    return one is other or one.position == other.position


def keeps_versions(x: Tensor) -> bool:
    """Whether a write to x would be noticed: by its version, or by autograd, for which compiled code keeps x."""
    return torch.is_grad_enabled() if is_dynamo_compiling() else not x.is_inference()


def version_of(x: Tensor) -> int:
    """How often x has been written to; 0 where that is not counted: in compiled code, and of inference tensors."""
    return 0 if is_dynamo_compiling() or x.is_inference() else x._version


class Passes:
    """The open forward passes of one chain, one per thread."""

    __slots__ = ("_open",)

    def __init__(self) -> None:
        self._open: list[ForwardState] = []

    def current(self) -> ForwardState | None:
        """The pass that the running thread has open. Compiled code knows no threads: there it must be the only one.

        Raises:
            RuntimeError: while compiling, with passes open in several threads.
        """
        if is_dynamo_compiling():
            if len(self._open) > 1:
                raise RuntimeError(
                    "layers compiled one by one ran in several threads at once: compile the whole model instead"
                )
            return self._open[0] if self._open else None
        thread = threading.get_ident()
        for state in tuple(self._open):
            if state.thread == thread:
                return state
        return None

    def open(self, owner: object) -> None:
        """Open a pass, unless a module around ``owner`` has one open. A pass that ``owner`` left behind is dropped.

        Where ``owner`` is in the middle of its forward it has called itself: that is a pass of its own.
        """
        state = self.current()
        if state is not None and state.owner is owner:
            if is_dynamo_compiling() or not _runs_twice(owner):
                self._drop(state)
                state = None
        elif state is not None:
            state.turn()
            return
        if state is not None:
            self._open.remove(state)
        self._open.append(ForwardState(owner, state))

    @contextmanager
    def resumed(self, state: ForwardState) -> Iterator[None]:
        """Go on from a copy of ``state``, then return to what was open."""
        before, resumed = self.current(), state.copy()
        if before is not None:
            self._open.remove(before)
        self._open.append(resumed)
        try:
            yield
        finally:
            self._open.remove(resumed)
            if before is not None:
                self._open.append(before)

    @contextmanager
    def opened_by_hand(self) -> Iterator[None]:
        """Open a pass for a block of code instead of a module; a backward pass may run inside it."""
        owner = object()
        self.open(owner)
        entry = (self, self.current())
        _by_hand.append(entry)
        try:
            yield
        finally:
            _by_hand.remove(entry)
            self.close(owner)

    def open_for_backward(self) -> ForwardState:
        """A pass for what the running backward recomputes of a module's forward, without the module: ends with it."""
        state = ForwardState(object())
        self._open.append(state)
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(lambda: self._open.remove(state))
        return state

    def close(self, owner: object) -> None:
        """``owner`` has ended its forward: close the pass if it opened it."""
        state = self.current()
        if state is None:
            return
        if state.owner is owner:
            self._drop(state)
            if state.outer is not None:
                self._open.append(state.outer)
        else:
            state.turn()

    def _drop(self, current: ForwardState) -> None:
        if torch.compiler.is_compiling():
            self._open.pop()  # the only one; PyTorch 2.8 traces no list.remove
        else:
            self._open.remove(current)

    def __deepcopy__(self, memo: dict[int, object]) -> Passes:
        return Passes()

    def __reduce__(self) -> tuple[type[Passes], tuple[()]]:
        return Passes, ()


def _runs_twice(module: object) -> bool:
    """Whether two calls of ``module`` are under way in this thread, and none that Ctrl-C has ended."""
    calls = 0
    frame: FrameType | None = sys._getframe()
    while frame is not None and calls < 2:
        if frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is module:
            calls += 1
        frame = frame.f_back
    return calls == 2


_by_hand: list[tuple[Passes, ForwardState | None]] = []


def any_opened_by_hand() -> bool:
    """Whether ``refuse_recomputation`` has anything to refuse: some pass is open that was opened by hand."""
    return len(_by_hand) > 0


def refuse_recomputation() -> None:
    """For compiled layers, which cannot ask ``is_stale``: as the kernels run that read or write what is handed on.

    Raises:
        RuntimeError: a backward pass recomputes a layer while a pass from before it is open that was opened by hand.
    """
    running = _running_backward() if _by_hand else -1
    if running != -1 and any(
        state in passes._open and state._backward != running for passes, state in _by_hand if state
    ):
        raise RuntimeError(
            "activation checkpointing recomputes a layer in backward, inside a `with chain.forward_pass():` that is "
            "still open: use torch.utils.checkpoint with use_reentrant=False and context_fn=checkpoint_context(model), "
            "or run backward after the block"
        )


def recomputing() -> bool:
    """Whether this thread is in the middle of a backward pass, where activation checkpointing runs a forward again."""
    return _running_backward() != -1


def _running_backward() -> int:
    """The number of the backward pass that this thread is in the middle of; -1 outside, and in a compiled graph."""
    return -1 if is_dynamo_compiling() else torch._C._current_graph_task_id()


def _thread() -> int:
    """The running thread; 0 inside a compiled graph, where threads do not exist."""
    return 0 if is_dynamo_compiling() else threading.get_ident()


class Linked(Protocol):
    """A chain, or a group that reads one input: whoever has forward passes to open, unless it is not active."""

    passes: Passes
    active: bool


def scope_pass(module: nn.Module, chains: Sequence[Linked]) -> list[RemovableHandle]:
    """Make ``module``'s forward one pass through ``chains``. The hooks hold the chains, so a deep copy has its own."""
    return [
        module.register_forward_pre_hook(_OpenPass(chains), prepend=True),
        module.register_forward_hook(_ClosePass(chains), always_call=True),
    ]


class _OpenPass:
    def __init__(self, chains: Sequence[Linked]) -> None:
        self.chains = list(chains)

    def __call__(self, module: nn.Module, args: Any) -> None:
        for chain in self.chains:
            if chain.active:
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

"""What flows between the layers of a chain during one forward pass. It lives here, never on a module.

A pass is opened when a module that holds the whole chain starts its forward and closed when it ends, however it ends.
Two forwards before one backward therefore never share a tensor, and nothing outlives its forward. The state is a plain
object, opaque to pytree (FSDP2 maps over dicts and dataclasses and copies them), and holds [M, r] tensors only.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class ForwardState:
    """The tensors that the layers of one chain have handed on in one forward pass, by position."""

    __slots__ = ("_backward", "_handed", "_latest", "owner")

    def __init__(self, owner: object) -> None:
        self.owner = owner
        self._backward = _running_backward()
        self._handed: dict[int, Tensor] = {}
        self._latest = -1

    def copy(self) -> ForwardState:
        """The same state, to go on from without changing this one."""
        other = ForwardState(self.owner)
        other._handed, other._latest = dict(self._handed), self._latest
        return other

    @property
    def is_stale(self) -> bool:
        """Whether a backward has started since: a layer that runs now is recomputed, and this is not its state."""
        return self._backward != _running_backward()

    def enter(self, position: int) -> None:
        """A layer starts. One that is not later in the chain than the last one begins the chain anew."""
        if position <= self._latest:
            self._handed.clear()
        self._latest = position

    def hand_on(self, position: int, h: Tensor) -> None:
        self._handed[position] = h

    def handed_by(self, position: int, leading: torch.Size) -> Tensor | None:
        """What the layer at ``position`` handed on; None if it did not run or saw tokens of another shape."""
        h = self._handed.get(position)
        return h if h is not None and h.shape[:-1] == leading else None


class Passes:
    """The open forward pass of one chain, per thread."""

    __slots__ = ("_open",)

    def __init__(self) -> None:
        self._open: dict[int, ForwardState] = {}

    def current(self) -> ForwardState | None:
        return self._open.get(_thread())

    def open(self, owner: object) -> None:
        """Open a pass, unless a module around ``owner`` has one open. A pass that ``owner`` left behind is dropped."""
        state = self.current()
        if state is None or state.owner is owner:
            self._open[_thread()] = ForwardState(owner)

    @contextmanager
    def resumed(self, state: ForwardState) -> Iterator[None]:
        """Go on from a copy of ``state``, then return to what was open."""
        thread, before = _thread(), self.current()
        self._open[thread] = state.copy()
        try:
            yield
        finally:
            if before is None:
                del self._open[thread]
            else:
                self._open[thread] = before

    def close(self, owner: object) -> None:
        """Close the pass if ``owner`` opened it."""
        state = self.current()
        if state is not None and state.owner is owner:
            del self._open[_thread()]

    def __deepcopy__(self, memo: dict[int, object]) -> Passes:
        return Passes()

    def __reduce__(self) -> tuple[type[Passes], tuple[()]]:
        return Passes, ()


def _running_backward() -> int:
    """The number of the backward pass that this thread is in the middle of; -1 outside, and in a compiled graph."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def _thread() -> int:
    """The running thread; one fixed key inside a compiled graph, where threads do not exist."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()

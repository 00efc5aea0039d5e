"""Kinds of calls: which of them a backend of kernels can serve, and what it keeps of one that it has served.

Whatever does not depend on addresses is decided and compiled when a kind is first seen: form, tiles, launches, sizes.
It is kept as a ``Prepared`` pass, which allocates, fills in the addresses and launches. A kind is everything else that
a pass is told, alignment included: two calls of one kind differ in addresses and values only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import host
from ..tuning import forms, gpus, launch
from ..tuning.tiles import MAX_RANK

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ALIGNMENT = 16  # bytes: what kernels are compiled for at a time, and the copy engine's unit
APART = 256  # bytes: workspaces begin at multiples of it
MOST_KINDS = 4_096  # that are remembered
Operands = tuple[Tensor | None, ...]
_backends: list[dict[Any, Any]] = []
_thread = threading.local()  # ``bound``: the devices whose context it has
_NO_GUARD = nullcontext()


def unsupported_reason(x: Tensor, rank: int, device: str) -> str | None:
    """Why kernels on ``device`` cannot take x and ``rank`` rows of A, None where they can."""
    if x.device.type != device:
        return f"x must be on a {device} device, got {x.device}"
    if x.dtype not in DTYPES:
        return f"x must be float32, float16 or bfloat16, got {x.dtype}"
    if rank > MAX_RANK:
        return f"a_stack's total rank must be at most {MAX_RANK}, got {rank}"
    return None


class Prepared(NamedTuple):
    """A pass with its addresses left open: those of the operands, of what it returns, of its workspaces, in order."""

    forms: tuple[tuple[tuple[int, ...], torch.dtype] | None, ...]  # of what it returns; then one for all workspaces
    coded: tuple[tuple[tuple[int, ...], int] | None, ...] | None  # the same for ``host``, where it knows the dtypes
    offsets: tuple[int, ...]  # of each workspace in all of them
    launch: Callable[[list[int]], None]

    def run(self, like: Tensor, addresses: list[int]) -> Sequence[Tensor | None]:
        """Allocate as beside ``like``, the first operand, and launch; ``addresses`` are those of the operands."""
        made = None
        if host.module is not None and self.coded is not None:
            made = host.module.allocate(like, self.coded, self.offsets, addresses)
        if made is None:
            made = self._allocate(like, addresses)
        self.launch(addresses)
        return made[:-1] if self.offsets else made  # workspaces are held until everything is launched

    def _allocate(self, like: Tensor, addresses: list[int]) -> list[Tensor | None]:
        made = [None if form is None else like.new_empty(form[0], dtype=form[1]) for form in self.forms]
        addresses += [0 if each is None else each.data_ptr() for each in made]
        if self.offsets:
            base = addresses.pop()
            addresses += [base + offset for offset in self.offsets]
        return made


class Kinds:
    """The passes that one backend has prepared; None for a kind whose launches cannot be had without deciding anew."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], Prepared | None] = {}
        _backends.append(self._known)

    def find(self, kind: tuple[object, ...]) -> Prepared | None:
        """The prepared pass; None for a new kind, and where someone says what to choose or wants to see launches."""
        prepared = self._known.get(kind)
        return None if prepared is None or _is_watched() else prepared

    def keep(self, kind: tuple[object, ...], prepared: Prepared | None) -> None:
        """Remember a kind that is new."""
        if len(self._known) >= MOST_KINDS:
            self._known.clear()
        self._known[kind] = prepared

    def is_new(self, kind: tuple[object, ...]) -> bool:
        """Whether it is to be prepared: nothing is known of it, and what is chosen for it is no one's wish."""
        return kind not in self._known and not _is_watched()


def forget() -> None:
    """Drop what every backend has prepared: what its decisions rest on has changed."""
    for known in _backends:
        known.clear()


def _is_watched() -> bool:
    return launch.is_recording() or forms.is_assumed() or gpus.is_assumed()


def kind_of(operands: Operands, *settings: object) -> tuple[tuple[object, ...], list[int]]:
    """The kind of a pass on these operands, and their addresses, 0 for one that is not there."""
    described = None if host.module is None else host.module.kind_of(*operands)
    if described is not None:
        return (settings, described[0]), described[1]
    kind: list[object] = [settings, operands[0].device]  # type: ignore[union-attr]
    addresses, odd = [], 0
    for operand in operands:
        if operand is None:
            kind.append(None)
            addresses.append(0)
        else:
            address = operand.data_ptr()
            kind += (operand.shape, operand.stride(), operand.dtype)
            addresses.append(address)
            odd |= address
    if odd % ALIGNMENT:
        kind.append(tuple([address % ALIGNMENT for address in addresses]))
    return tuple(kind), addresses


def prepare(
    operands: Operands,
    results: Operands,
    workspaces: Sequence[Tensor],
    launching: Callable[[dict[int, int]], Callable[[list[int]], None] | None],
) -> Prepared | None:
    """A pass that has been run once, to be run again on other addresses; None where its own do not tell what is what.

    Args:
        launching: given where in the list of addresses each address of this run belongs, what launches the same for
            another list, or None.
    """
    place: dict[int, int] = {}
    for index, tensor in enumerate((*operands, *results, *workspaces)):
        if tensor is None or not tensor.numel():
            continue
        if tensor.data_ptr() in place:  # one tensor for two operands
            return None
        place[tensor.data_ptr()] = index
    launched = launching(place)
    if launched is None:
        return None
    offsets, total = [], 0
    for workspace in workspaces:
        offsets.append(total)
        total += -(-workspace.numel() * workspace.element_size() // APART) * APART
    forms = [None if result is None else (tuple(result.shape), result.dtype) for result in results]
    if offsets:
        forms.append(((total,), torch.uint8))
    known = all(form is None or form[1] in host.CODES for form in forms)
    coded = tuple([None if form is None else (form[0], host.CODES[form[1]]) for form in forms]) if known else None
    return Prepared(tuple(forms), coded, tuple(offsets), launched)


def on_device(tensor: Tensor) -> Any:
    """Kernels run on the tensor's GPU, whichever is current, in a thread that has a context."""
    if not tensor.is_cuda:
        return _NO_GUARD
    if tensor.device not in getattr(_thread, "bound", ()):
        _bind(tensor.device)
    return _NO_GUARD if torch.cuda.current_device() == tensor.device.index else torch.cuda.device(tensor.device)


def _bind(device: torch.device) -> None:
    """Give this thread the device's context, which the driver needs to encode tensor maps.

    A thread that autograd has started has none before its first call of the CUDA runtime; an event is such a call.
    """
    with torch.cuda.device(device):
        torch.cuda.current_stream(device).record_event()
    _thread.bound = {*getattr(_thread, "bound", ()), device}

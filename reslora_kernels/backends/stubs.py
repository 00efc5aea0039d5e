"""Backends for GPUs on a machine without one: launches are counted instead of made, on tensors of the CPU.

What is left is what a call costs the host in Python: neither Triton's launcher nor the C++ of the extension is in it.
Nothing is compiled either. Results hold whatever their memory held.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal
from unittest import mock

from ..tuning import gpus
from . import cuda, native, select, triton

if TYPE_CHECKING:
    from ..kernels.direct import StubDriver

CAPABILITY = 90


@contextmanager
def stubbed_triton() -> Iterator[StubDriver]:
    """Inside, the Triton backend serves CPU tensors as those of an H100, and no kernel runs."""
    from ..kernels.direct import stub_driver

    gpu = gpus.GENERATIONS[f"sm_{CAPABILITY}"]
    with (
        _served(triton),
        mock.patch.dict(gpus.GENERATIONS, interpreter=gpu),
        stub_driver(CAPABILITY) as stub,
        _forgotten(),
    ):
        yield stub


class StubExtension:
    """Has what the compiled extension has, for CPU tensors; counts launches."""

    EMULATED, HAS_SM90 = True, False

    def __init__(self) -> None:
        self.launches = 0
        self.Pass = lambda: StubPass(self)
        for struct in ("Matrix", "Output", "Sum", "SideChannel", "OuterProduct", "Device"):
            setattr(self, struct, lambda *given, **named: (given, named))
        for kernel in ("project", "augmented_matmul", "low_rank_grads", "finish"):
            setattr(self, kernel, self._launch)

    def _launch(self, *_: Any, **__: Any) -> None:
        self.launches += 1


class StubPass:
    """Counts what it notes, and as much whenever it is run."""

    def __init__(self, extension: StubExtension) -> None:
        self.extension, self.before, self.noted = extension, extension.launches, 0

    def begin(self) -> None:
        """From here on launches are noted."""
        self.before = self.extension.launches

    def end(self) -> None:
        """To here."""
        self.noted = self.extension.launches - self.before

    def settle(self, addresses: list[int]) -> bool:
        """Every address has a place."""
        return True

    def run(self, stream: int, processors: int, addresses: list[int]) -> None:
        """The one call of a prepared pass."""
        self.extension.launches += self.noted


@contextmanager
def stubbed_cuda() -> Iterator[StubExtension]:
    """Inside, the CUDA backend serves CPU tensors by an extension that launches nothing."""
    stub = StubExtension()
    with _served(cuda), mock.patch.object(native, "load", lambda: stub), _forgotten():
        yield stub


@contextmanager
def stubbed() -> Iterator[tuple[Literal["triton", "cuda"], ...]]:
    """The backends that can be stood in for here, all of them at a time."""
    with ExitStack() as stack:
        stack.enter_context(stubbed_cuda())
        if importlib.util.find_spec("triton") is None:
            yield ("cuda",)
        else:
            stack.enter_context(stubbed_triton())
            yield ("triton", "cuda")


def _served(backend: ModuleType) -> Any:
    """The backend takes every call."""
    every: dict[str, Any] = {"unavailable_reason": lambda: None, "unsupported_reason": lambda *_: None}
    return mock.patch.multiple(backend, **every)


@contextmanager
def _forgotten() -> Iterator[None]:
    """What is known of kinds of calls is of no use inside, nor outside what was found there."""
    select.forget()
    try:
        yield
    finally:
        select.forget()

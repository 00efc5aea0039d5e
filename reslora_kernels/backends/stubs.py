"""Backends for GPUs on a machine without one: launches are counted instead of made, on tensors of the CPU.

What is left is what a call costs the host in Python: neither Triton's launcher nor the C++ of the extension is in it.
Nothing is compiled either. Results hold whatever their memory held.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any, Literal
from unittest import mock

from ..tuning import gpus
from . import cuda, native, select, triton

TARGET = "sm_90"
DEVICE = 1000  # Triton keeps compiled kernels by device


class StubDriver:
    """Answers what Triton asks a driver; keeps what is launched: a kernel's name, and what its launcher was given."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.launched: list[tuple[str, tuple[Any, ...]]] = []
        self.maps: list[tuple[Any, ...]] = []  # what tensor maps were made of
        self.compiled: list[str] = []  # names of kernels, one for each compile key
        self.target = GPUTarget("cuda", int(TARGET[3:]), 32)
        self.utils = SimpleNamespace(fill_tma_descriptor=self._encode, fill_tma_descriptor_tiled=self._encode)

    def _encode(self, *described: Any) -> tuple[Any, ...]:
        self.maps.append(described)
        return described

    def _launch(self, name: str, *given: Any) -> None:
        self.launched.append((name, given))

    def get_current_target(self) -> Any:
        """What to compile for."""
        return self.target

    def get_current_device(self) -> int:
        """One of its own."""
        return DEVICE

    def get_current_stream(self, device: int | None = None) -> int:
        """None is used."""
        return 0

    def compile(self, source: Any, target: Any = None, options: Any = None, **_: Any) -> Any:
        """In place of Triton's: a kernel that the launcher of this version can be asked to launch."""
        from triton.backends.nvidia import driver as nvidia

        name = source.fn.__name__
        self.compiled.append(name)
        described = [kind for kind in source.signature.values() if str(kind).startswith("tensordesc")]
        metadata = {"swizzle": 0, "elem_size": 2, "elem_type": 0, "block_size": (), "fp4_padded": False}
        maps = [metadata] * len(described)

        launch = partial(self._launch, name)  # no Python function, as the real one is none
        launcher: Any = nvidia.CudaLauncher.__new__(nvidia.CudaLauncher)
        vars(launcher).update(
            launch=_with_maps(nvidia.wrap_handle_tensordesc, launch, source.signature, maps) if maps else launch,
            num_ctas=1, global_scratch_size=0, global_scratch_align=1, profile_scratch_size=0, profile_scratch_align=1,
            launch_cooperative_grid=False, launch_pdl=False, arg_annotations=(), kernel_signature=b"",
        )  # fmt: skip
        return SimpleNamespace(
            run=launcher, function=1, packed_metadata=(), metadata=SimpleNamespace(tensordesc_meta=maps),
            launch_metadata=lambda *_: None,
        )  # fmt: skip


def _with_maps(wrap: Any, launch: Any, signature: Any, maps: list[Any]) -> Any:
    """Triton 3.4 tells descriptors by their type, later versions by the signature."""
    takes_signature = wrap.__code__.co_argcount == 3
    return wrap(launch, signature, maps) if takes_signature else wrap(launch, maps)


@contextmanager
def stubbed_triton() -> Iterator[StubDriver]:
    """Inside, the Triton backend serves CPU tensors as those of an H100, and no kernel runs."""
    from triton import compiler
    from triton.runtime import driver

    stub = StubDriver()
    driver.set_active(stub)
    try:
        with (
            _served(triton),
            mock.patch.dict(gpus.GENERATIONS, interpreter=gpus.GENERATIONS[TARGET]),
            mock.patch.object(compiler, "compile", stub.compile),
            _forgotten(),
        ):
            yield stub
    finally:
        for kernel in _jitted():
            kernel.device_caches.pop(DEVICE, None)
            kernel.compile = compiler.compile
        with suppress(RuntimeError):  # there is no other driver on a machine without a GPU
            driver.reset_active()


def _jitted() -> Iterator[Any]:
    from ..kernels import augmented_matmul, low_rank_grads, outer_products, project

    for module in (augmented_matmul, low_rank_grads, outer_products, project):
        yield from (value for value in vars(module).values() if hasattr(value, "device_caches"))


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

"""Compiled kernels launched as Triton's launcher launches them, without ``JITFunction``, which would decide anew.

``JITFunction`` specialises every argument of every call to find the kernel that was compiled for it, and encodes every
tensor map. For a call whose kind is known all this is known but addresses: the driver's launcher is called with them.
Which arguments it takes differs between versions; one that is not known here is left to ``JITFunction``.

A driver that stands in for one of a GPU tells what is launched either way, on a machine that has none.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from operator import itemgetter
from types import SimpleNamespace
from typing import Any
from unittest import mock

import triton
from torch import Tensor
from triton import compiler
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from ..tuning.launch import Launch

KNOWN = ("3.4", "3.5", "3.6", "3.7", "3.8", "3.9")  # versions whose launcher was read
_RUNTIME = triton.knobs.runtime
STUB_DEVICE = 1000  # Triton keeps compiled kernels by device
MOST_MAPS = 4096  # of one operand; an address that comes again finds its own
LaunchAll = Callable[[list[int]], None]
_Run = Callable[[int, Sequence[Any]], None]


def unknown_reason() -> str | None:
    """Why launches go through ``JITFunction``; None where they need not."""
    if _RUNTIME.interpret:
        return "kernels run in the interpreter"
    if version() not in KNOWN:
        return f"the launcher of Triton {version()} is not one of those known, {', '.join(KNOWN)}"
    name = type(driver.active).__name__
    return None if name in ("CudaDriver", "StubDriver") else f"it has no launcher for the {name}"


@cache
def version() -> str:
    """Triton's, without the patch level."""
    return ".".join(triton.__version__.split(".")[:2])


def hooked() -> bool:
    """Whether a profiler wants to hear of launches: only ``JITFunction`` tells it."""
    enter, leave = _RUNTIME.launch_enter_hook, _RUNTIME.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def launches(ran: Sequence[tuple[Launch, Any]], place: dict[int, int], count: int, device: int) -> LaunchAll | None:
    """What launches the same kernels on other addresses; None where an address has no place or a launcher is not known.

    Args:
        ran: launches, each with the kernel that was compiled for it.
        place: where in the list of ``count`` addresses each of theirs belongs.
        device: whose current stream they go to.
    """
    if unknown_reason() or None in [compiled for _, compiled in ran]:
        return None
    table = _Table(place)
    kernels = [(_run_of(compiled, launch.grid), table.arguments(launch, compiled)) for launch, compiled in ran]
    if table.incomplete or any(run is None for run, _ in kernels):
        return None
    constants, maps = tuple(table.constants), tuple(table.maps)
    begin = {"address": 0, "constant": count, "map": count + len(constants)}
    runs = [(run, itemgetter(*[begin[part] + at for part, at in wanted])) for run, wanted in kernels]
    stream_of = driver.active.get_current_stream

    def launch_all(addresses: list[int]) -> None:
        stream = stream_of(device)
        values: list[Any] = [*addresses, *constants]
        for at, encoded in maps:
            values.append(encoded.of(addresses[at]))
        for run, arguments_in in runs:
            run(stream, arguments_in(values))  # type: ignore[misc]

    return launch_all


class _Table:
    """What the launches of a pass are given, in one list: addresses, constants, tensor maps."""

    def __init__(self, place: dict[int, int]) -> None:
        self.place = place
        self.constants: list[Any] = []
        self.maps: list[tuple[int, _Encoded]] = []
        self.incomplete = False  # an address has no place, or a matrix no map

    def arguments(self, launch: Launch, compiled: Any) -> list[tuple[str, int]]:
        """Where each argument of the driver's launcher is found: the part of the list, and the index there."""
        maps = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
        wanted: list[tuple[str, int]] = []
        for name in launch.kernel.arg_names:
            value = launch.arguments[name]
            if isinstance(value, Tensor):
                wanted.append(self._address(value))
            elif hasattr(value, "block_shape"):
                meta = next(maps, None)
                self.incomplete |= meta is None
                self.maps.append((self._address(value.base)[1], _Encoded(value, meta)))
                wanted.append(("map", len(self.maps) - 1))
                wanted += [self._constant(size) for size in (*value.shape, *value.strides)]
            else:
                wanted.append(self._constant(value))
        return wanted

    def _address(self, tensor: Tensor) -> tuple[str, int]:
        at = self.place.get(tensor.data_ptr())
        self.incomplete |= at is None
        return "address", at or 0

    def _constant(self, value: Any) -> tuple[str, int]:
        self.constants.append(value)
        return "constant", len(self.constants) - 1


class _Encoded:
    """The tensor maps of one operand, by address: a weight has one for ever, an activation those that come round."""

    def __init__(self, descriptor: Any, meta: Any) -> None:
        fields = {name: value for name, value in vars(descriptor).items() if name != "base"}
        self.form, self.meta, self.made = fields, meta, dict[int, Any]()

    def of(self, address: int) -> Any:
        found = self.made.get(address)
        if found is None:
            from triton.backends.nvidia.driver import make_tensordesc_arg

            base = SimpleNamespace(data_ptr=lambda: address)
            unread = () if version() < "3.8" else (None,)  # the launch's other arguments
            found = make_tensordesc_arg(SimpleNamespace(base=base, **self.form), self.meta, *unread)[0]
            if len(self.made) >= MOST_MAPS:
                self.made.clear()
            self.made[address] = found
        return found


def _run_of(compiled: Any, grid: tuple[int, ...]) -> _Run | None:
    """Launches one compiled kernel for (stream, arguments); None where it wants memory of its own."""
    launcher = compiled.run
    if any(getattr(launcher, name, 0) for name in ("global_scratch_size", "profile_scratch_size", "gsan_enabled")):
        return None
    raw = launcher.launch
    if inspect.isfunction(raw):  # what encodes tensor maps, around the function that launches
        raw = inspect.getclosurevars(raw).nonlocals.get("launcher", raw)
    x, y, z = (*grid, 1, 1)[:3]
    packed = compiled.packed_metadata
    cooperative, dependent = launcher.launch_cooperative_grid, launcher.launch_pdl
    if version() >= "3.7":
        annotations, signature = launcher.arg_annotations, launcher.kernel_signature

        def run(stream: int, arguments: Sequence[Any]) -> None:  # holds the kernel: 3.8 unloads one that nobody holds
            raw(
                x, y, z, stream, compiled.function, cooperative, dependent, packed, None, None, None, None, None,
                annotations, signature, arguments,
            )  # fmt: skip

        return run
    scratch = (None,) if version() == "3.4" else (None, None)
    fixed = (compiled.function, cooperative, dependent, *scratch, packed, None, None, None)

    def run_earlier(stream: int, arguments: Sequence[Any]) -> None:
        raw(x, y, z, stream, *fixed, *arguments)

    return run_earlier


class StubDriver:
    """Answers what Triton asks a driver; keeps what is launched: a kernel's name, and what its launcher was given."""

    def __init__(self, capability: int) -> None:
        self.launched: list[tuple[str, tuple[Any, ...]]] = []
        self.maps: list[tuple[Any, ...]] = []  # what tensor maps were made of
        self.compiled: list[str] = []  # names of kernels, one for each compile key
        self.kernels: list[Any] = []  # the JIT functions themselves
        self.target = GPUTarget("cuda", capability, 32)
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
        return STUB_DEVICE

    def get_current_stream(self, device: int | None = None) -> int:
        """None is used."""
        return 0

    def compile(self, source: Any, target: Any = None, options: Any = None, **_: Any) -> Any:
        """In place of Triton's: a kernel that the launcher of this version can be asked to launch."""
        from triton.backends.nvidia import driver as nvidia

        name = source.fn.__name__
        self.compiled.append(name)
        self.kernels.append(source.fn)
        described = [kind for kind in source.signature.values() if str(kind).startswith("tensordesc")]
        metadata = {"swizzle": 0, "elem_size": 2, "elem_type": 0, "block_size": (), "fp4_padded": False}
        maps = [metadata] * len(described)

        launch = partial(self._launch, name)  # no Python function, as the real one is none
        launcher: Any = nvidia.CudaLauncher.__new__(nvidia.CudaLauncher)
        vars(launcher).update(
            launch=_with_maps(nvidia.wrap_handle_tensordesc, launch, source.signature, maps) if maps else launch,
            num_ctas=1, global_scratch_size=0, global_scratch_align=1, profile_scratch_size=0, profile_scratch_align=1,
            launch_cooperative_grid=False, launch_pdl=False, gsan_enabled=False, arg_annotations=(),
            kernel_signature=b"",
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
def stub_driver(capability: int) -> Iterator[StubDriver]:
    """Inside, kernels are launched on an NVIDIA GPU that is not there, by calls that are kept and do nothing."""
    stub = StubDriver(capability)
    driver.set_active(stub)
    try:
        with mock.patch.object(compiler, "compile", stub.compile):
            yield stub
    finally:
        for kernel in stub.kernels:
            kernel.device_caches.pop(STUB_DEVICE, None)
            kernel.compile = compiler.compile
        with suppress(RuntimeError):  # there is no other driver on a machine without a GPU
            driver.reset_active()

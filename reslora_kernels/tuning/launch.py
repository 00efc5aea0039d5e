"""A kernel launch as a value: what runs, on what, in which configuration. To be run, counted or compiled offline."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_recordings: list[Recording] = []
_thread = threading.local()  # ``collected``: what a pass of this thread is made of, while that is being noted
ALWAYS = {"enable_fp_fusion": True}  # a product and its sum rounded once: left unsaid, Triton 3.10 chooses otherwise


@dataclass(frozen=True)
class Launch:
    """One kernel launch. ``arguments`` and ``options`` go to the kernel by name; ``options`` are Triton's own."""

    name: str
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]

    def tensors(self) -> list[Tensor]:
        """Every tensor that the kernel reads or writes, those behind descriptors included."""
        bases = (getattr(value, "base", value) for value in self.arguments.values())
        return [value for value in bases if isinstance(value, Tensor)]

    def bytes_moved(self) -> int:
        """Bytes of the tensors, each read or written once: what the launch asks of memory when caches hold the rest."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    def run(self) -> None:
        """Run on the device of the tensors, in its current stream; a failure names the kernel and its configuration."""
        for recording in _recordings:
            recording.launches.append(self)
        if any(not recording.execute for recording in _recordings):
            return
        try:
            compiled = self.kernel[self.grid](**self.arguments, **self.options, **ALWAYS)
        except Exception as error:
            raise RuntimeError(f"Triton kernel {self} failed: {error}") from error
        collected = getattr(_thread, "collected", None)
        if collected is not None:
            collected.launches.append((self, compiled))

    def __str__(self) -> str:
        constants = {name: value for name, value in self.arguments.items() if name.isupper()}
        settings = ", ".join(f"{name}={value}" for name, value in (constants | self.options).items())
        return f"{self.name}[grid {self.grid}; {settings}]"


@dataclass(frozen=True)
class Recording:
    """The launches of a ``recording`` block, in order."""

    execute: bool
    launches: list[Launch]


@contextmanager
def recording(*, execute: bool = True) -> Iterator[list[Launch]]:
    """Collect the launches of this block; with ``execute=False`` none of them runs, so that no GPU is needed."""
    entry = Recording(execute, [])
    _recordings.append(entry)
    try:
        yield entry.launches
    finally:
        _recordings.remove(entry)


def is_recording() -> bool:
    """Whether launches are wanted as values, so that none may go unseen."""
    return bool(_recordings)


@dataclass(frozen=True)
class Collected:
    """What a pass of one thread is made of: its launches, each with its compiled kernel, and its workspaces."""

    launches: list[tuple[Launch, Any]] = field(default_factory=list)
    workspaces: list[Tensor] = field(default_factory=list)  # kept, so that no two of them have one address


@contextmanager
def collected() -> Iterator[Collected]:
    """What this thread launches and allocates by ``workspace`` inside, to do the same again for other addresses."""
    _thread.collected = Collected()
    try:
        yield _thread.collected
    finally:
        del _thread.collected


def workspace(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised memory that is of no use after the pass, in ``like``'s dtype where none is given."""
    made = like.new_empty(shape, dtype=dtype or like.dtype)
    noted = getattr(_thread, "collected", None)
    if noted is not None:
        noted.workspaces.append(made)
    return made


@dataclass(frozen=True)
class Sum:
    """out = scale * (partial[0] + partial[1] + ...), what is left to add up after a pass in several parts."""

    partial: Tensor  # float32 [parts, *out.shape]
    out: Tensor
    scale: float


def fits_tma(matrix: Tensor) -> bool:
    """Whether a descriptor can express it: contiguous rows, base and row stride multiples of 16 bytes, int32 sizes."""
    return (
        matrix.dim() == 2
        and matrix.numel() > 0
        and matrix.stride(1) == 1
        and matrix.stride(0) >= matrix.shape[1]
        and matrix.stride(0) * matrix.element_size() % 16 == 0
        and matrix.data_ptr() % 16 == 0
        and max(matrix.shape) < 2**31
    )


def precision(dtype: torch.dtype) -> str:
    """``input_precision`` of products: float32 as torch is set, TF32 only where torch's own setting allows it."""
    return "tf32" if dtype == torch.float32 and _tf32_allowed() else "ieee"


def on_matrix_unit(dtype: torch.dtype, products: str) -> bool:
    """Whether one multiplies in this dtype and ``precision``: all but exact float32, whose operands take registers."""
    return dtype != torch.float32 or products != "ieee"


def _tf32_allowed() -> bool:
    """By the setting of PyTorch 2.9 and later where there is one, which follows the older one.

    The older one refuses to be read as soon as one of the new ones, those of a CPU among them, says something else.
    """
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    return bool(torch.get_float32_matmul_precision() != "highest" if setting is None else setting == "tf32")

"""What the CUDA backend would launch on sm_90, with the bytes of the operands of each launch; nothing is run.

A launch counts every matrix that it is given once, read or written. Adapters are in the type of x, as the floor has
them: float32 ones are converted by a launch of PyTorch's before, at 6 bytes an element.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from reslora_kernels.backends import cuda, hopper
from reslora_kernels.side_channel import Needs, SideChannel
from reslora_kernels.tuning.launch import Sum

from .shipped_launches import Call

Counted = tuple[str, int]  # of a launch, its name and bytes
OPERANDS = ("x", "w", "t", "b", "a", "side", "y", "first", "second", "da", "db")
PROCESSORS = 132


def record(call: Call, setting: str) -> tuple[list[Counted], list[Counted]]:
    """The launches of the forward and of the backward pass with all gradients, under a ``RESLORA_CUDA_HOPPER``."""
    x, weight, dy, a, b = (
        torch.empty(*size, dtype=call.dtype)
        for size in ((call.m, call.k), (call.n, call.k), (call.m, call.n), (call.rank, call.k), (call.n, call.rank))
    )
    side = SideChannel(1.0, 1.0)
    with hopper.requested(setting), _counting() as launched:
        y, _, u = cuda.forward(x, weight, None, (a,), (b,), None, side, None)
        forward = launched.copy()
        cuda.backward(dy, None, x, weight, (a,), (b,), u, side, None, Needs())
    assert y.shape == dy.shape
    return forward, launched[len(forward) :]


@contextmanager
def _counting() -> Iterator[list[Counted]]:
    """Inside, operands are their sizes, and the list takes each launch."""
    launched: list[Counted] = []

    def size_of(*tensors: torch.Tensor | None) -> int:
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def side(extra: Any, start: int, inner: Any, raw: Any, *scalars: float) -> int:
        return size_of(extra, inner, raw)

    def left(entry: Sum) -> int:
        return size_of(entry.partial, entry.out)

    patches: dict[str, Any] = {"_matrix": size_of, "_output": size_of, "_side": side, "_sum": left}
    patches |= {"_extension": lambda: extension, "_processors": lambda _: PROCESSORS}
    extension = _Extension(launched)
    with mock.patch.multiple(cuda, **patches):
        yield launched


class _Extension:
    """Takes the place of the compiled module."""

    HAS_SM90 = EMULATED = True

    def __init__(self, launched: list[Counted]) -> None:
        self.launched = launched

    def Device(self, stream: int, processors: int) -> None:
        """Where a launch runs: of no size."""

    def OuterProduct(self, t: int | None, stream: int | None, rank: int, columns: int, **_: Any) -> int:
        return (t or 0) + (stream or 0) + 4 * rank * columns  # one part at least is written

    def project(self, *_: Any, **operands: Any) -> None:
        self._launch("project", **operands)

    def augmented_matmul(self, *_: Any, **operands: Any) -> None:
        self._launch("augmented_matmul", **operands)

    def low_rank_grads(self, *_: Any, **operands: Any) -> None:
        self._launch("low_rank_grads", **operands)

    def finish(self, _: Any, first: int | None, second: int | None) -> None:
        self._launch("finish", first=first, second=second)

    def _launch(self, name: str, **operands: Any) -> None:
        self.launched.append((name, sum(operands.get(operand) or 0 for operand in OPERANDS)))

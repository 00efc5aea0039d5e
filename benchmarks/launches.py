"""Launches built and counted without a GPU: all that Triton's backend can choose, and those of CUDA's with their bytes.

Nothing is run. A CUDA launch counts every matrix that it is given once, read or written. Adapters are in the type of
x, as the floor has them: float32 ones are converted by a launch of PyTorch's before, at 6 bytes an element.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from reslora_kernels.backends import cuda, hopper, triton
from reslora_kernels.dropout import Dropout
from reslora_kernels.side_channel import Needs, SideChannel
from reslora_kernels.tuning import gpus, launch, tiles
from reslora_kernels.tuning.forms import assume
from reslora_kernels.tuning.launch import Launch, Sum, recording


@dataclass(frozen=True)
class Call:
    """One forward and backward pass: x [m, k], weight [n, k], ``hand`` of the ``rank`` columns of h handed on."""

    m: int
    k: int
    n: int
    rank: int = 16
    dtype: torch.dtype = torch.bfloat16
    p: float = 0.0
    hand: int = 0
    aligned: bool = True

    def __str__(self) -> str:
        dropout = f", p = {self.p}" if self.p else ""
        layout = "" if self.aligned else ", rows not aligned"
        return f"{self.m} x {self.k} to {self.n}, r = {self.rank}, {str(self.dtype)[6:]}{dropout}{layout}"


STANDARD = (Call(8192, 4096, 4096), Call(8192, 4096, 14336), Call(8192, 14336, 4096), Call(8192, 4096, 1024))


def record(call: Call, gpu: gpus.Gpu, forms: tuple[str, ...], tile: tiles.MatmulTile | None = None) -> list[Launch]:
    """The launches of one forward and one backward pass, all gradients wanted."""
    k, n, rank, own = call.k, call.n, call.rank, call.rank - call.hand
    wide = 0 if call.aligned else 1

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns + wide, dtype=call.dtype)[:, :columns]

    x, weight, a, b = matrix(call.m, k), matrix(n, k), torch.empty(rank, k), torch.empty(n, own)
    residual = matrix(call.m, own) if call.hand else None
    dropout = Dropout(torch.zeros((), dtype=torch.int64), call.p) if call.p else None
    side = SideChannel(1.0, 2.0, own, rank)
    with assume(gpu, forms, tile), launch.recording(execute=False) as launches:
        y, handed, u = triton.forward(x, weight, None, (a,), (b,), residual, side, dropout)
        needs = Needs(dresidual=call.hand > 0)
        triton.backward(matrix(*y.shape), handed, x, weight, (a,), (b,), u, side, dropout, needs)
    return launches


def shipped_launches(target: str, quick: bool = False) -> Iterator[tuple[str, Launch]]:
    """(what it is for, launch) for every tile, form, dtype and option that ``target``'s table can lead to."""
    gpu = gpus.GENERATIONS[target]
    seen = set()
    for call in _calls(quick):
        precision = launch.precision(call.dtype)
        for form in ("two_pass", "one_pass"):
            if form == "one_pass" and (call.p or call.rank > triton.ONE_PASS_RANK or call.dtype == torch.float32):
                continue
            candidates = tiles.matmul_tiles(
                gpu, call.m, call.rank, call.dtype, precision, form == "one_pass", call.aligned
            )
            for tile in candidates[:1] if quick else candidates:
                for entry in record(call, gpu, (form, "two_pass"), tile):
                    if str(entry) + str(call.dtype) not in seen:
                        seen.add(str(entry) + str(call.dtype))
                        yield f"{call}, {form}", entry


def _calls(quick: bool) -> Iterator[Call]:
    yield Call(8192, 4096, 4096, 32, hand=16)
    yield Call(16, 4096, 4096)
    if quick:
        return
    yield Call(8192, 4096, 4096, 64, p=0.1)
    yield Call(8192, 4096, 4096, 256)
    yield Call(16, 4096, 4096, 16, p=0.1)
    yield Call(8192, 4096, 4096, 16, torch.float16)
    yield Call(8192, 4096, 4096, 16, aligned=False)
    yield Call(2048, 1024, 1024, 16, torch.float32)


Counted = tuple[str, int]  # of a launch, its name and bytes
OPERANDS = ("x", "w", "t", "b", "a", "side", "y", "first", "second", "da", "db")
PROCESSORS = 132


def record_cuda(call: Call, setting: str) -> tuple[list[Counted], list[Counted]]:
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
    with mock.patch.multiple(cuda, **patches), recording(execute=False):  # watched: nothing is prepared
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

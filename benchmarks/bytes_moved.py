"""Bytes that the kernels ask of memory for one layer, against what any implementation must move.

python -m benchmarks.bytes_moved [--output benchmarks/results/triton-bytes-DATE.json]

Counted from the launches, each tensor of a launch once; nothing is run, no GPU is needed. The launches are built here:
all that Triton's backend can choose, and those of CUDA's with every matrix that they are given, read or written, and
adapters in the type of x (float32 ones are converted by a launch of PyTorch's before, at 6 bytes an element).

The floor counts every operand and result once (forward: x, W, A, B, y; backward: dy, W, x, dx, u, and A, B with their
gradients, in 16 bits). On top of it the two-pass form reads x twice in the forward pass and dy twice in the backward
pass, three times at high rank; with dropout a mask of one bit per element of x is written and read. What remains is the
overhead: workspaces, and adapters in 32 bits. The CUDA backend's one pass reads x once in the forward pass, and dy
twice in the backward pass: for dx and dh, and for dB. Its adapters are in 16 bits.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

from reslora_kernels.backends import cuda, hopper, native, triton
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


def record_experts(dtype: torch.dtype, rank: int = 16) -> list[Launch]:
    """The launches of one forward and one backward pass of experts, each token sent to one of them."""
    x, dy, weight = (torch.empty(*shape, dtype=dtype) for shape in ((4096, 2048), (4096, 1408), (8, 1408, 2048)))
    a, b = torch.empty(8, rank, 2048, dtype=dtype), torch.empty(8, 1408, rank, dtype=dtype)
    offsets, rows = (torch.arange(1, 9) * 512).to(torch.int32), torch.arange(4096)
    with launch.recording(execute=False) as launches:
        _, u = triton.grouped_forward(x, weight, a, b, offsets, rows, 2.0)
        triton.grouped_backward(dy, x, weight, a, b, u, offsets, rows, 2.0, (True, True, True))
    return launches


def shipped_launches(target: str, quick: bool = False) -> Iterator[tuple[str, Launch]]:
    """(what it is for, launch) for every tile, form, dtype and option that ``target``'s table can lead to."""
    gpu = gpus.GENERATIONS[target]
    cases = [(16, torch.bfloat16)] if quick else [*((r, torch.bfloat16) for r in (8, 16, 64)), (16, torch.float32)]
    for rank, dtype in cases:
        for entry in record_experts(dtype, rank):
            yield f"8 experts, 4096 rows of 2048 to 1408, r = {rank}, {str(dtype)[6:]}", entry
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
OPERANDS = ("x", "w", "t", "b", "a", "side", "y", "first", "second", "da", "db", "of_inputs", "of_made")
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

    patches: dict[str, Any] = {"matrix": size_of, "output": size_of, "side_channel": side, "sum_of": left}
    patches |= {"load": lambda: extension, "processors": lambda _: PROCESSORS}
    extension = _Extension(launched)
    with mock.patch.multiple(native, **patches), recording(execute=False):  # watched: nothing is prepared
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

    def Strips(self, stream: int, t: int | None, out: int, **_: Any) -> int:
        return stream + (t or 0) + out

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


@dataclass(frozen=True)
class Traffic:
    """Bytes of one direction of one call. ``again`` is the operand read twice and the mask."""

    call: str
    direction: str
    launches: int
    moved: int
    floor: int
    again: int

    @property
    def overhead(self) -> float:
        """What is moved beyond the floor and the operand read twice, as a share of these."""
        return self.moved / (self.floor + self.again) - 1


def split(launches: list[Launch]) -> tuple[list[Launch], list[Launch]]:
    """Those of the forward and those of the backward pass."""
    forward = next(n for n, entry in enumerate(launches) if entry.name == "augmented_matmul") + 1
    return launches[:forward], launches[forward:]


def floors(call: Call) -> tuple[int, int]:
    """Bytes of the forward and of the backward pass with all gradients."""
    m, k, n, r = call.m, call.k, call.n, call.rank
    return 2 * (m * k + n * k + m * n + r * k + r * n), 2 * (m * n + n * k + 2 * m * k + m * r + 2 * r * (k + n))


def cuda_traffic(call: Call, setting: str = "one-pass") -> tuple[Traffic, Traffic]:
    """Forward and backward pass of the CUDA backend under a ``RESLORA_CUDA_HOPPER``, all in one pass."""
    forward, backward = record_cuda(call, setting)
    again = (0, 2 * call.m * call.n)
    rows = [
        Traffic(f"{call}, CUDA, {setting}", direction, len(made), sum(size for _, size in made), floor, read_again)
        for direction, made, floor, read_again in zip(
            ("forward", "backward"), (forward, backward), floors(call), again, strict=True
        )
    ]
    return rows[0], rows[1]


def traffic(call: Call, gpu: gpus.Gpu) -> tuple[Traffic, Traffic]:
    """Forward and backward pass of the Triton backend's two-pass form with all gradients."""
    m, k, n = call.m, call.k, call.n
    forward, backward = split(record(call, gpu, ("two_pass",)))
    mask = 2 * m * k // 8 if call.p else 0
    reads_of_dy = sum(entry.name in ("project", "pass_over_dy", "outer_products") for entry in backward)
    forward_floor, backward_floor = floors(call)
    return (
        Traffic(str(call), "forward", len(forward), _moved(forward), forward_floor, 2 * m * k),
        Traffic(str(call), "backward", len(backward), _moved(backward), backward_floor, reads_of_dy * 2 * m * n + mask),
    )


def _moved(launches: list[Launch]) -> int:
    return sum(entry.bytes_moved() for entry in launches)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="write the rows to this JSON file")
    output = parser.parse_args().output
    gpu = gpus.GENERATIONS["sm_90"]
    calls = [
        replace(call, rank=rank, p=p) for call in STANDARD for rank, p in ((16, 0.0), (16, 0.1), (32, 0.0), (64, 0.0))
    ]
    rows = [row for call in calls for row in traffic(call, gpu)]
    rows += [row for call in calls if not call.p for row in cuda_traffic(call)]
    table = Table("call", "direction", "launches", "moved, MB", "floor, MB", "read again, MB", "overhead")
    for row in rows:
        megabytes = (f"{size / 1e6:.1f}" for size in (row.moved, row.floor, row.again))
        table.add_row(row.call, row.direction, str(row.launches), *megabytes, f"{100 * row.overhead:.1f} %")
    Console(width=120).print(table)
    if output:
        content = {
            "date": str(date.today()),
            "generation": gpu.generation,
            "counted": "from launch parameters, on no GPU",
            "rows": [asdict(row) | {"overhead": row.overhead} for row in rows],
        }
        output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

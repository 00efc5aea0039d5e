"""Every kernel launch that the Triton backend can choose on a GPU generation, built without that GPU and not run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from reslora_kernels.backends import triton
from reslora_kernels.dropout import Dropout
from reslora_kernels.side_channel import Needs, SideChannel
from reslora_kernels.tuning import gpus, launch, tiles
from reslora_kernels.tuning.forms import assume
from reslora_kernels.tuning.launch import Launch


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

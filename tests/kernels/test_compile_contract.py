"""The compile contract reads machine code right: sample kernels that hold it, and planted faults that it names.

Triton compiles only where TRITON_INTERPRET is unset, so this file is also the script that a process of its own runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

ROOT = Path(__file__).parents[2]


@triton.jit
def matmul(x, w, y, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    """y [M, N] = x [M, K] @ w [N, K].T through pointers."""
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(x + m[:, None].to(tl.int64) * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        b = tl.load(w + n[:, None].to(tl.int64) * K + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
        total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION)
    at = y + m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(at, total.to(y.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def persistent_matmul(x, w, y, M, N, K, PROGRAMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """The same through descriptors made on the host; each program takes tiles in turn."""
    columns = tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BM) * columns, PROGRAMS):
        row, column = (tile // columns) * BM, (tile % columns) * BN
        total = tl.zeros((BM, BN), tl.float32)
        for k in range(0, tl.cdiv(K, BK)):
            total = tl.dot(x.load([row, k * BK]), w.load([column, k * BK]).T, total)
        y.store([row, column], total.to(y.dtype))


@triton.jit
def column_sums(x, sums, N, BM: tl.constexpr, BN: tl.constexpr):
    """Adds a block of rows to sums [N] with atomics."""
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BN)
    tl.atomic_add(sums + n, tl.sum(tl.load(x + m[:, None] * N + n[None, :]).to(tl.float32), axis=0))


def launches() -> dict[str, Any]:
    """The samples by name."""
    from reslora_kernels.kernels.launch import Launch, descriptor

    def pointers(
        dtype: torch.dtype = torch.bfloat16, tile: tuple[int, int, int] = (128, 128, 64), **how: Any
    ) -> Launch:
        x, w, y = (
            torch.empty(shape, dtype=dtype, device="meta") for shape in ((8192, 4096), (4096, 4096), (8192, 4096))
        )
        precision = how.pop("precision", "ieee")
        arguments = {"x": x, "w": w, "y": y, "M": 8192, "N": 4096, "K": 4096, "PRECISION": precision}
        arguments |= dict(zip(("BM", "BN", "BK"), tile, strict=True))
        return Launch("matmul", matmul, (64, 32), arguments, {"num_warps": 8, "num_stages": 2} | how)

    def descriptors(bm: int, bn: int, stages: int) -> Launch:
        x, w, y = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((8192, 4096), (4096, 4096), (8192, 4096)))
        arguments = {"x": descriptor(x, bm, 64), "w": descriptor(w, bn, 64), "y": descriptor(y, bm, bn)}
        arguments |= {"M": 8192, "N": 4096, "K": 4096, "PROGRAMS": 132, "BM": bm, "BN": bn, "BK": 64}
        return Launch("persistent", persistent_matmul, (132,), arguments, {"num_warps": 8, "num_stages": stages})

    rows = torch.empty(4096, 64, dtype=torch.bfloat16)
    atomics = {"x": rows, "sums": torch.empty(64), "N": 64, "BM": 64, "BN": 64}
    return {
        "pointers": pointers(),
        "tall and thin": pointers(tile=(16, 128, 64), num_warps=4),
        "exact float32": pointers(torch.float32, (64, 64, 32)),
        "TF32": pointers(torch.float32, (64, 64, 32), precision="tf32"),
        "descriptors": descriptors(128, 128, 3),
        "wide descriptors": descriptors(128, 256, 3),
        "spills": pointers(torch.float32, (128, 256, 32), num_warps=4),
        "atomics": Launch("column_sums", column_sums, (64,), atomics, {"num_warps": 4, "num_stages": 1}),
        "too much shared memory": descriptors(128, 256, 4),
    }


def compiled(*wanted: tuple[str, str]) -> dict[str, Any]:
    """(sample, target) pairs as rows of the contract, compiled in a process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, __file__, json.dumps(wanted)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def compile_and_print(wanted: list[list[str]]) -> None:
    from benchmarks.compile_contract import contract

    samples = launches()
    rows = {f"{name} {target}": asdict(next(contract([(name, samples[name])], target))) for name, target in wanted}
    print(json.dumps(rows))


if __name__ == "__main__":
    compile_and_print(json.loads(sys.argv[1]))

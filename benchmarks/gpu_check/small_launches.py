"""Every kernel once, on small odd shapes, for compute-sanitizer: each form, dtype and option, forward and backward.

python -m benchmarks.gpu_check.small_launches cuda       or triton; status 4 where that backend is not available
"""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from reslora_kernels.backends import select
from reslora_kernels.dropout import Dropout
from reslora_kernels.side_channel import Needs, SideChannel
from reslora_kernels.tuning import forms, gpus

ABSENT = 4  # exit status: there is no such backend here
Case = tuple[int, torch.dtype, float, bool, bool, int]


def cases() -> Iterator[Case]:
    """(M, dtype, p, handed on and residual, rows at odd addresses, K): small and large tiles, with nothing a multiple.

    The last has K in parts.
    """
    for m, dtype in itertools.product((17, 200), (torch.bfloat16, torch.float32)):
        for p, chained in ((0.0, False), (0.1, True)):
            yield m, dtype, p, chained, False, 136
    yield 200, torch.bfloat16, 0.0, True, True, 136
    yield 17, torch.bfloat16, 0.1, True, False, 1160


def matrix(rows: int, columns: int, dtype: torch.dtype, odd: bool, device: str) -> Tensor:
    """Random values whose row sums stay near 1."""
    wide = torch.randn(rows, columns + odd, device=device).mul_(columns**-0.5).to(dtype)
    return wide[:, :columns]


def run(backend: Any, case: Case, device: str) -> None:
    """One forward and one backward pass; NaN or Inf in a result is a failure here already."""
    m, dtype, p, chained, odd, k = case
    n, rank, own = 104, 32 if chained else 16, 16
    x, weight, dy = (matrix(*size, dtype, odd, device) for size in ((m, k), (n, k), (m, n)))
    a, b = matrix(rank, k, torch.float32, False, device), matrix(n, own, torch.float32, False, device)
    residual = matrix(m, own, dtype, False, device) if chained else None
    dropout = Dropout(torch.tensor(7, device=device), p) if p else None
    side = SideChannel(1.0, 2.0, own, rank) if chained else SideChannel(1.0, 2.0)
    y, handed, u = backend.forward(x, weight, None, (a,), (b,), residual, side, dropout)
    dhanded = torch.randn_like(handed) if chained else None
    gradients = backend.backward(dy, dhanded, x, weight, (a,), (b,), u, side, dropout, Needs(dresidual=chained))
    names = ("y", "handed", "u", "dx", "dA", "dB", "dresidual")
    for name, tensor in zip(names, (y, handed, u, *gradients), strict=True):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise AssertionError(f"{backend.__name__}: {name} is not finite in {case}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a backend with kernels of its own."""
    (name,) = sys.argv[1:] if arguments is None else arguments
    if reason := select.unavailable_reason(name):
        print(f"{name}: {reason}")
        return ABSENT
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = importlib.import_module(f"reslora_kernels.backends.{name}")
    for case in cases():
        for form in ("one_pass", "two_pass") if name == "triton" else ("",):
            gpu = gpus.gpu_of(torch.device(device))
            with forms.assume(gpu, (form,)) if form else nullcontext():
                run(backend, case, device)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"ran {name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Bytes that the kernels ask of memory for one layer, against what any implementation must move.

python -m benchmarks.bytes_moved [--output benchmarks/results/triton-bytes-DATE.json]

Counted from the launches, each tensor of a launch once; no GPU is needed. The floor counts every operand and result
once (forward: x, W, A, B, y; backward: dy, W, x, dx, u, and A, B with their gradients, in 16 bits). On top of it the
two-pass form reads x twice in the forward pass and dy twice in the backward pass, three times at high rank; with
dropout a mask of one bit per element of x is written and read. What remains is the overhead: workspaces, and adapters
in 32 bits. The CUDA backend's one pass reads x once in the forward pass, and dy twice in the backward pass: for dx and
dh, and for dB. Its adapters are in 16 bits.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.launches import STANDARD, Call, record, record_cuda
from reslora_kernels.tuning import gpus
from reslora_kernels.tuning.launch import Launch


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


def cuda_traffic(call: Call, setting: str = "one-pass-pair") -> tuple[Traffic, Traffic]:
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

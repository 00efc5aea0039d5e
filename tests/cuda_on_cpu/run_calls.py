"""python -m tests.cuda_on_cpu.run_calls MODULE SEEDS [VARIANT]: small exact calls through an emulated extension.

With a variant of the Hopper kernel, calls for that.

Prints the first wrong result or bank conflict and exits with 1; what the emulator or a sanitizer finds ends it too.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from reslora_kernels.backends import cuda, hopper, native

from ..kernels.calls import Call, draw, run, truth
from . import load, set_seed, take_statistics

BF16 = torch.bfloat16
CALLS = [
    Call("two passes, several tiles", 100, 104, 520, 34, 17, BF16, BF16, hand=(17, 34), residual=True),
    Call("one pass", 100, 104, 264, 32, 16, BF16, BF16, hand=(16, 32), residual=True),
    Call("dropout", 70, 136, 264, 16, 16, BF16, BF16, p=0.5, hand=(0, 16), residual=True),
    Call("one element a time", 40, 257, 100, 24, 8, BF16, torch.float32, p=0.5, layout="sliced"),
    Call("parts of K", 3, 1032, 40, 16, 16, BF16, BF16),
    Call("parts of K of y", 3, 1032, 40, 16, 16, BF16, BF16, p=0.5),
    Call("parts of K of dx", 3, 40, 1032, 40, 16, BF16, BF16, p=0.5),
]
HOPPER_CALLS = [
    Call("one tile row, several for a block", 64, 64, 520, 40, 40, BF16, BF16),
    Call("dropout, two stages of ranks", 130, 264, 136, 72, 72, BF16, BF16, p=0.5),
    Call("one pass", 150, 136, 264, 24, 16, BF16, BF16, hand=(8, 24), residual=True),
    Call("a ring of stages used again", 130, 1160, 8, 40, 40, BF16, BF16),
    Call("a projection by itself, its stages used again", 130, 520, 1544, 24, 24, BF16, BF16),
]


def main(module: str, seeds: int, variant: str = "off") -> int:
    """0 if every result is exact whatever the schedule, and no access of ldmatrix met a bank twice."""
    path = Path(module)
    extension = load(path)
    native.load = lambda: extension  # type: ignore[assignment]
    os.environ[hopper.VARIABLE] = variant
    torch.use_deterministic_algorithms(True)  # fresh memory is NaN
    for seed in range(seeds):
        set_seed(path, seed)
        for large in (False, True) if variant == "off" else (False,):
            cuda._large = lambda *_: large  # type: ignore[assignment]  # noqa: B023
            for call in CALLS if variant == "off" else HOPPER_CALLS:
                values = draw(call, torch.device("cpu"), integers=True)
                expected = truth(call, values)
                for name, result in run(call, values, cuda).items():
                    if not torch.equal(result, expected[name].to(result.dtype)):
                        print(f"{call.why}: {name} is wrong")
                        return 1
        if conflicts := take_statistics(path).bank_conflicts:
            print(f"{conflicts} bank conflicts")
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:]))

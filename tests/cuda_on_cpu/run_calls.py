"""python -m tests.cuda_on_cpu.run_calls MODULE: small exact calls through an emulated extension, as stdin asks.

A line asks for "SEEDS VARIANT FAULT": calls for that variant of the Hopper kernel, or for the others if it is "off",
with that fault planted. They run in a process of their own, forked from this one, which has imported what they need.
It prints the first wrong result or bank conflict and exits with 1; what the emulator or a sanitizer finds ends it too.
The answer is a line as well: its exit code and all that it has printed, as JSON.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch

from reslora_kernels.backends import cuda, hopper, native

from ..kernels.calls import Call, draw, run, truth
from . import load, plant, set_seed, take_statistics

BF16 = torch.bfloat16
MOST_SECONDS = 600  # of processor time, for what never ends
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
    Call("one pass, strips for two blocks", 200, 264, 520, 16, 16, BF16, BF16, hand=(0, 16), residual=True),
    Call("a ring of stages used again", 130, 1160, 8, 40, 40, BF16, BF16),
    Call("a projection by itself, its stages used again", 130, 520, 1160, 24, 24, BF16, BF16),
]


def run_calls(path: Path, seeds: int, variant: str) -> int:
    """0 if every result is exact whatever the schedule, and no access met a bank twice."""
    os.environ[hopper.VARIABLE] = variant
    hopper.STRIP_TERMS = 0  # a block that has nothing else to do makes dA and dB, however long it takes
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


def answer(path: Path, seeds: int, variant: str, fault: int) -> list[Any]:
    """[exit code, output] of those calls in a fork."""
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if not child:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            resource.setrlimit(resource.RLIMIT_CPU, (MOST_SECONDS, MOST_SECONDS))
            plant(path, fault)
            code = 1
            try:
                code = run_calls(path, seeds, variant)
            except RuntimeError:  # the emulator's
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)  # the interpreter's own end takes a second
        _, status = os.waitpid(child, 0)
        output.seek(0)
        return [os.waitstatus_to_exitcode(status), output.read()]


def main(module: str) -> None:
    path = Path(module)
    torch.use_deterministic_algorithms(True)  # fresh memory is NaN; its imports cost each fork a second
    extension = load(path)
    native.load = lambda: extension  # type: ignore[assignment]
    for line in sys.stdin:
        seeds, variant, fault = line.split()
        print(json.dumps(answer(path, int(seeds), variant, int(fault))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])

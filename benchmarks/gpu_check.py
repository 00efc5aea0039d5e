"""Proves and times the kernels on the GPU of this machine, in parts that can be called one by one.

python -m benchmarks.gpu_check --output benchmarks/results/GPU-DATE-COMMIT.json [--part correctness] [--part ...]

correctness   the tests marked gpu and all of tests/kernels, on the chip
sanitizer     compute-sanitizer's memcheck, racecheck, initcheck and synccheck on small calls of every kernel
speed         forward and step of every shortcut against the frozen matmul and the reordered library form, in one run
tune          every form and tile at the shapes that matter; writes reslora_kernels/kernels/measured.json

Each part adds to the output file as it goes, and what a time budget leaves undone is named there. Runs in the Python
that runs it and installs nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.device_timing import copy_bandwidth, interleaved_seconds, matmul_rate
from benchmarks.layer_calls import FORMS, LayerCall, Shape
from reslora_kernels.backends import torch as library
from reslora_kernels.backends import triton
from reslora_kernels.kernels import choice, launch, measured, tiles

ROOT = Path(__file__).parents[1]
WRONG = 0.05  # relative distance of two backends in 16 bits beyond which one of them is wrong, not rounded
SQUARE, WIDE = Shape(8192, 4096, 4096), Shape(8192, 4096, 14336)
SPEED = (
    SQUARE, WIDE, Shape(8192, 14336, 4096), Shape(8192, 4096, 1024), replace(SQUARE, p=0.1), replace(SQUARE, m=2048),
    Shape(16, 4096, 4096), Shape(1, 4096, 4096), Shape(128, 4096, 4096), Shape(512, 4096, 4096), replace(SQUARE, r=64),
    replace(SQUARE, r=8), Shape(8192, 5120, 5120), Shape(8192, 8192, 8192), replace(SQUARE, dtype=torch.float16),
)  # fmt: skip


class Results:
    """The result file: rewritten whenever a part has something to add."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path, self.device = path, device
        self.content: dict[str, Any] = {"date": str(date.today()), "machine": machine(device), "commit": commit()}

    def add(self, part: str, row: dict[str, Any]) -> None:
        self.content.setdefault(part, []).append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures belong to."""
    from importlib.metadata import version

    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cpu": platform.processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version("triton"),
    }


def commit() -> str | None:
    """The commit of the sources; None outside a clone."""
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return asked.stdout.strip() if asked.returncode == 0 else None


def correctness(results: Results, left: Callable[[], float]) -> None:
    """pytest on the chip; its summary line and what failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels", "tests/test_gpu.py"]
    run(results, "correctness", command, left())


def sanitizer(results: Results, left: Callable[[], float]) -> None:
    """Small calls of every kernel under each tool."""
    if shutil.which("compute-sanitizer") is None:
        results.add("sanitizer", {"skipped": "compute-sanitizer is not installed (it comes with the CUDA toolkit)"})
        return
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", __spec__.name]
        run(results, "sanitizer", [*command, "--small-calls"], min(left(), 90.0))


def run(results: Results, part: str, command: list[str], seconds: float) -> None:
    """One child process: its exit status and the end of what it said."""
    shown = " ".join(command[1:] if command[0] == sys.executable else command)
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(seconds, 1.0))
    except subprocess.TimeoutExpired:
        results.add(part, {"command": shown, "passed": None, "output": f"not finished in {seconds:.0f} s"})
        return
    lines = (done.stdout + done.stderr).strip().splitlines()
    results.add(part, {"command": shown, "passed": done.returncode == 0, "output": "\n".join(lines[-25:])})


def small_calls(device: torch.device) -> None:
    """Every kernel and form once, at sizes that no block divides."""
    shapes = (Shape(70, 136, 200), Shape(20, 72, 40, 1), Shape(3, 72, 40, 8, p=0.5))
    for shape in (*shapes, Shape(40, 100, 60, 17, torch.float32)):
        for form in FORMS.values():
            for wanted in ("one_pass", "two_pass"):
                with tiles.assume(tiles.gpu_of(device), (wanted, "two_pass")):
                    LayerCall(shape, form, device, sets=1).step(triton, 0)


def speed(results: Results, left: Callable[[], float], shapes: Iterable[Shape] = SPEED, rounds: int = 30) -> None:
    """Each shape and shortcut: seconds and ratios to the frozen matmul, both sides in one run."""
    device = results.device
    results.add(
        "ceilings", {"flops": matmul_rate(device), "bytes": copy_bandwidth(device)} if device.type == "cuda" else {}
    )
    for shape in shapes:
        for name, form in FORMS.items():
            if left() < 10:
                results.add("undone", {"part": "speed", "shape": str(shape), "shortcut": name})
                continue
            results.add("speed", speed_row(shape, name, LayerCall(shape, form, device), rounds))
        torch.cuda.empty_cache()


def speed_row(shape: Shape, shortcut: str, call: LayerCall, rounds: int) -> dict[str, Any]:
    row: dict[str, Any] = {"shape": str(shape), **{k: str(v) for k, v in asdict(shape).items()}, "shortcut": shortcut}
    works = {"frozen forward": call.frozen_forward, "frozen step": call.frozen_step}
    works |= {f"torch {what}": work for what, work in call.works(library)}
    if triton.unavailable_reason() is None:
        row["error"] = call.error(triton, library)
        if row["error"] > WRONG:
            return row | {"refused": f"triton and torch differ by {row['error']:.2g}"}
        row["choice"] = triton.explain(call.x[0], call.weight, call.a.shape[0])
        works |= {f"triton {what}": work for what, work in call.works(triton)}
    seconds = interleaved_seconds(works, call.sets, rounds, call.device)
    row["microseconds"] = {name: [value * 1e6 for value in values] for name, values in seconds.items()}
    for backend in ("torch", "triton"):
        for what in ("forward", "step"):
            if f"{backend} {what}" in seconds:
                row[f"{backend} {what} / frozen"] = seconds[f"{backend} {what}"][0] / seconds[f"frozen {what}"][0]
    return row


def tune(results: Results, left: Callable[[], float], shapes: Iterable[Shape] = SPEED, rounds: int = 15) -> None:
    """The fastest form and tile of every matmul and the fastest backend of every call, into the committed table."""
    device = results.device
    gpu = tiles.gpu_of(device)
    entry: dict[str, Any] = {"machine": results.content["machine"], "commit": results.content["commit"]}
    entry |= {"matmuls": [], "calls": []}
    for shape in shapes:
        for name in ("none", "input"):
            if left() < 10:
                results.add("undone", {"part": "tune", "shape": str(shape), "shortcut": name})
                continue
            matmul, times = tuned(shape, LayerCall(shape, FORMS[name], device), gpu, rounds)
            if matmul:
                entry["matmuls"].append(matmul)
            entry["calls"].append(times)
            results.add("tune", {"shape": str(shape), "shortcut": name, "matmul": matmul, "call": times})
    file = Path(measured.__file__).with_name("measured.json")
    file.write_text(json.dumps(measured.table() | {gpu.generation: entry}, indent=1) + "\n", encoding="utf-8")


def tuned(shape: Shape, call: LayerCall, gpu: tiles.Gpu, rounds: int) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """The row for "matmuls" (None with dropout, for which the forward form is no choice), and that for "calls"."""
    rank = call.a.shape[0]
    sizes = {"dtype": str(shape.dtype), "m": shape.m, "n": shape.n, "k": shape.k, "rank": rank}
    candidates: list[tuple[str, tiles.MatmulTile | None]] = [("library", None)]
    for form in ("one_pass", "two_pass"):
        if form == "two_pass" or (shape.p == 0 and rank <= triton.ONE_PASS_RANK):
            found = tiles.matmul_tiles(
                gpu, shape.m, rank, shape.dtype, launch.precision(shape.dtype), form == "one_pass"
            )
            candidates += [(form, tile) for tile in found]

    def forward(form: str, tile: tiles.MatmulTile | None) -> Callable[[int], object]:
        def work(index: int) -> object:
            with tiles.assume(gpu, (form,), tile):
                return call.forward(triton, index)

        return work

    works = {str(n): forward(*candidate) for n, candidate in enumerate(candidates)}
    seconds = interleaved_seconds(works, call.sets, rounds, call.device)
    form, tile = candidates[int(best := min(seconds, key=lambda name: seconds[name][0]))]
    matmul = None
    if shape.p == 0:
        chosen = {"form": form, "tile": asdict(tile) if tile else None, "seconds": seconds[best][0]}
        matmul = sizes | {"one_pass": rank <= triton.ONE_PASS_RANK} | chosen
    with tiles.assume(gpu, (form,), tile):
        steps = {"triton": lambda index: call.step(triton, index), "torch": lambda index: call.step(library, index)}
        both = interleaved_seconds(steps, call.sets, rounds, call.device)
    return matmul, sizes | {"microseconds": {name: values[0] * 1e6 for name, values in both.items()}}


PARTS = {"correctness": correctness, "sanitizer": sanitizer, "speed": speed, "tune": tune}


def summary(content: dict[str, Any]) -> str:
    """A short table of the speed part and a line for each of the others."""
    lines = [f"{row['command'][:80]}: {row['passed']}" for part in ("correctness", "sanitizer")
             for row in content.get(part, ()) if "command" in row]  # fmt: skip
    names = ("torch forward / frozen", "triton forward / frozen", "torch step / frozen", "triton step / frozen")
    lines += [f"{'shape':42} {'shortcut':8} " + " ".join(f"{name.replace(' / frozen', ''):>14}" for name in names)]
    for row in content.get("speed", ()):
        ratios = " ".join(f"{row[name]:14.3f}" if name in row else f"{'-':>14}" for name in names)
        lines.append(f"{row['shape']:42} {row['shortcut']:8} {row.get('refused') or ratios}")
    lines += [f"undone: {len(content['undone'])} for want of time"] if content.get("undone") else []
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", action="append", choices=list(PARTS), help="default: all but tune")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/gpu-check.json")
    parser.add_argument("--budget-seconds", type=float, default=540.0)
    parser.add_argument("--small-calls", action="store_true", help="only run every kernel once (for compute-sanitizer)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "gpu_check needs a CUDA GPU that torch can use; this machine has none (see: reslora doctor)\n")
    device = torch.device("cuda")
    if options.small_calls:
        small_calls(device)
        torch.cuda.synchronize()
        return
    choice._choose.cache_clear()
    deadline, results = time.monotonic() + options.budget_seconds, Results(options.output, device)
    for part in options.part or [name for name in PARTS if name != "tune"]:
        PARTS[part](results, lambda: deadline - time.monotonic())
    print(summary(results.content))
    failed = [
        row
        for part in ("correctness", "sanitizer")
        for row in results.content.get(part, ())
        if row.get("passed") is False
    ]
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()

"""Time every form and tile of the augmented matmul on this GPU and write the table that the choice consults.

python -m benchmarks.tune                            most important shapes first, until --budget-seconds are used up
python -m benchmarks.tune --output measured.json     another file than the package's own

On Hopper the CUDA backend's kernels come first, for at most a third of that time: whole calls of that backend are timed
with those in use that were the fastest. One that hangs ends this; started again with the same file of --steps, it goes
on without that kernel.

The file keeps what it says of other GPU generations, and is whole at every moment; its format is documented in
``reslora_kernels/tuning/gpus.py``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.gpu_check import hopper as hopper_check
from benchmarks.gpu_check.hopper_launches import launches_of
from benchmarks.gpu_check.steps import Steps
from benchmarks.gpu_check.steps import write as write_whole
from reslora_kernels.backends import hopper, native, select, triton
from reslora_kernels.bench import results
from reslora_kernels.bench.timing import Plan, Subject, check_alive, clock_of, measure, measure_rates, percentiles
from reslora_kernels.bench.workload import cache_bytes, sets_of, warmed_up
from reslora_kernels.dropout import Dropout
from reslora_kernels.side_channel import Needs, SideChannel
from reslora_kernels.tuning import forms, gpus, tiles

OUTPUT = Path(__file__).parents[1] / "reslora_kernels" / "tuning" / "measured.json"
REPLAYED_ROWS = 512  # up to so many tokens a call is replayed from a graph: Python's launches take longer than it does
SCALING = 2.0
Table = dict[str, list[dict[str, Any]]]  # rows by kind


@dataclass(frozen=True)
class Shape:
    """A layer K -> N with M tokens."""

    m: int
    k: int
    n: int
    rank: int = 16
    dtype: torch.dtype = torch.bfloat16

    def sizes(self) -> dict[str, Any]:
        return {"dtype": str(self.dtype), "m": self.m, "n": self.n, "k": self.k, "rank": self.rank}


@dataclass(frozen=True)
class Candidate:
    """One way to compute the augmented matmul: "one_pass", "two_pass" with a tile, or "library" without."""

    form: str
    tile: tiles.MatmulTile | None = None


class Timer(Protocol):
    """Seconds of calls on a device, None where a candidate cannot run there."""

    def forward(self, shape: Shape, candidates: Sequence[Candidate]) -> list[float | None]:
        """A whole forward pass without dropout, by each candidate."""

    def backward(self, shape: Shape, candidates: Sequence[Candidate]) -> list[float | None]:
        """The backward pass for dx alone, by each candidate."""

    def calls(self, shape: Shape, forward: Candidate, backward: Candidate) -> dict[str, float]:
        """Forward and backward with all gradients in each backend; the Triton one by these two candidates."""

    def calls_with_dropout(self, shape: Shape) -> dict[str, float]:
        """The same with dropout, as each backend does them."""


def shapes() -> Iterator[Shape]:
    """Those of a 7 to 8 billion parameter decoder at r = 16, large M first; then other ranks, sizes and dtypes."""
    layers = [(4096, 4096), (4096, 14336), (14336, 4096), (4096, 1024)]
    for m in (8192, 2048, 1, 16, 128, 512):
        yield from (Shape(m, k, n) for k, n in layers)
    for m in (8192, 2048):
        yield from (Shape(m, k, k) for k in (8192, 2048, 1024))
    for m in (8192, 2048):
        yield from (Shape(m, 4096, n) for n in (512, 256))
    for m in (8192, 2048, 16):
        yield from (Shape(m, 4096, 4096, rank) for rank in (64, 8, 32, 128))
    for m in (8192, 16):
        yield from (Shape(m, 4096, 4096, 16, dtype) for dtype in (torch.float16, torch.float32))
    for m in (4, 64, 32768):
        yield from (Shape(m, k, n) for k, n in layers)


def candidates(gpu: gpus.Gpu, shape: Shape, one_pass: bool) -> list[Candidate]:
    """Every form and tile that can compute a [m, k] -> [m, n] product; the library's first."""
    from reslora_kernels.tuning.launch import precision

    found = [Candidate("library")]
    for form in ("two_pass", "one_pass") if one_pass else ("two_pass",):
        fitting = tiles.matmul_tiles(
            gpu, shape.m, shape.rank, shape.dtype, precision(shape.dtype), form == "one_pass"
        )  # fmt: skip
        found += [Candidate(form, tile) for tile in fitting]
    return found


def tune(
    gpu: gpus.Gpu,
    timer: Timer,
    chosen: Sequence[Shape],
    keep: Callable[[Table], None],
    deadline: float = math.inf,
) -> Table:
    """Rows of matmuls and calls of the shapes that begin before the deadline; ``keep`` is told after each shape."""
    table: Table = {"matmuls": [], gpus.calls_of(False): [], gpus.calls_of(True): []}
    for shape in chosen:
        if time.monotonic() >= deadline:
            break
        one_pass = shape.rank <= triton.ONE_PASS_RANK
        forward = _fastest(table, shape, one_pass, candidates(gpu, shape, one_pass), timer.forward)
        # dx [M, K] = dy [M, N] W: the product's columns are the layer's inputs.
        swapped = Shape(shape.m, shape.n, shape.k, shape.rank, shape.dtype)
        across = candidates(gpu, swapped, False)
        backward = _fastest(table, swapped, False, across, lambda _, ways, shape=shape: timer.backward(shape, ways))
        if forward is not None and backward is not None:
            for dropout, seconds in (
                (False, timer.calls(shape, forward, backward)),
                (True, timer.calls_with_dropout(shape)),
            ):
                microseconds = {name: round(value * 1e6, 2) for name, value in seconds.items()}
                table[gpus.calls_of(dropout)].append(shape.sizes() | {"microseconds": microseconds})
        keep(table)
    return table


def hopper_rows(
    chosen: Sequence[Shape], device: torch.device, plan: Plan, steps: Steps, deadline: float = math.inf
) -> Table:
    """Rows "cuda_matmuls" and "cuda_projections" of the kernels that are right; this process then chooses by them.

    Where there are no Hopper kernels there are no rows.
    """
    if reason := select.unavailable_reason("cuda") or hopper.unavailable_reason(native.load(), device):
        print(f"no Hopper kernels: {reason}", flush=True)
        return {}
    hopper_check.check(steps, hopper_check.FULL.checked, device)
    layers = [shape for shape in chosen if shape.m >= hopper.LEAST_ROWS and shape.dtype.itemsize == 2]
    launches = [launch for s in layers for launch in launches_of(s.m, s.k, s.n, s.rank, s.dtype)]
    table = hopper_check.rows(steps, dict.fromkeys(launches), device, plan, deadline)
    for name, why in steps.wrong.items():
        print(f"not admitted: {name}: {why}", flush=True)
    hopper.admit(table)
    return table


def _fastest(
    table: Table,
    shape: Shape,
    one_pass: bool,
    ways: list[Candidate],
    timed: Callable[[Shape, Sequence[Candidate]], list[float | None]],
) -> Candidate | None:
    """The fastest of the candidates, entered in the table; None if none could run. A tie goes to the library."""
    ran = [(seconds, way) for seconds, way in zip(timed(shape, ways), ways, strict=True) if seconds is not None]
    if not ran:
        return None
    seconds, best = min(ran, key=lambda pair: pair[0])
    row = shape.sizes() | {"one_pass": one_pass, "form": best.form, "seconds": seconds}
    row["tile"] = asdict(best.tile) if best.tile is not None else None
    row["others"] = {form: min(s for s, way in ran if way.form == form) for form in sorted({w.form for _, w in ran})}
    table["matmuls"].append(row)
    return best


class GpuTimer:
    """Calls of the backends' own functions, interleaved, on input sets that together exceed the cache."""

    def __init__(self, device: torch.device, plan: Plan) -> None:
        self.device, self.plan, self.clock = device, plan, clock_of(device)
        self.gpu = gpus.gpu_of(device)
        self._operands: tuple[Shape | None, list[dict[str, Tensor]]] = (None, [])

    def forward(self, shape: Shape, candidates: Sequence[Candidate]) -> list[float | None]:
        return self._time(shape, [lambda v, way=way: self._forward(v, way) for way in candidates])

    def backward(self, shape: Shape, candidates: Sequence[Candidate]) -> list[float | None]:
        return self._time(shape, [lambda v, way=way: self._backward(v, way, False) for way in candidates])

    def calls(self, shape: Shape, forward: Candidate, backward: Candidate) -> dict[str, float]:
        def ours(v: dict[str, Tensor]) -> None:
            self._forward(v, forward)
            self._backward(v, backward, True)

        return self._calls(shape, None, {"triton": ours})

    def calls_with_dropout(self, shape: Shape) -> dict[str, float]:
        return self._calls(shape, Dropout(torch.tensor(7, device=self.device), 0.1), {})

    def _calls(
        self, shape: Shape, dropout: Dropout | None, given: dict[str, Callable[[dict[str, Tensor]], None]]
    ) -> dict[str, float]:
        """By each backend that there is, or as ``given``."""

        def by(module: Any) -> Callable[[dict[str, Tensor]], None]:
            def call(v: dict[str, Tensor]) -> None:
                module.forward(*_forward_arguments(v, dropout))
                module.backward(*_backward_arguments(v, True, dropout))

            return call

        names = [status.name for status in select.status() if status.available]
        functions = [given.get(name) or by(select._require(name)) for name in names]
        seconds = self._time(shape, functions)
        return {name: value for name, value in zip(names, seconds, strict=True) if value is not None}

    def _forward(self, v: dict[str, Tensor], way: Candidate) -> None:
        with forms.assume(self.gpu, (way.form,), way.tile):
            triton.forward(*_forward_arguments(v))

    def _backward(self, v: dict[str, Tensor], way: Candidate, all_gradients: bool) -> None:
        with forms.assume(self.gpu, (way.form,), way.tile):
            triton.backward(*_backward_arguments(v, all_gradients))

    def _time(self, shape: Shape, functions: Sequence[Callable[[dict[str, Tensor]], None]]) -> list[float | None]:
        sets = self._sets(shape)
        subjects: list[Subject] = []
        for number, function in enumerate(functions):
            try:
                runs = [self._runnable(shape, function, v) for v in sets]
            except Exception as error:  # a tile that does not compile or fit here is no candidate here
                print(f"{shape}: {type(error).__name__}: {str(error).strip()[:200]}")
                check_alive(self.device)
                continue
            subjects.append(Subject(str(number), partial(_call, runs)))
        plan = Plan(**(asdict(self.plan) | {"input_sets": len(sets), "hold": shape.m <= REPLAYED_ROWS}))
        samples = measure(subjects, self.clock, plan, lambda: check_alive(self.device))
        found = [samples.get(str(number)) for number in range(len(functions))]
        return [percentiles(s.forward)[1] if s is not None and s.forward else None for s in found]

    def _runnable(
        self, shape: Shape, function: Callable[[dict[str, Tensor]], None], v: dict[str, Tensor]
    ) -> Callable[[], object]:
        """The call itself, warmed up, or its replay where Python would take longer than the device."""
        if shape.m > REPLAYED_ROWS or self.device.type != "cuda":
            function(v)
            return lambda: function(v)
        stream = warmed_up(partial(function, v))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            function(v)
        return graph.replay

    def _sets(self, shape: Shape) -> list[dict[str, Tensor]]:
        """Operands of a shape, kept until the next shape."""
        if self._operands[0] != shape:
            self._operands = (None, [])
            one = shape.dtype.itemsize * (shape.n * shape.k + shape.m * (shape.k + shape.n))
            count = sets_of(one, cache_bytes(self.device), most=32) if self.device.type == "cuda" else 2
            self._operands = (shape, [_draw(shape, self.device, seed) for seed in range(count)])
        return self._operands[1]


def _call(runs: Sequence[Callable[[], object]], index: int) -> object:
    return runs[index]()


def _draw(shape: Shape, device: torch.device, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(seed)

    def random(*size: int, dtype: torch.dtype = shape.dtype) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).mul_(size[-1] ** -0.5).to(dtype)

    return {
        "x": random(shape.m, shape.k),
        "weight": random(shape.n, shape.k),
        "a": random(shape.rank, shape.k, dtype=torch.float32),
        "b": random(shape.n, shape.rank, dtype=torch.float32),
        "dy": random(shape.m, shape.n),
        "u": random(shape.m, shape.rank),
    }


def _forward_arguments(v: dict[str, Tensor], dropout: Dropout | None = None) -> tuple[Any, ...]:
    return (v["x"], v["weight"], None, (v["a"],), (v["b"],), None, SideChannel(1.0, SCALING), dropout)


def _backward_arguments(v: dict[str, Tensor], everything: bool, dropout: Dropout | None = None) -> tuple[Any, ...]:
    needs, side = Needs(da=everything, db=everything), SideChannel(1.0, SCALING)
    return (v["dy"], None, v["x"], v["weight"], (v["a"],), (v["b"],), v["u"], side, dropout, needs)


def write(
    path: Path, generation: str, table: dict[str, Any], machine: dict[str, Any], rates: dict[str, list[float]]
) -> None:
    """Put one generation's rows into the file, whole or not at all; rates of its other devices are kept."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    commit, _ = results.commit_of(results.SOURCE)
    versions = {name: machine.get(name) for name in ("torch", "triton", "cuda", "driver")}
    rates = content.get(generation, {}).get("rates", {}) | rates
    about = {"machine": machine.get("gpu"), "versions": versions, "commit": commit, "rates": rates}
    content[generation] = about | table
    write_whole(path, content)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--budget-seconds", type=float, default=540.0, help="begin no shape after this")
    parser.add_argument("--seconds", type=float, default=0.5, help="about so long for the candidates of one product")
    parser.add_argument("--steps", type=Path, help="what is found of the Hopper kernels, written at each step")
    options = parser.parse_args(arguments)
    if reason := select.unavailable_reason("triton"):
        print(f"tuning needs the Triton backend: {reason}")
        return 1
    device = torch.device("cuda")
    gpu, machine = gpus.gpu_of(device), results.machine_of(device)
    deadline = time.monotonic() + options.budget_seconds
    timer = GpuTimer(device, Plan(most=100, least=10, seconds=options.seconds))

    chosen = list(shapes())
    plan = replace(hopper_check.FULL.row_plan, seconds=options.seconds)
    rates = measure_rates(["bfloat16"], device, timer.clock)
    known = {machine["gpu"]: [rates.matmul["bfloat16"], rates.copy]}
    served = hopper_rows(chosen, device, plan, Steps(options.steps), time.monotonic() + options.budget_seconds / 3)

    def keep(table: Table) -> None:
        write(options.output, gpu.generation, served | table, machine, known)
        row = table["matmuls"][-1] if table["matmuls"] else {}
        print(f"{len(table['matmuls'])} products, {len(table['calls'])} calls; last: {row.get('others')}", flush=True)

    keep({"matmuls": [], gpus.calls_of(False): [], gpus.calls_of(True): []})
    with hopper.requested(hopper.AUTO):  # calls are timed as they will be served
        table = served | tune(gpu, timer, chosen, keep, deadline)
    found = ", ".join(f"{len(rows)} {kind}" for kind, rows in table.items())
    print(f"{options.output}: {gpu.generation}, {found}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""The Hopper kernels on sm_90: right or not, how fast alone, in graphs, and in whole layers beside the goals.

python -m benchmarks.gpu_check.hopper --output hopper.json
python -m benchmarks.gpu_check.hopper --output rehearsal.json --rehearse    small shapes on a CPU, as tests do it

The file is written at each step, and a kernel that hangs ends the process; started again with the same file, it goes on
without that kernel: "finished" says that it is through. A kernel that is wrong is not timed in that form. 23 checks, 81
rows of at most 7 x 40 launches, 14 replays and 8 layers of at most 11 x 30 passes are expected to take 4 to 5 minutes
on an H100; no row begins after half of --budget-seconds, no layer after all of them.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check import hopper_launches, hopper_layers
from benchmarks.gpu_check.hopper_launches import (
    IN_ONE_PASS,
    LIBRARY,
    Launch,
    Matmul,
    Projection,
    compare_with_two_passes,
    launches_of,
)
from benchmarks.gpu_check.hopper_layers import goals_of
from benchmarks.gpu_check.steps import Steps
from reslora_kernels.backends import cuda, hopper
from reslora_kernels.bench import cases
from reslora_kernels.bench.cases import LORA, Case
from reslora_kernels.bench.timing import Plan, check_alive, clock_of, measure_rates, one_line

BF16, FP16 = torch.bfloat16, torch.float16
MATMUL_GOAL = 0.99  # the least share of the library's speed that a matmul reaches, its low-rank product included
SETTINGS = (*hopper.ONE_PASS_VARIANTS, *hopper.VARIANTS, hopper.AUTO)


@dataclass(frozen=True)
class Program:
    """What is checked and timed. ``alone``: adapters in the type of x, so that nothing is converted on the way."""

    checked: Sequence[Launch]
    rows: Sequence[Launch]
    alone: Sequence[Launch]
    replayed: Sequence[Case]
    layers: Sequence[Case]
    row_plan: Plan
    layer_plan: Plan


def _checked(m: int, k: int, n: int, rank: int, dtype: torch.dtype) -> list[Launch]:
    """Every form in ``dtype``; adapters in float32 with bfloat16, else the same."""
    adapter = torch.float32 if dtype == BF16 else dtype
    return [replace(launch, adapter=adapter) for launch in launches_of(m, k, n, rank, dtype)]


SIDE_CHANNELS: list[Launch] = [  # few rows, so that K is in parts, and many
    Projection(hopper.H, 100, 32, 1288, FP16, FP16, raw_start=8),
    Projection(hopper.H, 300, 16, 4096, BF16, extra_start=0, raw_start=0),
    Projection(hopper.DH, 70, 56, 1032, BF16, extra_start=8, raw_start=0),
    Projection(hopper.DH, 1030, 120, 776, FP16, FP16, extra_start=40, raw_start=64),
]
SHAPES = [  # m, k, n, rank of a layer
    (8192, 4096, 4096, 16), (8192, 4096, 14336, 16), (8192, 14336, 4096, 16), (2048, 4096, 4096, 16),
    (8192, 8192, 8192, 16), (8192, 4096, 4096, 64), (512, 4096, 4096, 16), (8192, 4096, 1024, 16),
    (8192, 4096, 512, 16), (8192, 4096, 256, 16), (8192, 14336, 512, 16), (8192, 4096, 4096, 128),
]  # fmt: skip
FULL = Program(
    checked=[
        *_checked(300, 200, 520, 16, BF16), *_checked(300, 200, 264, 24, FP16), *_checked(1024, 1024, 1032, 72, FP16),
        *SIDE_CHANNELS,
    ],
    rows=list(dict.fromkeys(launch for shape in SHAPES for launch in launches_of(*shape, BF16))),
    alone=[
        Matmul(form, 8192, n, k, 16, BF16, BF16)
        for n, k in ((4096, 4096), (14336, 4096), (4096, 14336)) for form in (hopper.FORWARD, hopper.DX)
    ],
    replayed=[Case(1024, 1024, n, layers=2, methods=(LORA,)) for n in (1024, 256)],
    layers=[
        replace(case, methods=(LORA,))
        for case in (*cases.standard(True), Case(2048, 4096, 4096), Case(8192, 5120, 5120), Case(8192, 8192, 8192))
    ],
    row_plan=Plan(most=40, least=10, seconds=0.6, hold=True, launch_seconds=3e-4),
    layer_plan=Plan(most=30, least=10, seconds=6.0, hold=True),
)  # fmt: skip
SMALL = list(launches_of(70, 136, 72, 8, BF16))
ONCE = Plan(most=1, least=1, warmup=0)
REHEARSAL = Program(
    checked=[*SMALL, SIDE_CHANNELS[2]],
    rows=SMALL,
    alone=[Matmul(hopper.FORWARD, 70, 72, 136, 8, BF16, BF16)],
    replayed=[Case(70, 136, 520, 8, layers=1, methods=(LORA,))],
    layers=[Case(70, 136, 520, 8, layers=1, methods=(LORA,))],
    row_plan=ONCE,
    layer_plan=ONCE,
)


def kernels_for(launch: Launch) -> tuple[str, ...]:
    """The portable one makes one pass of what is narrow only."""
    if launch.form not in IN_ONE_PASS:
        return (hopper.PORTABLE, *hopper.kernels_of(launch.form))
    assert isinstance(launch, Matmul)
    narrow = launch.form == hopper.ONE_PASS and launch.n <= hopper.NARROW and launch.rank <= cuda.ONE_PASS_RANK
    return (*([hopper.PORTABLE] if narrow else []), *hopper.kernels_of(launch.form))


def is_right(steps: Steps, kernel: str, form: str) -> bool:
    """Whether neither the kernel nor this form of it is known to be wrong."""
    return kernel not in steps.wrong and _in_form(kernel, form) not in steps.wrong


def _in_form(kernel: str, form: str) -> str:
    return f"{kernel}, {form}"


def _right(steps: Steps, launch: Launch) -> list[str]:
    return [kernel for kernel in kernels_for(launch) if is_right(steps, kernel, launch.form)]


def settings_for(steps: Steps, case: Case, settings: Iterable[str]) -> list[str]:
    """Those under which no kernel serves a layer that is wrong in any form."""
    wrong = {name.partition(",")[0] for name in steps.wrong}
    return [name for name in settings if not wrong & _brought_by(name, case)]


def _brought_by(setting: str, case: Case) -> set[str]:
    """The kernels that a variant's name brings along; dropout is not made in one pass."""
    if setting in hopper.ONE_PASS_VARIANTS:
        return {setting} | ({next(iter(hopper.VARIANTS)), hopper.STREAMING} if case.p else set())
    if setting in hopper.VARIANTS:
        return {setting, hopper.STREAMING} | ({"one-pass"} if case.n <= hopper.NARROW else set())
    return {setting}


def check(steps: Steps, launches: Iterable[Launch], device: torch.device) -> None:
    """One step for each; kernels that were wrong in the same form before are left out."""
    for launch in launches:
        steps.run(f"check {launch}", lambda launch=launch: _faults(steps, launch, device))


def _faults(steps: Steps, launch: Launch, device: torch.device) -> dict[str, Any]:
    found = hopper_launches.faults(
        launch, _right(steps, launch), device, lambda kernel: steps.launching(_in_form(kernel, launch.form))
    )
    steps.wrong.update({_in_form(kernel, launch.form): why for kernel, why in found.items()})
    steps.launching(None)
    return {"wrong": found}


def rows(
    steps: Steps, launches: Iterable[Launch], device: torch.device, plan: Plan, deadline: float = math.inf
) -> dict[str, list[dict[str, Any]]]:
    """Rows of the measured table, of the launches that begin before the deadline; each is checked first.

    A kernel that proves wrong at any of them is in no row of that form.
    """
    table: dict[str, list[dict[str, Any]]] = {Matmul.table: [], Projection.table: []}
    for launch in launches:
        if time.monotonic() >= deadline:
            break
        found = steps.run(f"time {launch}", lambda launch=launch: _time(steps, launch, device, plan))
        if "row" in found:
            table[launch.table].append(found["row"])
            shares = ", ".join(f"{name} {share:.3f}" for name, share in found["of_library"].items())
            print(f"{launch}: {found['library']:.1f} us; of its speed: {shares}", flush=True)
    for row in (row for kind in table.values() for row in kind):
        times = row["microseconds"]
        row["microseconds"] = {name: times[name] for name in times if is_right(steps, name, row["form"])}
    compare_with_two_passes(table)
    return table


def _time(steps: Steps, launch: Launch, device: torch.device, plan: Plan) -> dict[str, Any]:
    """A row, and how it compares with the library's time for the product alone."""
    _faults(steps, launch, device)
    row = hopper_launches.times(launch, _right(steps, launch), device, plan)
    library = row.pop(LIBRARY)
    shares = {name: round(library / value, 4) for name, value in row["microseconds"].items()}
    return {"row": row, LIBRARY: library, "of_library": shares}


def share_bandwidth(steps: Steps, launches: Iterable[Launch], rate: float) -> None:
    """Beside each projection that was timed, the share of a copy's bytes a second at which x, a and h were moved."""
    for launch in launches:
        found = steps.found["steps"].get(f"time {launch}", {})
        if isinstance(launch, Projection) and "row" in found:
            times = found["row"]["microseconds"] | {LIBRARY: found[LIBRARY]}
            moved = launch.bytes_moved() / rate * 1e6
            found["of_bandwidth"] = {name: round(moved / value, 4) for name, value in times.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, then time; 1 where a kernel is wrong, a step failed or a layer under some setting was refused."""
    options = _options(arguments)
    program, device = (REHEARSAL, torch.device("cpu")) if options.rehearse else (FULL, torch.device("cuda"))
    begun, budget = time.monotonic(), options.budget_seconds
    steps = Steps(options.output)
    check(steps, program.checked, device)
    rates = steps.run("rates", lambda: asdict(measure_rates(["bfloat16"], device, clock_of(device))))
    rows(steps, program.alone, device, program.row_plan)
    hopper.admit(rows(steps, program.rows, device, program.row_plan, begun + budget / 2))
    if "copy" in rates:
        share_bandwidth(steps, program.rows, rates["copy"])
    replays = [
        _replay(steps, case, name, device)
        for case in program.replayed for name in hopper.NUMBERS if name in settings_for(steps, case, [name])
    ]  # fmt: skip
    graphs = device.type == "cuda" and not any("failed" in found for found in replays)
    for case in program.layers:
        if time.monotonic() < begun + budget:
            _layer(steps, case, device, program.layer_plan, graphs, begun + budget)
    reached = goals(steps.found["steps"], program, rates)
    steps.finish(goals=reached)
    failed = [name for name, found in steps.found["steps"].items() if "failed" in found or found.get("refused")]
    for goal in reached:
        said = f"{goal['goal']} of {goal['of']}: {goal['value']:.4f} by {goal['by']}, the goal is {goal['limit']}"
        print(f"{said}: {'met' if goal['met'] else 'not met'}")
    met = sum(goal["met"] for goal in reached)
    print(f"{len(steps.wrong)} kernels wrong, {len(failed)} steps failed; {met} of {len(reached)} goals met")
    return int(bool(steps.wrong or failed))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="what was found, written at each step")
    parser.add_argument("--budget-seconds", type=float, default=400.0)
    parser.add_argument("--rehearse", action="store_true", help="go through the motions on a machine without a GPU")
    return parser.parse_args(arguments)


def _replay(steps: Steps, case: Case, setting: str, device: torch.device) -> dict[str, Any]:
    def work() -> dict[str, Any]:
        steps.launching(setting)
        try:
            hopper_layers.check_replay(case, setting, device)
        except (AssertionError, RuntimeError) as error:  # it may still be right where it is not captured
            check_alive(device)
            return {"failed": one_line(error)}
        return {"equal": True}

    return steps.run(f"replay {setting}: {case}", work)


def _layer(steps: Steps, case: Case, device: torch.device, plan: Plan, graphs: bool, deadline: float) -> None:
    settings = settings_for(steps, case, (hopper.OFF, *SETTINGS))
    found = steps.run(
        f"layer {case}",
        lambda: hopper_layers.times(case, settings, device, plan, graphs, deadline, steps.launching),
    )
    for name, ratios in found.get("of_frozen", {}).items():
        print(f"layer {case}, {name}: forward {ratios['forward']:.3f}, both {ratios['both']:.3f} of frozen", flush=True)


def _limits(case: Case, rates: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of a layer without dropout, by this GPU's own rates."""
    if case.p or "copy" not in rates:
        return {}
    stated = goals_of(case.m, case.k, case.n, case.r, rates["matmul"]["bfloat16"], rates["copy"], once=True)
    return {phase: asdict(goal) for phase, goal in stated.items()}


def goals(found: dict[str, dict[str, Any]], program: Program, rates: dict[str, Any]) -> list[dict[str, Any]]:
    """What the best setting with Hopper kernels reaches of each goal, by layer, and the best kernel by matmul alone."""
    reached = []
    for case in program.layers:
        every = found.get(f"layer {case}", {}).get("of_frozen", {})
        ours = {name: ratios for name, ratios in every.items() if name in SETTINGS}
        limits = _limits(case, rates)
        if "torch" in every:
            limits["ahead of torch"] = {"limit": every["torch"]["both"]}
        for goal, stated in limits.items() if ours else ():
            phase = "forward" if goal == "forward" else "both"
            best = min(ours, key=lambda name: ours[name][phase])
            value = ours[best][phase]
            reached.append({"goal": goal, "of": str(case), **stated, "by": best, "value": value})
            reached[-1]["met"] = value <= stated["limit"]
    for launch in program.alone:
        every = found.get(f"time {launch}", {}).get("of_library", {})
        ours = {name: share for name, share in every.items() if name in hopper.VARIANTS}
        if ours:
            best = max(ours, key=ours.__getitem__)
            goal = {"goal": "matmul", "of": str(launch), "limit": MATMUL_GOAL, "by": best, "value": ours[best]}
            reached.append(goal | {"met": ours[best] >= MATMUL_GOAL})
    return reached


if __name__ == "__main__":
    raise SystemExit(main())

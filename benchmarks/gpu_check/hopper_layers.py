"""Whole layers by the cuda backend under each setting of ``RESLORA_CUDA_HOPPER``: captured, timed, and their goals.

python -m benchmarks.gpu_check.hopper_layers        the goals, by arithmetic, for GPUs that are not here

Layers, their inputs and what they must come to are those of ``reslora bench``. A goal is relative to the frozen matmul,
by arithmetic with two rates, of a large matmul and of a copy: what is bound by neither, and any loss in a matmul of our
own, is not in it but for SLACK. The floor has every product in the matmul's own pass, every operand once. The goal is
the cheapest form that there is a kernel for, plus SLACK.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check.hopper_launches import recorded
from reslora_kernels.backends import hopper
from reslora_kernels.bench.cases import LORA, Case
from reslora_kernels.bench.providers import FROZEN, PROVIDERS
from reslora_kernels.bench.suite import Judge
from reslora_kernels.bench.timing import (
    PHASES,
    Plan,
    Samples,
    Subject,
    check_alive,
    clock_of,
    measure,
    one_line,
    percentiles,
    relative,
)
from reslora_kernels.bench.workload import Pass, cache_bytes, capture, draw, eager, input_sets, replayed
from reslora_kernels.tuning.gpus import GENERATIONS, with_rates

TORCH = "torch"
OURS = PROVIDERS["ours-cuda"]


def check_replay(case: Case, setting: str, device: torch.device) -> None:
    """Raise an AssertionError unless forward and backward, replayed from CUDA graphs, give what they gave when called.

    On a CPU, which has no graphs, they are called again.
    """
    workload = draw(case, device)
    one = Pass(OURS.build(workload, LORA), workload)
    with hopper.requested(setting), recorded() as asked:
        results = one.results()
        if not any(asked):
            raise AssertionError(f"no Hopper kernel serves {case}")
        again = _replayed(one) if device.type == "cuda" else one.results()
    for name, tensors in results.items():
        for n, (found, expected) in enumerate(zip(again[name], tensors, strict=True)):
            if not torch.equal(found, expected):
                raise AssertionError(f"{setting}, {case}: {name} of layer {n} differs when it is replayed")


def _replayed(one: Pass) -> dict[str, list[Tensor]]:
    """y, dx, dA, dB of graphs whose outputs held something else before."""
    replay = capture(one)
    outputs, gradients, _ = replay.kept
    for tensor in (*outputs, *gradients):
        tensor.detach().fill_(float("nan"))
    replay.forward.replay()
    replay.backward.replay()
    torch.cuda.synchronize()
    count = len(one.workload.xs)
    names = ("dx", "dA", "dB")
    parts = {name: list(gradients[n * count : (n + 1) * count]) for n, name in enumerate(names)}
    return {"y": [y.detach() for y in outputs]} | parts


def times(
    case: Case,
    settings: Sequence[str],
    device: torch.device,
    plan: Plan,
    graphs: bool,
    deadline: float,
    launching: Callable[[str | None], None],
) -> dict[str, Any]:
    """Each setting and the reordered library calls, "torch", relative to the frozen linears, in turns.

    Who is wrong is refused, and not timed. ``graphs``: replayed, so that launching from Python is not measured.
    ``launching`` is told before each setting's first launch, and with None when all of them take turns.
    """
    sets = [draw(case, device, seed) for seed in range(input_sets(case, cache_bytes(device), most=4))]
    judge, subjects, refused = Judge(sets[0]), [], {}
    for name in (FROZEN, TORCH, *settings):
        provider = OURS if name in settings else PROVIDERS[FROZEN if name == FROZEN else "ours-torch"]
        setting = name if name in settings else hopper.OFF
        launching(setting if name in settings else None)
        with hopper.requested(setting):
            try:
                refused[name] = judge.check(provider, LORA).refusal
                if refused[name] is None:
                    passes = [Pass(provider.build(workload, LORA), workload) for workload in sets]
                    subjects.append(replayed(name, passes) if graphs else _under(setting, eager(name, passes)))
            except (AssertionError, RuntimeError) as error:  # the others go on
                refused[name] = one_line(error)
                check_alive(device)
    launching(None)
    del judge
    gc.collect()
    plan = replace(plan, input_sets=len(sets))
    samples = measure(subjects, clock_of(device), plan, lambda: check_alive(device), deadline)
    refused |= {name: found.failure for name, found in samples.items() if found.failure}
    timed = {name: found for name, found in samples.items() if found.failure is None}
    found = {"case": str(case), "graphs": graphs, "refused": {name: why for name, why in refused.items() if why}}
    return found | {
        "microseconds": {name: _medians(of) for name, of in timed.items()},
        "of_frozen": {name: _ratios(of, timed[FROZEN]) for name, of in timed.items() if FROZEN in timed},
    }


def _under(setting: str, subject: Subject) -> Subject:
    """The same, asked for anew whenever it is called."""

    def forward(index: int) -> Any:
        with hopper.requested(setting):
            return subject.forward(index)

    def backward(index: int, outputs: Any) -> Any:
        assert subject.backward is not None
        with hopper.requested(setting):
            return subject.backward(index, outputs)

    return Subject(subject.name, forward, backward)


def _medians(samples: Samples) -> dict[str, float]:
    return {phase: round(percentiles(samples.of(phase))[1] * 1e6, 2) for phase in PHASES}


def _ratios(samples: Samples, frozen: Samples) -> dict[str, float]:
    """Medians of the quotients of a round, by phase; "noise" is the larger half-width of their 95 % intervals."""
    found = {phase: relative(samples.of(phase), frozen.of(phase)) for phase in PHASES}
    ratios = {phase: round(quotient.median, 4) for phase, quotient in found.items()}
    return ratios | {"noise": round(max(quotient.noise for quotient in found.values()), 4)}


SLACK = 0.015  # of the frozen matmul: launches, and what the ends of tiles do in the open
TILE = 256  # columns of y that a block multiplies by while it multiplies by the rows of A


@dataclass(frozen=True)
class Goal:
    """Times relative to the frozen matmul, forward or both directions; both are of one matmul in each direction."""

    floor: float
    limit: float
    reason: str


def goals_of(m: int, k: int, n: int, rank: int, flops: float, bandwidth: float, once: bool) -> dict[str, Goal]:
    """Goals "forward" and "both" of a 16-bit layer K -> N without dropout; ``once``: a row of tiles makes x aᵀ once."""
    frozen = max(2.0 * m * k * n / flops, 2.0 * (m * k + k * n + m * n) / bandwidth)

    def again(columns: int) -> float:
        """A pass over [m, columns] beside the matmul."""
        return 2.0 * m * columns / bandwidth / frozen

    low_rank = 2.0 * m * rank / flops / frozen  # for each column of x or y

    def beside(columns: int) -> tuple[float, str]:
        """The narrow product in the pass of a matmul to [m, columns]."""
        cost = -(-rank // 16) * 16 / TILE / (-(-columns // TILE) if once else 1)
        return cost, f"{100 * cost:.1f} % more products"

    forward = _cheaper(*beside(n), again(k), "x again")
    # dh comes beside dx where that costs little; else with dB from a pass over dy, which is then made but once.
    dh = _cheaper(*beside(k), again(n), "dy again") if once else (0.0, "")
    gradients = again(k) + again(n)
    limits = {"forward": 1 + low_rank * n + forward[0]}
    limits["both"] = (limits["forward"] + 1 + low_rank * k + dh[0] + gradients) / 2
    floors = {"forward": 1 + low_rank * (k + n), "both": 1 + 1.5 * low_rank * (k + n)}
    reasons = {"forward": forward[1]}
    reasons["both"] = f"backward: {dh[1]}{', ' if dh[1] else ''}dA and dB from x and dy, {100 * gradients:.1f} %"
    return {name: Goal(floors[name], limits[name] + SLACK, reasons[name]) for name in limits}


def _cheaper(products: float, shared: str, read: float, what: str) -> tuple[float, str]:
    """One pass or two, and why."""
    if products <= read:
        return products, f"one pass, {shared} (not {what}, {100 * read:.1f} %)"
    return read, f"two passes, {what}, {100 * read:.1f} % (not {shared})"


KNOWN = {  # those of which rates are known, and whether there is a kernel there that makes x aᵀ once for a row of tiles
    "H100": (with_rates(GENERATIONS["sm_90"], "H100"), True),
    "H200": (with_rates(GENERATIONS["sm_90"], "H200"), True),
    "A100": (GENERATIONS["sm_80"], False),
    "RTX 4090": (GENERATIONS["sm_89"], False),
    "B200": (GENERATIONS["sm_100"], False),
}
SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (4096, 1024))


def table() -> str:
    """Markdown: every known GPU and shape of a layer with M = 8192 and r = 16."""
    lines = ["| GPU | layer | | floor | goal | why |", "|---|---|---|---|---|---|"]
    for name, (gpu, once) in KNOWN.items():
        for k, n in SHAPES:
            for phase, goal in goals_of(8192, k, n, 16, gpu.flops, gpu.bandwidth, once).items():
                about = f"{name} | {k} -> {n}" if phase == "forward" else "|"
                lines.append(f"| {about} | {phase} | {goal.floor:.3f} | {goal.limit:.2f} | {goal.reason} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())

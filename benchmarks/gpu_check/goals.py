"""What a layer can reach relative to its frozen matmul on a GPU: the floor, the goal, and the reason for it.

python -m benchmarks.gpu_check.goals        the table of benchmarks/hopper.md, from rates of GPUs that are not here

Arithmetic with two rates, of a large matmul and of a copy: what is bound by neither, and any loss in a matmul of our
own, is not in it but for SLACK. The floor has every product in the matmul's own pass, every operand once. The goal is
the cheapest form that there is a kernel for, plus SLACK.
"""

from __future__ import annotations

from dataclasses import dataclass

from reslora_kernels.tuning.gpus import GENERATIONS, with_rates

SLACK = 0.015  # of the frozen matmul: launches, and what the ends of tiles do in the open
TILE = 256  # columns of y that a block multiplies by while it multiplies by the rows of A


@dataclass(frozen=True)
class Goal:
    """Times relative to the frozen matmul, forward or both directions; both are of one matmul in each direction."""

    floor: float
    limit: float
    reason: str


def goals_of(m: int, k: int, n: int, rank: int, flops: float, bandwidth: float, pairs: bool) -> dict[str, Goal]:
    """Goals "forward" and "both" of a 16-bit layer K -> N without dropout; ``pairs``: blocks share the rows of A."""
    frozen = max(2.0 * m * k * n / flops, 2.0 * (m * k + k * n + m * n) / bandwidth)

    def again(columns: int) -> float:
        """A pass over [m, columns] beside the matmul."""
        return 2.0 * m * columns / bandwidth / frozen

    low_rank = 2.0 * m * rank / flops / frozen  # for each column of x or y
    beside = -(-rank // 16) * 16 / (2 * TILE if pairs else TILE)
    shared = f"{100 * beside:.1f} % more products"
    forward = _cheaper(beside, shared, again(k), "x again")
    # dh comes beside dx where blocks share it; else with dB from a pass over dy, which is then made but once.
    dh = _cheaper(beside, shared, again(n), "dy again") if pairs else (0.0, "")
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


KNOWN = {  # those of which rates are known, and whether there is a kernel there in which blocks share the rows of A
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
    for name, (gpu, pairs) in KNOWN.items():
        for k, n in SHAPES:
            for phase, goal in goals_of(8192, k, n, 16, gpu.flops, gpu.bandwidth, pairs).items():
                about = f"{name} | {k} -> {n}" if phase == "forward" else "|"
                lines.append(f"| {about} | {phase} | {goal.floor:.3f} | {goal.limit:.2f} | {goal.reason} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())

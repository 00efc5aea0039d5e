"""A set of runs: sizes, budgets, the grid of learning rates and the seeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reslora_kernels.cli.demo.settings import FULL, QUICK, Settings

TUNING_SEED = 1000  # of the runs that choose a method's learning rate; no other run uses it


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every method gets alike. The model and its pre-training are those of ``reslora demo``."""

    name: str
    model: Settings
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    steps: int
    evaluations: int
    held_out: int
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    calibration_batches: int = 16

    def to_dict(self) -> dict[str, Any]:
        """What a run's result depends on, for its file."""
        return {
            "model": vars(self.model), "steps": self.steps, "evaluations": self.evaluations,
            "held_out": self.held_out, "calibration_batches": self.calibration_batches,
        }  # fmt: skip


MAIN = ("lora", "lora-16", "input", "block", "middle")
PEERS = ("adalora", "loha", "lokr")
ABLATIONS = ("block-1", "block-4", "block-all", "middle-1", "middle-4", "middle-all")

SETS = {
    "quick": Budget(
        name="quick", model=QUICK, tasks=("python", "arithmetic"), methods=("lora", "input", "block", "middle"),
        steps=40, evaluations=4, held_out=16, rates=(1e-2,), seeds=(0, 1), calibration_batches=4,
    ),
    "main": Budget(
        name="main", model=FULL, tasks=("python",), methods=MAIN,
        steps=120, evaluations=12, held_out=64, rates=(5e-3, 1e-2, 2e-2), seeds=(0, 1, 2, 3, 4),
    ),
    "cpu": Budget(
        name="cpu", model=FULL, tasks=("python", "arithmetic"), methods=(*MAIN, *PEERS, *ABLATIONS),
        steps=120, evaluations=12, held_out=64, rates=(5e-3, 1e-2, 2e-2), seeds=(0, 1, 2, 3, 4),
    ),
}  # fmt: skip

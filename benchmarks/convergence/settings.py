"""A set of runs: for each task its sizes, budget, methods and grid of learning rates; and the seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from reslora_kernels.cli.demo.fine_tuning import Sizes

TUNING_SEED = 1000  # the first of the runs that choose a method's learning rate; no other run has one so high
BASELINE = "lora"
R = 4  # the rank of every method's adapters where no other is asked for; lora_alpha is twice that
SHORTCUTS = ("input", "block", "middle")  # with the default pre_num
SAME_RANK = (BASELINE, *SHORTCUTS)
MAIN = (*SAME_RANK, "lora-16")
PEERS = ("adalora", "loha", "lokr")
GRADIENT_STEPS = (1, 10, 100)  # of runs on a given model
PRE_NUM = ("block-1", "block-4", "block-all", "middle-1", "middle-4", "middle-all")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every method gets alike on one task: ``steps`` of ``batch`` sequences, measured on ``held_out`` others.

    ``tuning_runs`` is how many seeds each of ``rates`` is tried with. Merges, of the first ``merged_seeds`` seeds (None
    is all), see ``calibration_batches`` of ``calibration_batch`` sequences. The first ``generated`` held-out ones are
    generated for. Gradients are measured after ``gradient_steps``, or the first evaluation and the last.
    """

    methods: tuple[str, ...]
    steps: int
    evaluations: int
    batch: int
    held_out: int
    rates: tuple[float, ...]
    tuning_runs: int = 2
    calibration_batches: int = 16
    calibration_batch: int
    warmup_steps: int = 10
    generated: int = 256
    gradient_steps: tuple[int, ...] = ()
    merged_seeds: int | None = None
    step_times: tuple[int, int] = (5, 5)  # rounds over the methods, and steps of each timed in a round

    def tuned_like(self, method: str) -> str:
        """The method whose rate this one trains with: where only pre_num differs, that of the same shortcut."""
        shortcut = method.split("-")[0]
        return shortcut if method in PRE_NUM and shortcut in self.methods else method

    def of_a_run(self) -> dict[str, Any]:
        """What one run's result depends on: neither the other methods nor how the rate was chosen."""
        others = ("methods", "rates", "tuning_runs", "merged_seeds", "step_times")
        own = {key: value for key, value in asdict(self).items() if key not in others}
        return own | {"gradient_steps": list(self.gradient_steps)}


@dataclass(frozen=True, kw_only=True)
class Experiments:
    """``sizes`` by kind of base model, ``budgets`` by task."""

    name: str
    sizes: Mapping[str, Sizes]
    budgets: Mapping[str, Budget]
    seeds: tuple[int, ...]

    def only(self, tasks: tuple[str, ...]) -> Experiments:
        """A part of the set.

        Raises:
            ValueError: a task that it does not have.
        """
        for task in tasks:
            if task not in self.budgets:
                raise ValueError(f"--tasks must be of {', '.join(self.budgets)}, got {task!r}")
        return replace(self, budgets={task: self.budgets[task] for task in tasks})


RATES = (1e-2, 2e-2, 4e-2)

DECODER = Sizes()
ENCODER = Sizes(
    hidden_size=64, intermediate_size=192, sequence=64, batch=24, pretraining_steps=2000, pretraining_rate=3e-3
)
UNET = Sizes(hidden_size=32, sequence=8, batch=32, layers=1, pretraining_steps=900, pretraining_rate=2e-3)

_TEXT = Budget(methods=MAIN, steps=80, evaluations=5, batch=8, held_out=48, rates=RATES, calibration_batch=8)
_CLASSES = Budget(
    methods=SAME_RANK, steps=160, evaluations=4, batch=16, held_out=384, rates=(1.5e-3, 3e-3, 6e-3),
    calibration_batch=48,  # three times a step's: to a joint fit each says no more than a few classes' probabilities
)  # fmt: skip
_IMAGES = Budget(
    methods=SAME_RANK, steps=60, evaluations=3, batch=16, held_out=128, rates=RATES,
    calibration_batch=16,
)  # fmt: skip
_QUICK = {"steps": 12, "evaluations": 2, "held_out": 16, "rates": (1e-2,), "calibration_batches": 4}

SETS = {
    "quick": Experiments(
        name="quick",
        sizes={
            "decoder": replace(DECODER, hidden_size=64, intermediate_size=192, layers=4, pretraining_steps=60),
            "encoder": replace(ENCODER, layers=4, pretraining_steps=40, batch=8),
            "unet": replace(UNET, pretraining_steps=120, batch=16),
        },
        budgets={
            "python": replace(_TEXT, **_QUICK, methods=SAME_RANK),
            "arithmetic": replace(_TEXT, **_QUICK, methods=("lora", "block")),
            "package": replace(_CLASSES, **_QUICK, methods=("lora", "block")),
            "code": replace(_CLASSES, **_QUICK, methods=("lora", "block")),
            "order": replace(_CLASSES, **_QUICK, methods=("lora", "block")),
            "inverted": replace(_IMAGES, **_QUICK, methods=("lora", "block")),
            "slanted": replace(_IMAGES, **_QUICK, methods=("lora", "block")),
        },
        seeds=(0, 1),
    ),
    "cpu": Experiments(
        name="cpu",
        sizes={"decoder": DECODER, "encoder": ENCODER, "unet": UNET},
        budgets={
            "python": replace(_TEXT, methods=(*MAIN, *PEERS, *PRE_NUM)),
            "arithmetic": replace(_TEXT, methods=(*MAIN, *PEERS), held_out=192, rates=(2.5e-3, 5e-3, 1e-2)),
            "package": _CLASSES,
            "code": _CLASSES,
            "order": _CLASSES,
            "inverted": _IMAGES,
            "slanted": _IMAGES,
        },
        seeds=(0, 1, 2, 3, 4),
    ),
    "controls": Experiments(  # ``block`` with the default pre_num has updates of rank 12: is that its gain?
        name="controls",
        sizes={"unet": UNET},
        budgets={
            name: replace(_IMAGES, methods=(BASELINE, "block", "lora-8", "lora-16"), merged_seeds=0)
            for name in ("slanted", "inverted")
        },
        seeds=(0, 1, 2, 3, 4),
    ),
    "gates": Experiments(
        name="gates",
        sizes={"unet": UNET, "encoder": ENCODER},
        budgets={
            name: replace(
                budget, merged_seeds=0,
                methods=(BASELINE, *(f"{m}{gates}" for m in SAME_RANK[1:] for gates in ("", "-gates", "-gates-0"))),
            )
            for name, budget in (("slanted", _IMAGES), ("inverted", _IMAGES), ("order", _CLASSES))
        },
        seeds=(0, 1, 2, 3, 4),
    ),
    "gpu": Experiments(  # the decoder has 100 million parameters
        name="gpu",
        sizes={
            "decoder": replace(
                DECODER, hidden_size=768, intermediate_size=2304, layers=12, heads=12, sequence=512, batch=16,
                pretraining_steps=400, pretraining_rate=6e-4,
            )
        },
        budgets={
            "python": replace(
                _TEXT, methods=SAME_RANK, steps=100, rates=(1e-3, 2e-3, 4e-3), tuning_runs=1
            )
        },
        seeds=(0, 1, 2, 3, 4),
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Given:
    """A pre-trained model and data of the user's own, by path or id."""

    kind: str
    model: str
    data: str
    dtype: str = "bfloat16"
    r: int = R

    @property
    def task(self) -> str:
        """Its name in results."""
        from benchmarks.convergence.tasks.sources import name_of

        return name_of(self.data) + (f"-r{self.r}" if self.r != R else "")

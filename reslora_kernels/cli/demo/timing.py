"""The time of a training step, relative to the frozen model that any adapter has to run anyway."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reslora_kernels.bench.clocks import CpuClock
from reslora_kernels.bench.timing import Plan, Subject, measure, relative
from reslora_kernels.config import Shortcut

FROZEN = "frozen"

DEFINITION = (
    "A step is forward and backward of one batch, down to the output of the embeddings, and for adapters AdamW's "
    "update. The frozen model is the pre-trained one without adapters or any weight gradient. Models take turns; the "
    "figures are medians over the rounds, the relative time that of the quotients within a round."
)


@dataclass(frozen=True)
class StepTime:
    """Medians: milliseconds, and the quotient with the frozen model's time in the same round."""

    milliseconds: float
    relative: float


def time_steps(
    frozen: nn.Module, models: Mapping[Shortcut, nn.Module], batch: Tensor, rounds: int, each_round: Callable[[], None]
) -> tuple[float, dict[Shortcut, StepTime]]:
    """Median milliseconds of a frozen model's step, and the step times of ``models``, which are left as they are.

    One round more runs beforehand, to warm up.
    """
    subjects = [Subject(name, _step(model, batch)) for name, model in ({FROZEN: frozen} | dict(models)).items()]
    plan = Plan(most=rounds, least=rounds, warmup=1)
    samples = measure(subjects, CpuClock(), plan, _fail, on_round=each_round)
    floor = samples[FROZEN].forward
    return 1e3 * statistics.median(floor), {
        name: StepTime(1e3 * statistics.median(own), relative(own, floor).median)
        for name, own in ((name, samples[name].forward) for name in models)
    }


def _fail() -> None:
    raise RuntimeError("a step that was to be timed failed")


def _step(model: nn.Module, batch: Tensor) -> Callable[[int], None]:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.0, weight_decay=0.0) if trainable else None  # moves nothing
    embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]

    def step(_: int) -> None:
        embedded = embeddings(batch).detach().requires_grad_()
        model(inputs_embeds=embedded, labels=batch, use_cache=False).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step

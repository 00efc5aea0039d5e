"""One run: adapt, train, measure, merge; and the file of all runs that makes a set resumable."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.convergence import json_lines, measures
from benchmarks.convergence.methods import METHODS, adapted
from benchmarks.convergence.settings import TUNING_SEED, Budget, Experiments
from benchmarks.convergence.steps import training_steps
from benchmarks.convergence.tasks.kinds import Batch, Task
from reslora_kernels.bench.results import commit_of, machine_of

CALIBRATION_SEED = 10_000  # added to a run's own
FILE = "runs.jsonl"  # of a folder, with a line for each run that is done


@dataclass(frozen=True, order=True)
class Spec:
    """Which run: the rest is the budget's."""

    task: str
    method: str
    rate: float
    seed: int

    @property
    def tunes(self) -> bool:
        """Whether it only helps to choose the learning rate."""
        return self.seed >= TUNING_SEED


def train_one(base: nn.Module, task: Task, experiments: Experiments, spec: Spec) -> dict[str, Any]:
    """The run's result as plain values. A run that tunes is measured before and after, and no more."""
    budget, sizes, method = experiments.budgets[spec.task], experiments.sizes[task.kind], METHODS[spec.method]
    device = next(base.parameters()).device
    batches = [on(batch, device) for batch in task.train(sizes, budget.steps, budget.batch, spec.seed)]
    held_out = on(task.held_out(sizes, budget.held_out), device)
    model = adapted(base, task, spec.method, budget.steps, spec.seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    evaluations = 1 if spec.tunes else budget.evaluations
    marks = [round(budget.steps * i / evaluations) for i in range(1, evaluations + 1)]
    curve: list[dict[str, Any]] = [{"step": 0} | task.figures(model, held_out)]
    gradients: dict[int, dict[str, float]] = {}
    samples: dict[int, list[Any]] = {}
    optimizer = torch.optim.AdamW(trained, spec.rate, weight_decay=0.0)
    for step, _ in enumerate(training_steps(model, optimizer, batches, budget.warmup_steps, task.loss), 1):
        method.after_step(model, step)
        if step in marks:
            curve.append({"step": step} | task.figures(model, held_out))
            if not spec.tunes and step in (marks[0], marks[-1]):
                gradients[step] = measures.gradient_norms(model, task, held_out, budget.batch)
            if spec.seed == experiments.seeds[0] and (images := task.samples(model)) is not None:
                samples[step] = images
    result = {
        "spec": asdict(spec),
        "task": task.description(),
        "budget": budget.of_a_run(),
        "sizes": asdict(sizes),
        "measures": measures.settings(),
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "curve": curve,
        "machine": machine_of(device),
        "commit": commit_of(Path(__file__).parents[2]),
    }
    if spec.tunes:
        return result
    drawn = task.train(sizes, budget.calibration_batches, budget.calibration_batch, spec.seed + CALIBRATION_SEED)
    calibration = [on(batch, device) for batch in drawn]
    return result | {
        "final": curve[-1] | task.final_figures(model, held_out),
        "merges": measures.merges(model, task, calibration, held_out),
        "adapter_norms": measures.adapter_norms(model),
        "gradient_norms": gradients,
        "samples": samples,
    }


def on(batch: Batch, device: torch.device) -> Batch:
    """The batch's tensors on a device."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


def missing(experiments: Experiments, tasks: Mapping[str, Task], folder: Path, *, tuning: bool) -> list[Spec]:
    """The runs that the folder lacks: those that choose the learning rates, or, once those are done, the others.

    Raises:
        ValueError: a run of this folder had other settings.
    """
    wanted, found = [], read_all(folder)
    for task, budget in experiments.budgets.items():
        for method in budget.methods:
            if not tuning:
                rate = best_rate(experiments, found, task, method)
                wanted += [Spec(task, method, rate, seed) for seed in experiments.seeds]
            elif len(budget.rates) > 1 and budget.tuned_like(method) == method:
                wanted += [spec for rate in budget.rates for spec in tuning_runs(budget, task, method, rate)]
    for spec in wanted:
        if spec in found and (different := _other_settings(found[spec], experiments, tasks[spec.task])):
            raise ValueError(f"{folder / FILE} has {spec} with other settings ({different}): use another folder")
    return [spec for spec in wanted if spec not in found]


def _other_settings(result: dict[str, Any], experiments: Experiments, task: Task) -> str:
    """Their names, none if the run had these."""
    name = result["spec"]["task"]
    found = result["task"] | {f"budget.{k}": v for k, v in result["budget"].items()} | result["sizes"]
    found |= result.get("measures", {})
    own = task.description() | {f"budget.{k}": v for k, v in experiments.budgets[name].of_a_run().items()}
    own |= asdict(experiments.sizes[task.kind]) | measures.settings()
    return ", ".join(sorted(key for key in found.keys() | own.keys() if found.get(key) != own.get(key)))


def add(result: dict[str, Any], folder: Path) -> None:
    """Keep a run that is done; other processes may do the same meanwhile."""
    json_lines.append(result, folder / FILE)


def read_all(folder: Path) -> dict[Spec, dict[str, Any]]:
    """Every run of a folder, in the order of ``Spec``; of one that is there twice, the later."""
    found = {Spec(**result["spec"]): result for result in json_lines.read(folder / FILE)}
    return dict(sorted(found.items()))


def best_rate(experiments: Experiments, found: Mapping[Spec, dict[str, Any]], task: str, method: str) -> float:
    """The rate of the grid whose tuning runs ended with the lowest mean loss; see ``Budget.tuned_like``."""
    budget = experiments.budgets[task]
    if len(budget.rates) == 1:
        return budget.rates[0]

    def loss(rate: float) -> float:
        judges = tuning_runs(budget, task, budget.tuned_like(method), rate)
        mean = statistics.mean(found[spec]["curve"][-1]["loss"] for spec in judges)
        return math.inf if math.isnan(mean) else mean

    return min(budget.rates, key=loss)


def tuning_runs(budget: Budget, task: str, method: str, rate: float) -> list[Spec]:
    """Those by which a rate is judged."""
    return [Spec(task, method, rate, TUNING_SEED + i) for i in range(budget.tuning_runs)]

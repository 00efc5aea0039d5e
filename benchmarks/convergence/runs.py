"""One run: adapt, train, measure, merge; and the file that makes a set of runs resumable."""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from benchmarks.convergence.methods import METHODS, adapted
from benchmarks.convergence.settings import TUNING_SEED, Budget
from benchmarks.convergence.tasks import TASKS, Batch, loss_of, measured
from reslora_kernels import collect_statistics, merge_reslora
from reslora_kernels.cli.bench.results import commit_of, machine_of
from reslora_kernels.cli.demo import data
from reslora_kernels.cli.demo.training import new_model, pretrain, training_steps
from reslora_kernels.config import MergeMethod
from reslora_kernels.merging import unmerge_reslora
from reslora_kernels.model import Record, record_of
from reslora_kernels.shortcuts import hands_on


@dataclass(frozen=True)
class Spec:
    """Which run: the rest is the budget's."""

    task: str
    method: str
    rate: float
    seed: int

    def file(self, folder: Path) -> Path:
        return folder / f"{self.task}-{self.method}-{self.rate:g}-{self.seed}.json"


def base_model(budget: Budget, folder: Path) -> nn.Module:
    """The demo's LLaMA, pre-trained on English prose; kept in ``folder`` for the next run of the same settings."""
    from safetensors.torch import load_model, save_model

    settings = budget.model
    digest = hashlib.sha256(json.dumps(vars(settings), sort_keys=True, default=list).encode()).hexdigest()[:12]
    path, model = folder / f"base-{digest}.safetensors", new_model(settings)
    if path.exists():
        load_model(model, path)
    else:
        drawn = data.random_batches(
            data.prose().train, settings.pretraining_steps, settings.batch, settings.sequence, settings.seed
        )
        pretrain(model, drawn, settings, lambda loss: None)
        save_model(model, str(path.with_suffix(".tmp")))
        os.replace(path.with_suffix(".tmp"), path)
    return model.eval().requires_grad_(False)


def train_one(base: nn.Module, budget: Budget, spec: Spec) -> dict[str, Any]:
    """The run's result as plain values. Seconds are those of training steps alone."""
    task, method = TASKS[spec.task], METHODS[spec.method]
    batches = task.train(budget.steps, budget.model.batch, spec.seed)
    held_out = task.held_out(budget.held_out)
    model = adapted(base, spec.method, budget.steps, spec.seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    curve: list[dict[str, Any]] = [{"step": 0, "seconds": 0.0} | measured(model, spec.task, held_out)]
    marks = {round(budget.steps * i / budget.evaluations) for i in range(1, budget.evaluations + 1)}
    optimizer = torch.optim.AdamW(trained, spec.rate, weight_decay=0.0)
    seconds, start = 0.0, time.perf_counter()
    model.train()
    for step, _ in enumerate(training_steps(model, optimizer, batches, budget.model.warmup_steps, loss_of), 1):
        method.after_step(model, step)
        seconds += time.perf_counter() - start
        if step in marks:
            curve.append({"step": step, "seconds": seconds} | measured(model, spec.task, held_out))
        start = time.perf_counter()
    model.eval()
    return {
        "spec": asdict(spec),
        "budget": budget.to_dict(),
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "curve": curve,
        "merges": _merges(model, budget, spec, held_out, curve),
        "machine": machine_of(torch.device("cpu")),
        "commit": commit_of(Path(__file__).parents[2]),
    }


def _merges(
    model: nn.Module, budget: Budget, spec: Spec, held_out: Batch, curve: list[dict[str, Any]]
) -> dict[str, dict[str, float]]:
    """By method: the figures after the merge, and the share of fine-tuning's gain in loss that it lost."""
    if not isinstance(model.__dict__.get("_reslora"), Record):
        return {}
    config = record_of(model).config
    approximate = hands_on(config.shortcut, config.pre_num)
    calibration = TASKS[spec.task].train(budget.calibration_batches, budget.model.batch, spec.seed + 10_000)
    inputs = [{"input_ids": batch.tokens, "use_cache": False} for batch in calibration]
    statistics = None
    if approximate:
        with torch.no_grad(), collect_statistics(model) as statistics:
            for batch in inputs:
                model(**batch)
    ways: dict[str, dict[str, Any]] = {"exact": {}}
    if approximate:
        methods: tuple[MergeMethod, ...] = get_args(MergeMethod)
        ways = {method: {"method": method, "statistics": statistics} for method in methods}
        ways["least_squares, sequential"] = {"method": "least_squares", "calibration": inputs, "sequential": True}
    gain = curve[0]["loss"] - curve[-1]["loss"]
    found = {}
    for name, arguments in ways.items():
        merge_reslora(model, **arguments)
        after = measured(model, spec.task, held_out)
        found[name] = after | {"lost_share": (after["loss"] - curve[-1]["loss"]) / gain}
        unmerge_reslora(model)
    return found


def missing(budget: Budget, folder: Path, rates: dict[tuple[str, str], float] | None) -> list[Spec]:
    """The runs without a file: those that choose the learning rates, or, once ``rates`` are known, the others.

    Raises:
        ValueError: a file of this folder is of a run with other settings.
    """
    pairs = [(task, method) for task in budget.tasks for method in budget.methods]
    if rates is None:
        wanted = [Spec(*pair, rate, TUNING_SEED) for pair in pairs for rate in budget.rates if len(budget.rates) > 1]
    else:
        wanted = [Spec(*pair, rates[pair], seed) for pair in pairs for seed in budget.seeds]
    for spec in wanted:
        if spec.file(folder).exists():
            _refuse_another_budget(spec.file(folder), budget)
    return [spec for spec in wanted if not spec.file(folder).exists()]


def _refuse_another_budget(path: Path, budget: Budget) -> None:
    found, own = json.loads(path.read_text())["budget"], json.loads(json.dumps(budget.to_dict()))
    different = sorted(key for key in found.keys() | own.keys() if found.get(key) != own.get(key))
    if different:
        raise ValueError(f"{path} is of a run with other settings ({', '.join(different)}): use another folder")


def write(result: dict[str, Any], path: Path) -> None:
    """Whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, path)


def read_all(folder: Path) -> list[dict[str, Any]]:
    """Every run of a folder."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def best_rates(budget: Budget, folder: Path) -> dict[tuple[str, str], float]:
    """By task and method: the rate of the grid whose tuning run ended with the lowest loss."""
    losses: dict[tuple[str, str], dict[float, float]] = {}
    for result in read_all(folder):
        spec = Spec(**result["spec"])
        if spec.seed == TUNING_SEED:
            losses.setdefault((spec.task, spec.method), {})[spec.rate] = result["curve"][-1]["loss"]
    return {
        (task, method): min(found, key=found.__getitem__) if (found := losses.get((task, method))) else budget.rates[0]
        for task in budget.tasks
        for method in budget.methods
    }

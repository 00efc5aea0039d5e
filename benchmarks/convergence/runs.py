"""One run: adapt, train, measure, merge; the file of all runs, which makes a set resumable; step times by method."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from benchmarks.convergence import measures
from benchmarks.convergence.methods import METHODS, adapted
from benchmarks.convergence.settings import TUNING_SEED, Budget, Experiments, Sizes
from benchmarks.convergence.tasks.kinds import Batch, Task, pieces, told, training_steps
from reslora_kernels import loraplus_groups
from reslora_kernels.bench.results import commit_of, machine_of

CALIBRATION_SEED = 10_000  # added to a run's own
WARM_UP = 1  # steps of each stretch that are not timed
STEP_TIMES = "step-times.jsonl"  # of a folder, with a line for each task; of two the later holds
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

    def __str__(self) -> str:
        return f"{self.task}, {self.method}, rate {self.rate:g}, seed {self.seed}"


def train_one(base: nn.Module, task: Task, experiments: Experiments, spec: Spec, folder: Path) -> dict[str, Any]:
    """The run's result as plain values. A run that tunes is measured before and after, and no more.

    What a killed process left of the run in ``folder`` is gone on with, bit for bit. A final run's adapters stay there.
    """
    budget, sizes, method = experiments.budgets[spec.task], experiments.sizes[task.kind], METHODS[spec.method]
    device = next(base.parameters()).device
    batches = [on(batch, device) for batch in task.train(sizes, budget.steps, budget.batch, spec.seed)]
    held_out = on(task.held_out(sizes, budget.held_out), device)
    model = adapted(base, task, spec.method, budget.steps, spec.seed)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups = loraplus_groups(model, lr=spec.rate, loraplus_lr_ratio=method.ratio) if method.ratio else trained.values()
    optimizer = torch.optim.AdamW(groups, spec.rate, weight_decay=0.0)
    about = {
        "spec": asdict(spec), "task": task.description(), "budget": budget.of_a_run(), "sizes": asdict(sizes),
        "measures": measures.settings(),
    }  # fmt: skip
    state = _State(_place(folder, "unfinished", about), trained, optimizer, device)
    resumable = method.after_step is None
    if not (resumable and state.load()):
        state.curve.append({"step": 0} | _untrained(base, task, sizes, budget.held_out))
    evaluations = 1 if spec.tunes else budget.evaluations
    marks = [round(budget.steps * i / evaluations) for i in range(1, evaluations + 1)]
    gradient_steps = () if spec.tunes else budget.gradient_steps or (marks[0], marks[-1])
    steps = training_steps(model, optimizer, batches, budget.warmup_steps, task.loss, state.step)
    for _ in steps:
        state.step += 1
        if method.after_step is not None:
            method.after_step(model, state.step)
        if state.step in marks:
            state.curve.append({"step": state.step} | task.figures(model, held_out))
            if spec.seed == experiments.seeds[0] and (images := task.samples(model)) is not None:
                state.samples[state.step] = images
        if state.step in gradient_steps:
            state.gradients[state.step] = measures.gradient_norms(model, task, held_out, budget.batch)
        if resumable:
            state.save(at_once=state.step in marks)
    result = about | {
        "trained_parameters": sum(parameter.numel() for parameter in trained.values()),
        "curve": state.curve,
        "machine": machine_of(device),
        "commit": commit_of(Path(__file__).parents[2]),
    }
    if not spec.tunes:
        generated = next(pieces(held_out, budget.generated))
        result |= {
            "final": state.curve[-1] | task.final_figures(model, generated),
            "merges": {},
            "adapter_norms": measures.adapter_norms(model),
            "update_ranks": measures.update_ranks(model),
            "gradient_norms": state.gradients,
            "samples": state.samples,
        }
        state.keep(_place(folder, "adapters", about))
    return result


@cache
def _untrained(base: nn.Module, task: Task, sizes: Sizes, examples: int) -> dict[str, float]:
    """The base model's figures, with which every method starts."""
    return task.figures(base, on(task.held_out(sizes, examples), next(base.parameters()).device))


def merge_one(
    base: nn.Module, task: Task, experiments: Experiments, result: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """A final run's result, with what each merge of its adapters costs."""
    spec, budget = Spec(**result["spec"]), experiments.budgets[result["spec"]["task"]]
    sizes, device = experiments.sizes[task.kind], next(base.parameters()).device
    model = adapted(base, task, spec.method, budget.steps, spec.seed)
    with torch.no_grad():
        for name, value in torch.load(_place(folder, "adapters", result), map_location=device).items():
            model.get_parameter(name).copy_(value)
    drawn = task.train(sizes, budget.calibration_batches, budget.calibration_batch, spec.seed + CALIBRATION_SEED)
    held_out = on(task.held_out(sizes, budget.held_out), device)
    return result | {"merges": measures.merges(model, base, task, [on(batch, device) for batch in drawn], held_out)}


class _State:
    """Of a run that is not done: ``step`` steps are, with what was measured. On the disk it is always whole."""

    EVERY = 60.0  # seconds, at least, between two that are saved
    _PLAIN = ("step", "curve", "gradients", "samples")

    def __init__(
        self, path: Path, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, device: torch.device
    ) -> None:
        self._path, self._trained, self._optimizer, self._device = path, trained, optimizer, device
        self._saved = time.monotonic()
        self.step = 0
        self.curve: list[dict[str, Any]] = []
        self.gradients: dict[int, dict[str, float]] = {}
        self.samples: dict[int, list[Any]] = {}

    def load(self) -> bool:
        """Take over what was saved; False if nothing was."""
        if not self._path.exists():
            return False
        saved = torch.load(self._path, map_location=self._device)
        self._optimizer.load_state_dict(saved["optimizer"])
        with torch.no_grad():
            for name, value in saved["trained"].items():
                self._trained[name].copy_(value)
        torch.set_rng_state(saved["random"].cpu())
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(saved["random_of_device"].cpu(), self._device)
        for name in self._PLAIN:
            setattr(self, name, saved[name])
        return True

    def save(self, *, at_once: bool) -> None:
        if not at_once and time.monotonic() - self._saved < self.EVERY:
            return
        state = {name: getattr(self, name) for name in self._PLAIN} | {
            "trained": {name: parameter.detach() for name, parameter in self._trained.items()},
            "optimizer": self._optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }
        if self._device.type == "cuda":
            state["random_of_device"] = torch.cuda.get_rng_state(self._device)
        _save_whole(state, self._path)
        self._saved = time.monotonic()

    def keep(self, path: Path) -> None:
        """The trained parameters; the rest is done with once the run's line is written."""
        _save_whole({name: parameter.detach() for name, parameter in self._trained.items()}, path)


def _place(folder: Path, kind: str, about: dict[str, Any]) -> Path:
    """The file of a run, named after all that it depends on: another budget goes on with nothing of this one's."""
    own = {name: about[name] for name in ("spec", "task", "budget", "sizes")}
    return folder / kind / f"{hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]}.pt"


def _save_whole(values: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    torch.save(values, temporary)
    os.replace(temporary, path)


def on(batch: Batch, device: torch.device) -> Batch:
    """The batch's tensors on a device."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


def missing(experiments: Experiments, tasks: Mapping[str, Task], folder: Path, *, tuning: bool) -> list[Spec]:
    """The runs that the folder lacks: those that choose the learning rates, or, once those are done, the others.

    Of the others every method's with the first seed come first: whatever is done is a comparison.

    Raises:
        ValueError: a run of this folder had other settings.
    """
    wanted, found = [], read_all(folder)
    for task, budget in experiments.budgets.items():
        if tuning:
            tuned = [method for method in budget.methods if budget.tuned_like(method) == method]
            tuned = tuned if len(budget.rates) > 1 else []
            wanted += [spec for m in tuned for rate in budget.rates for spec in tuning_runs(budget, task, m, rate)]
        else:
            rates = {method: best_rate(experiments, found, task, method) for method in budget.methods}
            wanted += [Spec(task, m, rate, seed) for seed in experiments.seeds for m, rate in rates.items()]
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


def unmerged(experiments: Experiments, folder: Path) -> list[Spec]:
    """The final runs whose adapters have not been merged yet; PEFT's are not."""
    found, wanted = read_all(folder), []
    for task, budget in experiments.budgets.items():
        rates = {method: best_rate(experiments, found, task, method) for method in budget.methods}
        for seed in experiments.seeds[: budget.merged_seeds]:
            wanted += [Spec(task, m, rate, seed) for m, rate in rates.items() if METHODS[m].merges]
    return [spec for spec in wanted if not found[spec]["merges"]]


def add(result: dict[str, Any], folder: Path) -> None:
    """Keep a run that is done; other processes may do the same meanwhile."""
    append(result, folder / FILE)
    _place(folder, "unfinished", result).unlink(missing_ok=True)


def read_all(folder: Path) -> dict[Spec, dict[str, Any]]:
    """Every run of a folder, in the order of ``Spec``; of one that is there twice, the later."""
    found = {Spec(**result["spec"]): result for result in read_lines(folder / FILE)}
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


def append(value: dict[str, Any], path: Path) -> None:
    """Add a line to a file of one JSON object a line, to which processes append at the same time.

    It is on the disk when this returns. Who appends holds the file's lock: a piece of an object behind the last line
    feed is of a process that died writing it, and is cut off.
    """
    line = json.dumps(value).encode() + b"\n"
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _end_the_last_line(file)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def _end_the_last_line(file: BinaryIO) -> None:
    file.seek(0)
    content = file.read()
    end = content.rfind(b"\n") + 1
    if _is_a_piece(content[end:]):
        file.truncate(end)
    elif content[end:]:
        file.write(b"\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every object, none if there is no file; not the piece that a crash left.

    Raises:
        ValueError: a line is no JSON object.
    """
    if not path.exists():
        return []
    *lines, last = path.read_bytes().split(b"\n")
    lines += [last] if last and not _is_a_piece(last) else []
    return [_parsed(line, f"{path}, line {i}") for i, line in enumerate(lines, 1)]


def _is_a_piece(last: bytes) -> bool:
    """Whether what stands behind the last line feed lacks more than another."""
    try:
        json.loads(last or b"{}")
    except ValueError:
        return True
    return False


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} must be a JSON object: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a JSON object, got {value!r}")
    return value


def time_methods(base: nn.Module, task: Task, name: str, experiments: Experiments, folder: Path) -> None:
    """Add the seconds of a training step of each method, also of those that the folder has final runs of already.

    Unless the seconds of all of them, of these settings, are there. Short stretches take turns, so that what else the
    machine does hits all.
    """
    budget, sizes = experiments.budgets[name], experiments.sizes[task.kind]
    rounds, timed = budget.step_times
    earlier = (spec.method for spec in read_all(folder) if spec.task == name and not spec.tunes)
    methods = list(dict.fromkeys((*budget.methods, *earlier)))
    settings = {"batch": budget.batch, "sizes": asdict(sizes), "rounds": rounds, "warm_up": WARM_UP, "timed": timed}
    latest = _latest_times(folder).get(name, {"settings": {"methods": []}})["settings"]
    if latest == settings | {"methods": latest["methods"]} and set(methods) <= set(latest["methods"]):
        return
    device = next(base.parameters()).device
    batches = [on(batch, device) for batch in task.train(sizes, WARM_UP + timed, budget.batch, 0)]
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    for method in told(methods * rounds, "stretch"):
        seconds[method].append(one_stretch(adapted(base, task, method, len(batches), 0), task, batches, device))
    result = {
        "task": name, "settings": settings | {"methods": methods}, "seconds": seconds, "machine": machine_of(device),
        "commit": commit_of(Path(__file__).parents[2]),
    }  # fmt: skip
    append(result, folder / STEP_TIMES)


def one_stretch(model: nn.Module, task: Task, batches: list[dict[str, Any]], device: torch.device) -> float:
    """Median seconds of a step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4, weight_decay=0.0)
    times, start = [], time.perf_counter()
    for _ in training_steps(model, optimizer, batches, 1, task.loss):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
        start = time.perf_counter()
    return statistics.median(times[WARM_UP:])


def read_step_times(folder: Path) -> dict[str, dict[str, float]]:
    """By task and method, the median over the rounds."""
    return {
        task: {method: statistics.median(times) for method, times in result["seconds"].items()}
        for task, result in _latest_times(folder).items()
    }


def _latest_times(folder: Path) -> dict[str, dict[str, Any]]:
    """By task."""
    return {result["task"]: result for result in read_lines(folder / STEP_TIMES)}

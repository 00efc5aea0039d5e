"""The demo's work from beginning to end, with bars of its progress, and everything it measured.

After training come every merge of a model and what it costs, and the exported adapter as PEFT sees it.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from reslora_kernels.adapt.coverage import inspect
from reslora_kernels.adapt.record import record_of
from reslora_kernels.cli.demo import fine_tuning
from reslora_kernels.cli.demo.fine_tuning import (
    BASELINE,
    EVALUATION_BATCH,
    TITLES,
    Curve,
    Settings,
    StepTime,
    adapted,
    evaluate,
    finetune,
    generate,
    inputs,
    new_model,
    pretrain,
    steps_to_reach,
    time_steps,
)
from reslora_kernels.config import MergeMethod, Shortcut
from reslora_kernels.files.peft_export import export_peft
from reslora_kernels.files.save_load import save_adapter
from reslora_kernels.layers.shortcuts import hands_on
from reslora_kernels.merge.merging import merge_reslora, unmerge_reslora
from reslora_kernels.merge.statistics import Statistics, collect_statistics


class Stage(NamedTuple):
    """``weight``: about how long one of its ``steps`` takes, in steps of pre-training."""

    name: str
    steps: int
    weight: float


class Bars:
    """The bars of all stages, shown from the start."""

    def __init__(self, progress: Progress, stages: Sequence[Stage]) -> None:
        self._progress = progress
        self._weights = {stage.name: stage.weight for stage in stages}
        self._tasks = {
            stage.name: progress.add_task(stage.name, total=stage.steps, start=False, note="") for stage in stages
        }
        self._work = sum(stage.steps * stage.weight for stage in stages)
        self._everything = progress.add_task("[bold]everything", total=self._work, note="")

    def start(self, name: str) -> None:
        """Start a stage's clock."""
        self._progress.start_task(self._tasks[name])

    def finish(self) -> None:
        """Everything is done, whatever the weights' rounding leaves."""
        self._progress.update(self._everything, completed=self._work)

    def advance(self, name: str, note: str = "") -> None:
        """One step of a stage is done; ``note`` stands beside its bar."""
        self._progress.update(self._tasks[name], advance=1, note=note)
        self._progress.update(self._everything, advance=self._weights[name])


@contextmanager
def show_bars(stages: Sequence[Stage], console: Console) -> Iterator[Bars]:
    """Bars that live as long as the ``with`` block."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with Progress(*columns, console=console, speed_estimate_period=20) as progress:
        bars = Bars(progress, stages)
        yield bars
        bars.finish()


EXACT = (None,)  # in place of a list of methods


@dataclass(frozen=True)
class Merge:
    """One merge. ``loss_added`` is against the unmerged model; ``worst_layer`` the largest error of a layer's term."""

    method: str
    loss: float
    loss_added: float
    worst_layer: float | None


@dataclass(frozen=True)
class PeftComparison:
    """The exported adapter, loaded by PEFT, against the model that was merged here by the same method."""

    method: str
    max_lora_rank: int
    logit_difference: float
    largest_logit: float
    loss: float
    merged_loss: float


def methods_of(model: nn.Module) -> tuple[MergeMethod | None, ...]:
    """Every merge method of a model; None alone where the merge is exact and there is nothing to choose."""
    config = record_of(model).config
    return get_args(MergeMethod) if hands_on(config.shortcut, config.pre_num) else EXACT


def gather_statistics(model: nn.Module, batches: Tensor) -> Statistics | None:
    """Statistics of ``batches`` [count, sequences, bytes] in evaluation mode; None where merging needs none."""
    if methods_of(model) == EXACT:
        return None
    with torch.no_grad(), collect_statistics(model) as statistics:
        for batch in batches:
            model(**inputs(batch))
    return statistics


def measure_merge(
    model: nn.Module, method: MergeMethod | None, statistics: Statistics | None, evaluation: Tensor, loss: float
) -> Merge:
    """Merge, evaluate, and restore the model. ``loss`` is the unmerged model's."""
    report = merge_reslora(model, method, statistics=statistics)
    merged_loss = evaluate(model, evaluation)
    unmerge_reslora(model)
    return Merge(method or "exact", merged_loss, merged_loss - loss, report.worst())


def compare_with_peft(
    model: nn.Module, base: nn.Module, folder: Path, statistics: Statistics | None, evaluation: Tensor
) -> PeftComparison:
    """Export to ``folder`` with the configured merge, load that onto a copy of ``base`` with PEFT, and compare."""
    from peft import PeftModel

    exported = export_peft(model, folder, statistics=statistics)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's use of names that Transformers has renamed
        served = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    merge_reslora(model, statistics=statistics)
    with torch.no_grad():
        ours, theirs = model(**inputs(evaluation)).logits, served(**inputs(evaluation)).logits
    merged_loss = evaluate(model, evaluation)
    unmerge_reslora(model)
    method = methods_of(model)[0] and record_of(model).config.merge
    return PeftComparison(
        method or "exact",
        exported.max_lora_rank,
        (ours - theirs).abs().max().item(),
        ours.abs().max().item(),
        evaluate(served, evaluation),
        merged_loss,
    )


PRETRAINING, MEASURING, MERGING, SAMPLING = "pre-training", "step times", "merging, PEFT", "generating"


@dataclass
class Run:
    """One fine-tuning and what came of it."""

    shortcut: Shortcut
    trainable_parameters: int
    chains: dict[str, int]  # name of the chain: how many layers
    curve: Curve
    steps_to_reach_lora: float | None
    merges: list[Merge] = field(default_factory=list)
    peft: PeftComparison | None = None
    step_time: StepTime | None = None
    samples: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        return TITLES[self.shortcut]


@dataclass(frozen=True)
class Base:
    """The pre-trained model. Losses are nats per byte on held-out text; (before, after) pre-training for prose."""

    parameters: int
    prose_losses: tuple[float, float]
    python_loss: float
    samples: list[str]
    step_milliseconds: float


@dataclass(frozen=True)
class Results:
    settings: Settings
    base: Base
    runs: list[Run]
    seconds: dict[str, float]  # by stage


@dataclass(frozen=True)
class _Data:
    """Batches, drawn before the first step. int64 [steps, sequences, bytes], held out: [sequences, bytes]."""

    prose: Tensor
    prose_held_out: Tensor
    python: Tensor
    python_held_out: Tensor
    calibration: Tensor


class _Clock:
    """Seconds spent in each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, bars: Bars) -> Iterator[None]:
        bars.start(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def run_experiment(settings: Settings, folder: Path, console: Console) -> Results:
    """Train, merge, export and measure everything; models go to ``folder``, figures are returned."""
    batches = _load(settings)
    clock = _Clock()
    with show_bars(_stages(settings), console) as bars:
        with clock.stage(PRETRAINING, bars):
            base = new_model(settings)
            before = evaluate(base, batches.prose_held_out)
            pretrain(base, batches.prose, settings, lambda loss: bars.advance(PRETRAINING, f"training loss {loss:.3f}"))
            prose_losses = before, evaluate(base, batches.prose_held_out)
        _save(base, folder / "base-model")
        models: dict[Shortcut, nn.Module] = {}
        runs: list[Run] = []
        for shortcut in settings.runs:
            with clock.stage(_title(shortcut), bars):
                models[shortcut] = adapted(base, shortcut, settings)
                runs.append(_finetuned(models[shortcut], shortcut, batches, settings, bars, runs[0] if runs else None))
        for run in runs:
            with clock.stage(MERGING, bars):
                _after_training(run, models[run.shortcut], base, batches, folder / "adapters" / run.title.lower(), bars)
        with clock.stage(SAMPLING, bars):
            written = [_samples(model, settings, bars) for model in (base, *models.values())]
        with clock.stage(MEASURING, bars):
            base_milliseconds, step_times = time_steps(
                base, models, batches.python[0], settings.timing_rounds, lambda: bars.advance(MEASURING)
            )
    for run, samples in zip(runs, written[1:], strict=True):
        run.samples, run.step_time = samples, step_times[run.shortcut]
    return Results(
        settings,
        Base(
            sum(parameter.numel() for parameter in base.parameters()),
            prose_losses,
            runs[0].curve.losses[0],
            written[0],
            base_milliseconds,
        ),
        runs,
        clock.seconds,
    )


def _save(base: nn.Module, folder: Path) -> None:
    """Save the model without the bar that Transformers would draw between ours."""
    from transformers.utils import logging as untyped

    logging: Any = untyped
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        base.save_pretrained(folder)  # type: ignore[operator]
    finally:
        if shown:
            logging.enable_progress_bar()


def _load(settings: Settings) -> _Data:
    prose, python = fine_tuning.prose(), fine_tuning.python_source()
    size, seed = (settings.batch, settings.sequence), settings.seed
    return _Data(
        fine_tuning.random_batches(prose.train, settings.pretraining_steps, *size, seed),
        fine_tuning.spread_batch(prose.held_out, settings.evaluation_sequences, settings.sequence),
        fine_tuning.random_batches(python.train, settings.finetuning_steps, *size, seed + 1),
        fine_tuning.spread_batch(python.held_out, settings.evaluation_sequences, settings.sequence),
        fine_tuning.random_batches(
            python.train, settings.calibration_batches, EVALUATION_BATCH, settings.sequence, seed + 2
        ),
    )


def _stages(settings: Settings) -> list[Stage]:
    """Weights as measured on two CPU cores."""
    evaluation = 0.6 * settings.evaluation_sequences / EVALUATION_BATCH
    finetuning = 0.85 + evaluation * settings.evaluations / settings.finetuning_steps
    statistics = 0.9 * settings.calibration_batches
    return [
        Stage(PRETRAINING, settings.pretraining_steps, 1.0),
        *(Stage(_title(shortcut), settings.finetuning_steps, finetuning) for shortcut in settings.runs),
        Stage(MERGING, len(settings.runs), statistics + 5 * evaluation),
        Stage(SAMPLING, 1 + len(settings.runs), 0.08 * settings.sample_bytes),
        Stage(MEASURING, settings.timing_rounds + 1, 0.9 * (1 + len(settings.runs))),
    ]


def _title(shortcut: Shortcut) -> str:
    return TITLES[shortcut] if shortcut == BASELINE else f"shortcut {TITLES[shortcut]}"


def _finetuned(
    model: nn.Module, shortcut: Shortcut, batches: _Data, settings: Settings, bars: Bars, lora: Run | None
) -> Run:
    name = _title(shortcut)
    curve = finetune(
        model,
        batches.python,
        batches.python_held_out,
        settings,
        lambda loss: bars.advance(name, f"evaluation loss {loss:.3f}"),
    )
    coverage = inspect(model)
    target = (lora.curve if lora is not None else curve).losses[-1]
    chains = {row.chain: row.chain_length for row in coverage.layers}
    return Run(shortcut, coverage.trainable_parameters, chains, curve, steps_to_reach(curve, target))


def _after_training(run: Run, model: nn.Module, base: nn.Module, batches: _Data, folder: Path, bars: Bars) -> None:
    statistics = gather_statistics(model, batches.calibration)
    evaluation = batches.python_held_out
    for method in methods_of(model):
        run.merges.append(measure_merge(model, method, statistics, evaluation, run.curve.losses[-1]))
    save_adapter(model, folder / "reslora")
    run.peft = compare_with_peft(model, base, folder / "peft", statistics, evaluation)
    bars.advance(MERGING, run.title)


def _samples(model: nn.Module, settings: Settings, bars: Bars) -> list[str]:
    written = generate(model, settings.sample_bytes, settings.sample_temperature, settings.seed)
    bars.advance(SAMPLING)
    return written

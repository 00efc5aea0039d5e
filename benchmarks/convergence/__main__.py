"""The command line of the convergence benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from benchmarks.convergence import bases, runs, step_times
from benchmarks.convergence.report import write_report
from benchmarks.convergence.settings import SETS, Experiments, Given, Sizes, of_given
from benchmarks.convergence.tasks import tasks_of
from benchmarks.convergence.tasks.kinds import Task

app = typer.Typer(add_completion=False, no_args_is_help=True)
COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="The runs' files; those there are not run again.")],
    name: Annotated[str, typer.Option("--set", help=f"One of {', '.join(SETS)}.")] = "quick",
    part: Annotated[
        str | None, typer.Option("--tasks", help="Of the set, separated by commas; all if not given.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, the processor's threads shared out.")] = 1,
    device: Annotated[str, typer.Option(help="As torch names it.")] = "cuda" if torch.cuda.is_available() else "cpu",
    kind: Annotated[str, typer.Option(help="With --model: decoder, encoder or unet.")] = "decoder",
    model: Annotated[str | None, typer.Option(help="A pre-trained model's folder or id, in place of a set.")] = None,
    data: Annotated[str | None, typer.Option(help="With --model: a file, a folder or an id; see README.md.")] = None,
    methods: Annotated[str, typer.Option(help="With --model.")] = "lora,input,block,middle",
    steps: Annotated[int, typer.Option(min=1, help="With --model.")] = 500,
    batch: Annotated[int, typer.Option(min=1, help="With --model: examples a step.")] = 8,
    sequence: Annotated[int, typer.Option(min=1, help="With --model: tokens at most, or pixels a side.")] = 512,
    held_out: Annotated[int, typer.Option(min=1, help="With --model: examples to measure on.")] = 256,
    rates: Annotated[str, typer.Option(help="With --model: learning rates to choose from.")] = "1e-4,3e-4,1e-3",
    seeds: Annotated[int, typer.Option(min=1, help="With --model.")] = 5,
    dtype: Annotated[str, typer.Option(help="With --model: float32, bfloat16 or float16.")] = "bfloat16",
) -> None:
    """Train every run of a set, or with a model and data of your own, that has no file yet, then write the report."""
    try:
        if (model is None) != (data is None):
            raise ValueError("--model and --data go together: give both, or neither for a --set")
        given = None
        if model is not None and data is not None:
            given = Given(kind=kind, model=model, data=data, dtype=dtype)
            experiments = of_given(
                given, methods=methods, steps=steps, batch=batch, sequence=sequence, held_out=held_out, rates=rates,
                seeds=seeds,
            )  # fmt: skip
        elif name in SETS:
            experiments = SETS[name]
        else:
            raise ValueError(f"--set must be one of {', '.join(SETS)}, got {name!r}")
        if part is not None:
            experiments = experiments.only(tuple(part.split(",")))
        tasks = tasks_of(given)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    out.mkdir(parents=True, exist_ok=True)
    with Progress(*COLUMNS, console=Console()) as progress:
        _train_all(experiments, tasks, given, out, device, jobs, progress)
        _time_steps(experiments, tasks, given, out, device, progress)
    Console().print(f"report: {write_report(out)}")


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A folder of runs.")]) -> None:
    """Write the report of a folder's runs."""
    Console().print(f"report: {write_report(folder)}")


def _train_all(
    experiments: Experiments, tasks: Mapping[str, Task], given: Given | None, out: Path, device: str, jobs: int,
    progress: Progress,
) -> None:  # fmt: skip
    bar = progress.add_task("pre-training", total=len(experiments.budgets))
    for name in experiments.budgets:
        _base(name, given, experiments.sizes[tasks[name].kind], out, device)
        progress.advance(bar)
    one = partial(_one_run, experiments, given, out, device)
    threads = max(1, torch.get_num_threads() // jobs)
    for title, tuning in (("learning rates", True), ("final runs", False)):
        todo = runs.missing(experiments, tasks, out, tuning=tuning)
        bar = progress.add_task(title, total=len(todo))
        for spec in _done(one, todo, jobs, threads):
            progress.update(bar, advance=1, description=f"{title}: {spec.task}, {spec.method}")


def _done(one: Callable[[runs.Spec], runs.Spec], todo: list[runs.Spec], jobs: int, threads: int) -> Iterator[runs.Spec]:
    """Each run as it is done."""
    if jobs == 1:
        yield from map(one, todo)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        for future in as_completed([pool.submit(one, spec) for spec in todo]):
            yield future.result()


def _one_run(experiments: Experiments, given: Given | None, out: Path, device: str, spec: runs.Spec) -> runs.Spec:
    task = tasks_of(given)[spec.task]
    base = _base(spec.task, given, experiments.sizes[task.kind], out, device)
    runs.write(runs.train_one(base, task, experiments, spec), spec.file(out))
    return spec


@cache
def _base(name: str, given: Given | None, sizes: Sizes, out: Path, device: str) -> nn.Module:
    """A process's own copy; runs adapt copies of it."""
    return bases.base_of(tasks_of(given)[name], sizes, out, torch.device(device))


def _time_steps(
    experiments: Experiments, tasks: Mapping[str, Task], given: Given | None, out: Path, device: str,
    progress: Progress,
) -> None:  # fmt: skip
    bar = progress.add_task("step times", total=step_times.ROUNDS * len(experiments.budgets))
    for i, name in enumerate(experiments.budgets, 1):
        base = _base(name, given, experiments.sizes[tasks[name].kind], out, device)
        step_times.measure(base, tasks[name], name, experiments, out, partial(progress.advance, bar))
        progress.update(bar, completed=step_times.ROUNDS * i)


if __name__ == "__main__":
    app()

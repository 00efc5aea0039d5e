"""The command line of the convergence benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.convergence.report import write_report
from benchmarks.convergence.sets import of_given, train_all
from benchmarks.convergence.settings import SETS, Given, R
from benchmarks.convergence.tasks import tasks_of
from benchmarks.convergence.tasks.kinds import say

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="The folder of the runs; those there are not run again.")],
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
    r: Annotated[int, typer.Option(min=1, help="With --model: the rank of every method's adapters.")] = R,
    evaluations: Annotated[int, typer.Option(min=1, help="With --model: of a run, the last at its end.")] = 6,
    generated: Annotated[int, typer.Option(min=1, help="With --model: held-out examples to generate for.")] = 64,
    merged_seeds: Annotated[int | None, typer.Option(min=0, help="With --model: first seeds to merge; all.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="With --model: bfloat16, float16 or float32; by default the last on a CPU.")
    ] = None,
) -> None:
    """Train every run of a set, or with a model and data of your own, that --out lacks, then write the report."""
    try:
        if (model is None) != (data is None):
            raise ValueError("--model and --data go together: give both, or neither for a --set")
        given = None
        if model is not None and data is not None:
            usual = "float32" if torch.device(device).type == "cpu" else "bfloat16"
            given = Given(kind=kind, model=model, data=data, dtype=dtype or usual, r=r)
            experiments = of_given(
                given, methods=methods, steps=steps, batch=batch, sequence=sequence, held_out=held_out, rates=rates,
                seeds=seeds, evaluations=evaluations, generated=generated, merged_seeds=merged_seeds,
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
    train_all(experiments, tasks, given, out, device, jobs)
    say(f"report: {write_report(out)}")


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A folder of runs.")]) -> None:
    """Write the report of a folder's runs."""
    say(f"report: {write_report(folder)}")


if __name__ == "__main__":
    app()

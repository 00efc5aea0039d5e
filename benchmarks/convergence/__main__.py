"""The command line of the convergence benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.convergence import runs
from benchmarks.convergence.report import write_report
from benchmarks.convergence.settings import SETS

app = typer.Typer(add_completion=False, no_args_is_help=True)
Folder = Annotated[Path, typer.Option("--out", help="The runs' files; those there are not run again.")]


@app.command()
def run(
    out: Folder,
    name: Annotated[str, typer.Option("--set", help=f"One of {', '.join(SETS)}.")] = "quick",
) -> None:
    """Train every run of a set that has no file yet, then write the report."""
    if name not in SETS:
        raise typer.BadParameter(f"must be one of {', '.join(SETS)}, got {name!r}", param_hint="--set")
    budget, console = SETS[name], Console()
    out.mkdir(parents=True, exist_ok=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("pre-training", total=None)
        base = runs.base_model(budget, out)
        for stage in ("learning rates", "final runs"):
            rates = None if stage == "learning rates" else runs.best_rates(budget, out)
            todo = runs.missing(budget, out, rates)
            progress.reset(bar, total=len(todo), description=stage)
            for spec in todo:
                progress.update(bar, description=f"{stage}: {spec.task}, {spec.method}")
                runs.write(runs.train_one(base, budget, spec), spec.file(out))
                progress.advance(bar)
    console.print(f"report: {write_report(out)}")


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A folder of runs.")]) -> None:
    """Write the report of a folder's runs."""
    Console().print(f"report: {write_report(folder)}")


if __name__ == "__main__":
    app()

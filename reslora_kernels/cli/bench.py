"""The options of ``reslora bench`` and its verbs ``compare`` and ``report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from reslora_kernels.bench import cases, providers
from reslora_kernels.bench.experts import EXPERTS_SETS
from reslora_kernels.bench.host import HOST_SETS
from reslora_kernels.bench.model_cases import MODEL_SETS
from reslora_kernels.bench.session import Settings, run_session
from reslora_kernels.cli.options import torch_device
from reslora_kernels.cli.output import check_writable

DEFAULT_SETS = ("standard", "small-m", "models", "pre-num", "growth", "compiled")
QUICK_SETS = ("quick", "models", "growth")
REPOSITORY_RESULTS = Path("benchmarks") / "results"

application = typer.Typer(add_completion=False, invoke_without_command=True)


@application.callback()
def bench(
    context: typer.Context,
    quick: Annotated[
        bool, typer.Option("--quick", help="The set quick and small models: under two minutes on two CPU cores.")
    ] = False,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="A named set of cases (see --list). May be repeated.")
    ] = None,
    provider: Annotated[
        list[str] | None, typer.Option("--provider", help="Only this one, beside frozen. May be repeated.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--out", "--output", help="A .json file, or the folder for it; a CSV goes beside it.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto (a GPU if there is one), cpu or cuda.")] = "auto",
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="At most so many rounds in a case.")] = 200,
    seconds: Annotated[float, typer.Option("--seconds", min=0.01, help="At most about so long in a case.")] = 5.0,
    budget: Annotated[
        float | None, typer.Option("--budget-seconds", min=1, help="Begin no case after this; what is done is kept.")
    ] = None,
    hang: Annotated[
        float | None, typer.Option("--hang-seconds", min=1, help="End the run where one case takes longer: it hangs.")
    ] = None,
    list_all: Annotated[bool, typer.Option("--list", help="List providers and sets, and exit.")] = False,
) -> None:
    """Measure speed, memory and accuracy of layers and models against their peers on this machine.

    Writes JSON and CSV, whole at every moment. Verbs: compare OLD NEW, report RESULT.
    """
    if context.invoked_subcommand is not None:
        return
    where = torch_device(device)
    if list_all:
        show_names(Console(), where)
        return
    names = sets or (QUICK_SETS if quick else DEFAULT_SETS)
    settings = Settings(tuple(dict.fromkeys(names)), quick, rounds, seconds, budget, hang)
    settings.tasks(where.type == "cuda")  # an unknown set is refused before any work
    chosen = providers.chosen(provider)
    run_session(settings, chosen, where, *destination(output), Console(), Console(stderr=True))


@application.command()
def compare(
    old: Annotated[Path, typer.Argument(help="A result file.")],
    new: Annotated[Path, typer.Argument(help="A later one.")],
    threshold: Annotated[
        float, typer.Option("--threshold", min=0.0, help="Smaller changes never count, whatever the noise.")
    ] = 0.03,
) -> None:
    """Print what got slower than the noise explains. The exit status is 1 if anything did."""
    from reslora_kernels.bench import comparison, results

    found = comparison.compare(results.read(old), results.read(new), threshold)
    comparison.show(found, Console())
    if found.worse:
        raise typer.Exit(1)


@application.command()
def report(
    result: Annotated[Path, typer.Argument(help="A result file.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for report.html and the figures. Not given: beside the result.")
    ] = None,
) -> None:
    """Draw a result file as one HTML file that needs nothing else, and its figures as PNG."""
    from reslora_kernels.bench import results
    from reslora_kernels.bench.report import write_report

    folder = out if out is not None else result.with_suffix("")
    check_writable("--out", folder)
    written = write_report(results.read(result), folder)
    Console().print("Written:", *map(str, written), sep="\n  ", soft_wrap=True, highlight=False)


def destination(output: Path | None) -> tuple[Path, str | None]:
    """(folder, file name or None for the default name) of the result.

    Raises:
        OSError: it cannot be written there.
    """
    if output is None:
        output = REPOSITORY_RESULTS if REPOSITORY_RESULTS.is_dir() else Path("reslora-bench")
    folder, name = (output.parent, output.name) if output.suffix == ".json" else (output, None)
    check_writable("--out", folder)
    if name is not None and output.is_dir():
        raise IsADirectoryError(f"--out {str(output)!r} is a folder")
    return folder, name


def show_names(console: Console, device: torch.device) -> None:
    """What ``--provider`` and ``--set`` take, and what is missing here."""
    table = Table(title="Providers", title_justify="left")
    for heading in ("name", "what it is", "here"):
        table.add_column(heading, overflow="fold")
    for provider in providers.PROVIDERS.values():
        case = cases.Case(1, 1, 1, p=provider.least_p, compiled=cases.METHODS)
        table.add_row(provider.name, provider.about, provider.missing(case, cases.LORA, device) or "yes")
    console.print(table)
    table = Table(title="Sets", title_justify="left")
    for heading in ("name", "cases", "what is in it"):
        table.add_column(heading, overflow="fold")
    gpu = device.type == "cuda"
    for name, make in cases.SETS.items():
        table.add_row(name, str(len(make(gpu))), " ".join((make.__doc__ or "").split()))
    for name, choose in (MODEL_SETS | HOST_SETS | EXPERTS_SETS).items():
        table.add_row(name, str(len(choose(gpu, False))), " ".join((choose.__doc__ or "").split()))
    console.print(table)

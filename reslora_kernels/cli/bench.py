"""``reslora bench``: its options, one run (sets in order, one bar over all cases, results after each), its verbs."""

from __future__ import annotations

import faulthandler
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from reslora_kernels.bench import cases, providers, results, timing
from reslora_kernels.bench.cases import SETS, Case
from reslora_kernels.bench.host import EXPERTS_SETS, HOST_SETS, ExpertsCase, HostCase, run_experts, run_host
from reslora_kernels.bench.model_cases import MODEL_SETS, ModelCase
from reslora_kernels.bench.models import run_model
from reslora_kernels.bench.providers import Provider
from reslora_kernels.bench.report import compare_results, show_comparison, show_result, write_report
from reslora_kernels.bench.suite import Bench, run_case
from reslora_kernels.bench.timing import DeviceLostError, clock_of, measure_rates, one_line
from reslora_kernels.cli.options import out_option, torch_device
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
        Path | None, out_option("A .json file, or the folder for it; a CSV goes beside it.", "--output")
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
    found = compare_results(results.read(old), results.read(new), threshold)
    show_comparison(found, Console())
    if found.worse:
        raise typer.Exit(1)


@application.command()
def report(
    result: Annotated[Path, typer.Argument(help="A result file.")],
    out: Annotated[
        Path | None, out_option("Folder for report.html and the figures. Not given: beside the result.")
    ] = None,
) -> None:
    """Draw a result file as one HTML file that needs nothing else, and its figures as PNG."""
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
    if name is not None:
        _refuse_foreign(output)
    return folder, name


def _refuse_foreign(output: Path) -> None:
    """OSError if what is at ``output``, or the CSV beside it, is no earlier run's."""
    if output.exists():
        try:
            results.read(output)
        except ValueError:
            raise FileExistsError(f"--out {str(output)!r} is no result of an earlier run; give another name") from None
    elif output.with_suffix(".csv").exists():
        raise FileExistsError(f"--out {str(output)!r} would replace {output.with_suffix('.csv').name!r} beside it")


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


class Bar:
    """Advances by one case at a time; ``note`` says what the current one is at."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task("cases", total=total, note="")
        self._case = ""

    def begin(self, case: str) -> None:
        self._case = case
        self.note("")

    def note(self, text: str) -> None:
        self._progress.update(self._task, note=escape(": ".join(part for part in (self._case, text) if part)))

    def advance(self) -> None:
        self._progress.update(self._task, advance=1)


@contextmanager
def show_bar(total: int, console: Console) -> Iterator[Bar]:
    """A bar that lives as long as the ``with`` block."""
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with Progress(*columns, console=console, speed_estimate_period=600, transient=True) as progress:
        yield Bar(progress, total)


QUICK_SECONDS, QUICK_ROUNDS = 2.5, 25
Task = Case | ModelCase | HostCase | ExpertsCase


@dataclass(frozen=True)
class Settings:
    """``seconds`` and ``rounds`` bound one case, ``budget_seconds`` the whole run; sets in the order of importance.

    A case that takes longer than ``hang_seconds`` hangs: it ends the process.
    """

    sets: tuple[str, ...]
    quick: bool = False
    rounds: int = 200
    seconds: float = 5.0
    budget_seconds: float | None = None
    hang_seconds: float | None = None

    def plan(self) -> timing.Plan:
        if self.quick:
            return timing.Plan(most=min(self.rounds, QUICK_ROUNDS), least=5, seconds=min(self.seconds, QUICK_SECONDS))
        return timing.Plan(most=self.rounds, least=min(10, self.rounds), seconds=self.seconds)

    def tasks(self, gpu: bool) -> list[tuple[str, Task]]:
        """What to measure, set by set, but for cases that an earlier one covers.

        Raises:
            ValueError: there is no such set.
        """
        tasks: list[tuple[str, Task]] = []
        for name in self.sets:
            if name in MODEL_SETS:
                tasks += [(name, case) for case in MODEL_SETS[name](gpu, self.quick)]
            elif name in HOST_SETS:
                tasks += [(name, case) for case in HOST_SETS[name](gpu, self.quick)]
            elif name in EXPERTS_SETS:
                tasks += [(name, case) for case in EXPERTS_SETS[name](gpu, self.quick)]
            elif name in SETS:
                done = [case for _, case in tasks if isinstance(case, Case)]
                tasks += [(name, case) for case in SETS[name](gpu) if not any(one.covers(case) for one in done)]
            else:
                raise ValueError(
                    f"unknown set {name!r}; the sets are {', '.join([*SETS, *MODEL_SETS, *HOST_SETS, *EXPERTS_SETS])}"
                )
        return tasks


def run_session(
    settings: Settings,
    providers: Sequence[Provider],
    device: torch.device,
    folder: Path,
    name: str | None,
    console: Console,
    progress: Console,
) -> results.Result:
    """Measure, write as it goes, print a table.

    Raises:
        RuntimeError: the GPU was lost; what was measured before is in the file, which the message names.
    """
    started = time.monotonic()
    result = results.new_result(device, asdict(settings))
    result.providers = {provider.name: provider.about for provider in providers}
    path = folder / name if name is not None else results.default_path(result, folder)
    try:
        _measure(settings, providers, device, result, path, progress, started)
    except KeyboardInterrupt:
        result.stopped = "interrupted"
        raise typer.Exit(130) from None
    except Exception as error:  # raised again: what was measured is written first, and says why it stopped
        result.stopped = one_line(error)
        if isinstance(error, DeviceLostError):
            kept = len(result.measurements) + len(result.models)
            raise RuntimeError(f"{error}; the {kept} results before that are in {path}") from None
        raise
    finally:
        result.seconds = round(time.monotonic() - started, 1)
        result.write(path)
        show_result(result, console)
        console.print(f"Written: {path} and {path.with_suffix('.csv').name}", soft_wrap=True, highlight=False)
    return result


def _measure(
    settings: Settings,
    providers: Sequence[Provider],
    device: torch.device,
    result: results.Result,
    path: Path,
    progress: Console,
    started: float,
) -> None:
    deadline = started + settings.budget_seconds if settings.budget_seconds is not None else math.inf
    tasks = settings.tasks(device.type == "cuda")
    with show_bar(len(tasks), progress) as bar:
        bar.begin("this machine's rates")
        dtypes = sorted({case.dtype for _, case in tasks if isinstance(case, Case)})
        rates = measure_rates(dtypes, device, clock_of(device))
        result.rates = asdict(rates)
        bench = Bench.on(device, settings.plan(), rates, deadline)
        for set_name, case in tasks:
            if time.monotonic() >= deadline:
                result.stopped = f"budget of {settings.budget_seconds:g} s used up"
                return
            bar.begin(f"{set_name} {case}")
            if settings.hang_seconds is not None:
                faulthandler.dump_traceback_later(settings.hang_seconds, exit=True, file=sys.__stderr__ or sys.stderr)
            if isinstance(case, Case):
                result.measurements += run_case(bench, set_name, case, providers, bar.note)
            elif isinstance(case, HostCase):
                result.measurements += run_host(bench, case, bar.note)
            elif isinstance(case, ExpertsCase):
                result.measurements += run_experts(bench, case, bar.note)
            else:
                result.models += run_model(bench, case, bar.note)
            faulthandler.cancel_dump_traceback_later()
            result.seconds = round(time.monotonic() - started, 1)
            result.write(path)
            bar.advance()

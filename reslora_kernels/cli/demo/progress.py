"""Progress bars with the time left: one for each stage, and one for everything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


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

"""One bar over all cases with the time left, and what is going on beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


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

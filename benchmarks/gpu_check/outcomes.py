"""A plugin of pytest: what each test came to, one line of JSON, as soon as it is known. Who is in the file is not run.

python -m pytest -p benchmarks.gpu_check.outcomes ..., with the file's path in RESLORA_TEST_OUTCOMES. So a process that
goes on behind a test that hung, or took the last one down with it, is started by the same command. A process whose GPU
answers no more ends itself.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

VARIABLE = "RESLORA_TEST_OUTCOMES"
PASSED, FAILED, SKIPPED, ENDED = KINDS = ("passed", "failed", "skipped", "hung or crashed")
LOST = 70  # exit status of a process that lost its GPU


class Test(NamedTuple):
    """What a test came to; ENDED as long as nothing is known but that it began."""

    outcome: str
    why: str


def read(path: Path) -> dict[str, Test]:
    """Each test that has begun, by its name; empty where there is no file."""
    tests: dict[str, Test] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        entry = json.loads(line)
        test = Test(entry.get("outcome", ENDED), entry.get("why", "it did not come back"))
        known = tests.get(entry["test"])
        if known is None or known.outcome != FAILED:  # what fails at its end, too, has failed
            tests[entry["test"]] = test
    return tests


def forget_running(path: Path) -> None:
    """The last test that began and did not end had no time: it is not to blame."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    if lines and "outcome" not in json.loads(lines[-1]):
        path.write_text("".join(f"{line}\n" for line in lines[:-1]), encoding="utf-8")


def _add(**entry: str) -> None:
    with open(os.environ[VARIABLE], "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    done = read(Path(os.environ[VARIABLE]))
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = [item for item in items if item.nodeid not in done]


def pytest_runtest_logstart(nodeid: str) -> None:
    _add(test=nodeid)


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != PASSED:
        why = report.longrepr if isinstance(report.longrepr, tuple) else str(report.longreprtext).splitlines()
        _add(test=report.nodeid, outcome=report.outcome, why=_gist(map(str, why))[:300])
    if report.outcome == FAILED and not _gpu_answers():
        os._exit(LOST)


def _gist(lines: Iterable[str]) -> str:
    """Of pytest's report the first line that says what is wrong, or the last of all: why a test was skipped."""
    every = list(lines)
    said = [line.removeprefix("E").strip() for line in every if line.startswith("E ")]
    return (said[:1] or every[-1:] or [""])[0]


def _gpu_answers() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True

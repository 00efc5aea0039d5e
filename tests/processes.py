"""Child processes of the tests: ended when they stand still or never end, however slow a busy machine makes them.

No deadline is a time on the clock. What works uses processor time, however little of it a loaded machine gives; what
waits for something that will not come uses none; what spins uses more than any test needs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

REPOSITORY = Path(__file__).parents[1]
LOOK = 2.0  # seconds between two looks at the processes
STILL = 120.0  # seconds over which a process that works uses at least WORK of processor time
WORK = 0.2
SPENT = 1500.0  # seconds of processor time that no test needs


def environment(**changes: str) -> dict[str, str]:
    """For processes that share a small machine: one thread each, no network."""
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **quiet, "PYTHONPATH": str(REPOSITORY), **changes}


def run(
    command: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    input: str | None = None,
    check: bool = False,
) -> subprocess.CompletedProcess[str]:
    """``subprocess.run`` with both outputs as text; AssertionError with the output so far if it had to be ended."""
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(command, cwd=cwd, env=env, text=True, **pipes)
    watch = Watch([process])
    while True:
        try:
            out, err = process.communicate(input, timeout=LOOK)
        except subprocess.TimeoutExpired:
            input = None  # what is not written yet is remembered
            reason = watch.reason_to_end()
            if reason:
                end([process])
                out, err = process.communicate()
                raise AssertionError(f"{reason}: {command}\n{out[-4000:]}\n{err[-4000:]}") from None
        else:
            finished = subprocess.CompletedProcess(command, process.returncode, out, err)
            assert not check or finished.returncode == 0, f"{command}\n{out[-4000:]}\n{err[-4000:]}"
            return finished


def run_ranks(module: str, folder: Path, count: int = 2, **changes: str) -> list[Report]:
    """Run ``python -m module folder`` as ranks 0 to count - 1; what each found, as far as they came."""
    processes, logs = [], []
    for rank in range(count):
        logs.append(folder / f"log.{rank}")
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # accelerate asks, but uses our group
        env = environment(**place, **changes)
        with logs[-1].open("w") as log:
            command = [sys.executable, "-m", module, str(folder)]
            processes.append(subprocess.Popen(command, cwd=REPOSITORY, env=env, stdout=log, stderr=log))
    watch, reason = Watch(processes), ""
    try:
        for process in processes:
            while not reason and not ended(process):
                reason = watch.reason_to_end()
    finally:
        end(processes)
    codes = [process.returncode for process in processes]
    trouble = reason or (f"exit codes {codes}" if any(codes) else "")
    written = "\n".join(log.read_text()[-4000:] for log in logs)
    return [Report(folder / f"report.{rank}.json", f"{trouble}\n{written}" if trouble else "") for rank in range(count)]


class Report(dict[str, dict[str, Any]]):
    """What one rank wrote, by the name of the scenario; asked for one that it never came to, it says what happened."""

    def __init__(self, path: Path, trouble: str) -> None:
        super().__init__(json.loads(path.read_text()) if path.exists() else {})
        self.trouble = trouble

    def __missing__(self, name: str) -> dict[str, Any]:
        return {"traceback": f"it never came to {name!r}: {self.trouble}"}


class Watch:
    """Whether processes and their children still work; a launcher that only looks after its children does not count."""

    def __init__(self, processes: Sequence[subprocess.Popen[Any]]) -> None:
        self.processes = processes
        self.used: dict[int, float] = {}
        self.since, self.worked = time.monotonic(), 0.0

    def reason_to_end(self) -> str:
        """Why they are to be ended now; empty while they work."""
        now = time.monotonic()
        for process in leaves(self.processes):
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                self.used[process.pid] = times.user + times.system
        worked = sum(self.used.values())
        if worked > SPENT:
            return f"no end after {worked:.0f} s of processor time"
        if worked - self.worked > WORK:
            self.since, self.worked = now, worked
        if now - self.since > STILL:
            return f"it has stood still for {STILL:.0f} s"
        return ""


def ended(process: subprocess.Popen[Any]) -> bool:
    """Whether it ends before the next look."""
    try:
        process.wait(LOOK)
    except subprocess.TimeoutExpired:
        return False
    return True


def descendants(processes: Iterable[subprocess.Popen[Any]]) -> list[psutil.Process]:
    """The processes that still run and all that they started."""
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.poll() is None:
                root = psutil.Process(process.pid)
                found += [root, *root.children(recursive=True)]
    return found


def leaves(processes: Iterable[subprocess.Popen[Any]]) -> list[psutil.Process]:
    """Those of them that started none."""
    found, parents = descendants(processes), set()
    for each in found:
        with suppress(psutil.NoSuchProcess):
            parents.add(each.ppid())
    return [each for each in found if each.pid not in parents]


def end(processes: Sequence[subprocess.Popen[Any]]) -> None:
    """Kill them and all that they started."""
    for each in descendants(processes):
        with suppress(psutil.NoSuchProcess):
            each.kill()
    for process in processes:
        process.wait()


def run_command(command: Sequence[str], **env: str) -> str:
    """Run a launcher (torchrun, accelerate) to its end; what it printed."""
    finished = run(command, cwd=REPOSITORY, env=environment(**env), check=True)
    return finished.stdout + finished.stderr

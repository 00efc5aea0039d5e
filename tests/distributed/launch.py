"""Starts a few processes of one module, gathers what each of them reports, and ends them if they hang."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
Report = dict[str, dict[str, Any]]


def environment(**changes: str) -> dict[str, str]:
    """For processes that share a small machine: one thread each, no network."""
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **quiet, "PYTHONPATH": str(REPOSITORY), **changes}


def run_processes(module: str, folder: Path, count: int = 2, timeout: float = 150, **changes: str) -> list[Report]:
    """Run ``python -m module folder`` as ranks 0 to count - 1; what each wrote to ``folder/report.<rank>.json``."""
    processes, logs = [], []
    for rank in range(count):
        logs.append(folder / f"log.{rank}")
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # accelerate asks, but uses our group
        env = environment(**place, **changes)
        with logs[-1].open("w") as log:
            command = [sys.executable, "-m", module, str(folder)]
            processes.append(subprocess.Popen(command, cwd=REPOSITORY, env=env, stdout=log, stderr=log))
    deadline = time.monotonic() + timeout
    try:
        for process in processes:
            process.wait(max(deadline - time.monotonic(), 0.1))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any(process.returncode for process in processes):
        raise AssertionError([p.returncode for p in processes], *(log.read_text()[-4000:] for log in logs))
    return [json.loads((folder / f"report.{rank}.json").read_text()) for rank in range(count)]


def run_command(command: list[str], timeout: float = 300, **env: str) -> str:
    """Run a launcher (torchrun, accelerate) to its end; its output. It is stopped with its children if it hangs."""
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=environment(**env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # launchers end their workers on SIGTERM
        output, _ = process.communicate(timeout=30)
        raise AssertionError(f"no end within {timeout} s:\n{output[-4000:]}") from None
    assert process.returncode == 0, output[-6000:]
    return output

"""The parts of the check. Each is a child process with a time limit: a fault on the GPU ends that part alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
PASSED, FAILED, SKIPPED, UNFINISHED = "passed", "failed", "skipped", "ran out of time"
GRACE = 20.0  # seconds that a child has to write its report after it was interrupted
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# torch.compile's set is last: compiling takes long.
SETS = ("standard", "lorafusion-coarse", "small-m", "models", "pre-num", "dtypes", "ranks", "growth", "lorafusion")
SETS += ("compiled",)


@dataclass(frozen=True)
class Finished:
    """``status`` of a child process, None if it was stopped at its limit; the end of what it wrote."""

    status: int | None
    output: str
    seconds: float


class Runner(Protocol):
    def __call__(self, command: Sequence[str], limit: float, **environment: str) -> Finished: ...


@dataclass
class Outcome:
    """What a part found; ``details`` go to the result file."""

    status: str
    summary: str
    details: dict[str, Any] = field(default_factory=dict)


def run_child(command: Sequence[str], limit: float, **environment: str) -> Finished:
    """Run a command in the repository; at its limit it is interrupted, then killed. Output goes to the terminal too."""
    started = time.monotonic()
    tail: list[str] = []
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environment, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    watcher = _Watch(process, limit)
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        tail = [*tail, line][-60:]
    process.wait()
    watcher.stop()
    status = None if watcher.expired else process.returncode
    return Finished(status, "".join(tail), time.monotonic() - started)


class _Watch:
    """Interrupts a process group at its limit and kills it if that does not help."""

    def __init__(self, process: subprocess.Popen[str], limit: float) -> None:
        self.expired = False
        self._process = process
        self._timers = [
            threading.Timer(max(1.0, limit), self._signal, [signal.SIGINT]),
            threading.Timer(max(1.0, limit) + GRACE, self._signal, [signal.SIGKILL]),
        ]
        for timer in self._timers:
            timer.daemon = True
            timer.start()

    def _signal(self, number: int) -> None:
        self.expired = True
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)

    def stop(self) -> None:
        for timer in self._timers:
            timer.cancel()


def build(run: Runner, limit: float) -> Outcome:
    """The CUDA extension for this GPU, beside the sources; where it cannot be built the others go on without."""
    if shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").is_file():
        return Outcome(SKIPPED, "nvcc is not installed (it comes with the CUDA toolkit)")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    finished = run([*command, "--editable", str(ROOT)], limit, RESLORA_CUDA="1")
    if finished.status is None:
        return Outcome(UNFINISHED, "")
    done = finished.status == 0
    return Outcome(PASSED if done else FAILED, f"{finished.seconds:.0f} s" if done else last_line(finished.output))


def correctness(run: Runner, limit: float) -> Outcome:
    """Tests marked gpu, then all other tests of the kernels, which run on the GPU where there is one."""
    started, totals, faults = time.monotonic(), {"passed": 0, "failed": 0, "skipped": 0}, []
    finished_all = True
    selections = [
        ("-m", "gpu", "tests/kernels", "tests/test_gpu.py"),
        ("-m", "not gpu", "tests/kernels", "--ignore=tests/kernels/test_compile_contract.py"),
    ]
    for selection in selections:
        left = limit - (time.monotonic() - started)
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
            command += selection
            finished = run(command, max(1.0, left - GRACE))
            found = read_junit(report)
        for name in totals:
            totals[name] += found[name]
        faults += found["faults"]
        finished_all = finished_all and finished.status is not None
        if finished.status not in (0, 1, 5, None) or (finished.status == 0 and not found["read"]):
            faults.append(f"pytest ended with status {finished.status}: {last_line(finished.output)}")
    summary = f"{totals['passed']} passed, {totals['failed']} failed, {totals['skipped']} skipped"
    status = FAILED if totals["failed"] or faults else PASSED if finished_all and totals["passed"] else UNFINISHED
    return Outcome(status, summary, {**totals, "faults": faults[:50]})


def read_junit(path: Path) -> dict[str, Any]:
    """Counts and the names of what failed, from pytest's report; ``read`` is False where there is none."""
    found: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "faults": [], "read": path.is_file()}
    if not path.is_file():
        return found
    for case in ElementTree.parse(path).iter("testcase"):
        fault = case.find("failure") if case.find("failure") is not None else case.find("error")
        if fault is not None:
            found["failed"] += 1
            found["faults"].append(f"{case.get('classname')}.{case.get('name')}: {(fault.get('message') or '')[:300]}")
        else:
            found["skipped" if case.find("skipped") is not None else "passed"] += 1
    return found


def sanitizer(run: Runner, limit: float) -> Outcome:
    """compute-sanitizer's four tools on every kernel, on small shapes."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).is_file():
        return Outcome(SKIPPED, "compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    script = [sys.executable, "-m", "benchmarks.gpu_check.small_launches"]
    started = time.monotonic()
    plain = run(script, limit)  # compiles every kernel, so that the tools watch kernels and not a compiler
    if plain.status != 0:
        return Outcome(FAILED if plain.status else UNFINISHED, f"without a tool: {last_line(plain.output)}")
    found: dict[str, str] = {}
    for name in TOOLS:
        left = limit - (time.monotonic() - started)
        if left < 5:
            found[name] = UNFINISHED
            continue
        command = [tool, f"--tool={name}", "--error-exitcode=9", "--print-limit=5", *script]
        # Without torch's cache every tensor is an allocation of its own, whose bounds the tool knows.
        finished = run(command, left, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        found[name] = _verdict(finished)
    bad = {name: verdict for name, verdict in found.items() if verdict not in (PASSED, UNFINISHED)}
    status = FAILED if bad else PASSED if all(v == PASSED for v in found.values()) else UNFINISHED
    return Outcome(status, ", ".join(f"{name} {verdict}" for name, verdict in found.items()), {"tools": found})


def _verdict(finished: Finished) -> str:
    if finished.status is None:
        return UNFINISHED
    if finished.status == 0:
        return PASSED
    errors = re.findall(r"ERROR SUMMARY: (\d+) error", finished.output)
    return f"{errors[-1]} errors" if errors else f"status {finished.status}: {last_line(finished.output)}"


def speed(run: Runner, limit: float, sets: Sequence[str] = SETS, device: str = "cuda") -> Outcome:
    """The sets of ``reslora bench``, most important first, for as long as there is time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speed.json"
        command = [sys.executable, "-m", "reslora_kernels", "bench", f"--device={device}", f"--output={path}"]
        command += [part for name in sets for part in ("--set", name)]
        command += ["--seconds=2", f"--budget-seconds={max(1.0, limit - 30):.0f}"]
        finished = run(command, limit, COLUMNS="120")
        result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if result is None:
        return Outcome(FAILED, f"no result: {last_line(finished.output)}")
    rows = result["measurements"] + result["models"]
    wrong = [row for row in rows if row["provider"].startswith("ours") and row["status"] in ("refused", "failed")]
    timed = sum(row["status"] == "timed" for row in rows)
    summary = f"{timed} figures of {len({row['case'] for row in result['measurements']})} cases"
    summary += f", {len({row['model'] for row in result['models']})} models"
    if wrong:
        first = wrong[0]
        name = f"{first['provider']} {first['method']}"
        summary += f"; {len(wrong)} of ours refused or failed, first {name}: {first['reason']}"
    broke = finished.status not in (0, None)
    summary += f"; ended with status {finished.status}: {last_line(finished.output)}" if broke else ""
    return Outcome(FAILED if wrong or broke else PASSED if timed else UNFINISHED, summary, {"result": result})


def hopper(run: Runner, limit: float) -> Outcome:
    """The Hopper kernels: right or not, and how far from the goals."""
    probe = "import torch; from reslora_kernels.backends import cuda, hopper; raise SystemExit("
    probe += "cuda.unavailable_reason() or hopper.unavailable_reason(cuda._extension(), torch.device('cuda')))"
    if (asked := run([sys.executable, "-c", probe], limit)).status != 0:
        return Outcome(SKIPPED, last_line(asked.output))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "hopper.json"
        command = ["benchmarks.gpu_check.hopper", f"--output={path}"]
        finished, found = _step_by_step(run, command, path, limit - asked.seconds)
    status = UNFINISHED if finished.status is None else PASSED if finished.status == 0 else FAILED
    said = "; ".join([*map(": ".join, found.get("wrong", {}).items()), last_line(finished.output)])
    return Outcome(FAILED if found.get("wrong") else status, said[:300], {"hopper": found} if found else {})


def _step_by_step(run: Runner, command: Sequence[str], path: Path, limit: float) -> tuple[Finished, dict[str, Any]]:
    """A module that writes its ``Steps`` to ``path``; where one of them ended it, again, without what hung there."""
    started, found = time.monotonic(), {}
    while True:
        left, before = limit - (time.monotonic() - started), found
        finished = run([sys.executable, "-m", *command, f"--budget-seconds={max(1.0, left - 30):.0f}"], left)
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        stopped = finished.status not in (0, None) and found.get("running") and found != before
        if not stopped or limit - (time.monotonic() - started) < 2 * GRACE:
            return finished, found


def tune(run: Runner, limit: float) -> Outcome:
    """Every form and tile for the table of measured choices, ``reslora_kernels/tuning/measured.json``.

    What was measured before a fault is kept.
    """
    kept = ROOT / "reslora_kernels" / "kernels" / "measured.json"
    before = kept.read_text(encoding="utf-8") if kept.is_file() else "{}"
    with tempfile.TemporaryDirectory() as folder:
        path, steps = Path(folder) / "measured.json", Path(folder) / "steps.json"
        path.write_text(before, encoding="utf-8")
        finished, found = _step_by_step(run, ["benchmarks.tune", f"--output={path}", f"--steps={steps}"], steps, limit)
        after = path.read_text(encoding="utf-8")
    said = "; ".join([last_line(finished.output), *(f"without {name}" for name in found.get("wrong", {}))])
    if after == before:
        return Outcome(UNFINISHED if finished.status is None else FAILED, said)
    kept.write_text(after, encoding="utf-8")
    status = FAILED if finished.status else PASSED
    return Outcome(status, said[:300], {"measured": json.loads(after), "wrong": found.get("wrong", {})})


def last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it wrote nothing"

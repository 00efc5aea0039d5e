"""The parts of the check. Each is a child process with a time limit: a fault on the GPU ends that part alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from benchmarks.gpu_check import outcomes, small_launches

ROOT = Path(__file__).parents[2]
PASSED, FAILED, SKIPPED, UNFINISHED = "passed", "failed", "skipped", "ran out of time"
GRACE = 20.0  # seconds that a child has to write its report after it was interrupted
# By what would be learnt, what may take the GPU along last; each file is run in a process of its own.
TEST_FILES = (
    "tests/kernels/test_cuda_backend.py", "tests/kernels/test_triton_backend.py", "tests/kernels/test_on_gpu.py",
    "tests/kernels/test_hopper_choice.py", "tests/kernels/test_hopper.py",
)  # fmt: skip
TEST_SECONDS = 60.0  # a test that takes longer hangs
HANG_SECONDS = 120.0  # and a case of the bench
WATCHED = (
    ("memcheck", "cuda"), ("racecheck", "cuda"), ("memcheck", "triton"), ("synccheck", "cuda"), ("initcheck", "cuda"),
    ("racecheck", "triton"), ("synccheck", "triton"), ("initcheck", "triton"),
)  # fmt: skip
# torch.compile's set is last: compiling takes long.
SETS = (
    "first",
    "standard",
    "peers",
    "lorafusion-coarse",
    "small-m",
    "models",
    "pre-num",
    "dtypes",
    "ranks",
    "growth",
    "lorafusion",
)
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


def build(run: Runner, limit: float, folder: Path) -> Outcome:
    """The CUDA extension for this GPU, beside the sources; where it cannot be built the others go on without.

    By pip; where that fails, as with a setuptools older than ours needs, by the script that compiles it alone.
    """
    if shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").is_file():
        return Outcome(SKIPPED, "nvcc is not installed (it comes with the CUDA toolkit)")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    finished = run([*pip, "--editable", str(ROOT)], limit, RESLORA_CUDA="1")
    seconds, way = finished.seconds, ""
    if finished.status:
        way = f", without pip: {last_line(finished.output)}"
        finished = run([sys.executable, "build_cuda.py"], limit - seconds)
        seconds += finished.seconds
    if finished.status is None:
        return Outcome(UNFINISHED, way.removeprefix(", "))
    done = finished.status == 0
    return Outcome(PASSED if done else FAILED, f"{seconds:.0f} s{way}" if done else last_line(finished.output))


def correctness(
    run: Runner, limit: float, folder: Path, files: Sequence[str] = TEST_FILES, test_seconds: float = TEST_SECONDS
) -> Outcome:
    """The tests that need a GPU or run on one where there is one, file by file, each in a process of its own.

    A test that hangs or ends the process is a fault; the file goes on behind it in another process. What each test came
    to is in ``folder`` as soon as it is known.
    """
    ends, log, unfinished = time.monotonic() + limit, folder / "tests.jsonl", []
    faults: list[str] = []
    for file in files:
        if not _run_file(run, file, test_seconds, ends, log, faults):
            unfinished.append(file)
    tests = outcomes.read(log)
    count = {name: sum(test.outcome == name for test in tests.values()) for name in outcomes.KINDS}
    faults += [
        f"{name}: {test.why}" for name, test in tests.items() if test.outcome in (outcomes.FAILED, outcomes.ENDED)
    ]
    summary = ", ".join(f"{number} {name}" for name, number in count.items() if number or name == outcomes.PASSED)
    summary += f"; not through: {', '.join(unfinished)}" if unfinished else ""
    status = FAILED if faults else UNFINISHED if unfinished or not count[outcomes.PASSED] else PASSED
    return Outcome(status, summary, {**count, "faults": faults[:50], "unfinished": unfinished})


def _run_file(run: Runner, file: str, test_seconds: float, ends: float, log: Path, faults: list[str]) -> bool:
    """Whether every test of the file was run, in as many processes as that takes."""
    while (left := ends - time.monotonic()) > 5:
        before = outcomes.read(log)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", outcomes.__name__]
        command += [f"--timeout={test_seconds:.0f}", "--timeout-method=thread", file]
        finished = run(command, left, **{outcomes.VARIABLE: str(log)})
        after = outcomes.read(log)
        if finished.status is None:
            outcomes.forget_running(log)
            return False
        ended = sum(test.outcome == outcomes.ENDED for test in after.values())
        if finished.status in (0, 1, 5) and ended == sum(test.outcome == outcomes.ENDED for test in before.values()):
            return True
        if len(after) == len(before):
            faults.append(f"{file}: pytest ended with status {finished.status}: {last_line(finished.output)}")
            return True
    return False


def sanitizer(run: Runner, limit: float, folder: Path) -> Outcome:
    """compute-sanitizer's tools on every kernel of a backend, on small shapes; what is worth most first."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).is_file():
        return Outcome(SKIPPED, "compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    ends, found, plain = time.monotonic() + limit, {}, {}
    for name, backend in WATCHED:
        script = [sys.executable, "-m", "benchmarks.gpu_check.small_launches", backend]
        if backend not in plain:  # compiles every kernel, so that the tools watch kernels and not a compiler
            plain[backend] = _alone(run(script, max(1.0, ends - time.monotonic())))
        if plain[backend] != PASSED:
            found[f"without a tool, {backend}"] = plain[backend]
            continue
        left = ends - time.monotonic()
        if left < 5:
            found[f"{name} {backend}"] = UNFINISHED
            continue
        command = [tool, f"--tool={name}", "--error-exitcode=9", "--print-limit=5", *script]
        # Without torch's cache every tensor is an allocation of its own, whose bounds the tool knows.
        found[f"{name} {backend}"] = _verdict(run(command, left, PYTORCH_NO_CUDA_MEMORY_CACHING="1"))
    verdicts = [verdict for verdict in found.values() if verdict != SKIPPED]
    good = all(verdict in (PASSED, UNFINISHED) for verdict in verdicts)
    status = FAILED if not good else SKIPPED if not verdicts else UNFINISHED if UNFINISHED in verdicts else PASSED
    return Outcome(status, ", ".join(f"{name} {verdict}" for name, verdict in found.items()), {"tools": found})


def _alone(finished: Finished) -> str:
    if finished.status == small_launches.ABSENT:
        return SKIPPED
    return _verdict(finished)


def _verdict(finished: Finished) -> str:
    if finished.status is None:
        return UNFINISHED
    if finished.status == 0:
        return PASSED
    errors = re.findall(r"ERROR SUMMARY: (\d+) error", finished.output)
    return f"{errors[-1]} errors" if errors else f"status {finished.status}: {last_line(finished.output)}"


def speed(run: Runner, limit: float, folder: Path, sets: Sequence[str] = SETS, device: str = "cuda") -> Outcome:
    """The sets of ``reslora bench``, most important first, for as long as there is time.

    Where a case hangs or ends the process, another one goes on with the sets behind it.
    """
    ends, result, left_out = time.monotonic() + limit, None, []
    remaining, finished = list(sets), Finished(None, "", 0.0)
    while remaining and (left := ends - time.monotonic()) > 5:
        path = folder / f"speed-{len(left_out)}.json"
        command = [sys.executable, "-m", "reslora_kernels", "bench", f"--device={device}", f"--output={path}"]
        command += [part for name in remaining for part in ("--set", name)]
        command += ["--seconds=2", f"--budget-seconds={max(1.0, left - 30):.0f}", f"--hang-seconds={HANG_SECONDS:.0f}"]
        finished = run(command, left, COLUMNS="120")
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        result = _joined(result, found)
        if finished.status in (0, None):
            break
        reached = {row["set"] for row in found["measurements"] + found["models"]} if found else set()
        last = max((n for n, name in enumerate(remaining) if name in reached), default=0)
        left_out.append(f"{remaining[last]}: status {finished.status}: {last_line(finished.output)}")
        remaining = remaining[last + 1 :]
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
    summary += f"; ended in {'; in '.join(left_out)}" if left_out else ""
    bad = bool(wrong or left_out)
    return Outcome(FAILED if bad else PASSED if timed else UNFINISHED, summary, {"result": result})


def _joined(result: dict[str, Any] | None, more: dict[str, Any] | None) -> dict[str, Any] | None:
    """The rows of both under what the first says of the run."""
    if result is None or more is None:
        return result or more
    return result | {name: result[name] + more[name] for name in ("measurements", "models")}


def hopper(run: Runner, limit: float, folder: Path) -> Outcome:
    """The Hopper kernels: right or not, and how far from the goals."""
    probe = "import torch; from reslora_kernels.backends import cuda, hopper, native; raise SystemExit("
    probe += "cuda.unavailable_reason() or hopper.unavailable_reason(native.load(), torch.device('cuda')))"
    if (asked := run([sys.executable, "-c", probe], limit)).status != 0:
        return Outcome(SKIPPED, last_line(asked.output))
    path = folder / "hopper.json"
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


def tune(run: Runner, limit: float, folder: Path) -> Outcome:
    """Every form and tile for the table of measured choices, ``reslora_kernels/tuning/measured.json``.

    What was measured before a fault is kept.
    """
    kept = ROOT / "reslora_kernels" / "tuning" / "measured.json"
    before = kept.read_text(encoding="utf-8") if kept.is_file() else "{}"
    path, steps = folder / "measured.json", folder / "steps.json"
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

"""The check of a GPU and the tuning, driven by stand-ins for the GPU: budgets, verdicts, files."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import tune
from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check import outcomes, parts, small_launches
from benchmarks.gpu_check.parts import Finished
from reslora_kernels.backends import triton
from reslora_kernels.bench import results
from reslora_kernels.tuning import forms, gpus, tiles

from . import processes

ROW = {"set": "standard", "case": "M=8192", "provider": "ours-triton", "method": "lora", "status": "timed"}
ROW |= {"times_frozen": {"forward": 1.02, "backward": 1.04, "both": 1.03}, "noise": {"both": 0.01}, "reason": None}
SPEED = {"format": "reslora bench", "version": 1, "machine": {"gpu": "H200"}, "commit": "c" * 40, "date": "2026-01-02"}
SPEED |= {"uncommitted_changes": False, "settings": {}, "measurements": [ROW], "models": []}


FAULT = {"why": "largest error 1 above 0.5"}
FILES = len(parts.TEST_FILES)


class StandIn:
    """Answers for child processes, and keeps what was asked of them."""

    def __init__(
        self, fault: bool = False, speed: dict[str, Any] | None = None, statuses: dict[str, int | None] | None = None
    ):
        self.fault, self.speed, self.statuses = fault, SPEED if speed is None else speed, statuses or {}
        self.commands: list[list[str]] = []
        self.limits: list[float] = []
        self.environments: list[dict[str, str]] = []

    def __call__(self, command: Sequence[str], limit: float, **environment: str) -> Finished:
        self.commands.append(list(command))
        self.limits.append(limit)
        self.environments.append(environment)
        text = " ".join(command)
        status = next((status for part, status in self.statuses.items() if part in text), 0)
        if log := environment.get(outcomes.VARIABLE):
            found = [("one", "passed"), ("two", "skipped"), *([("three", "failed")] if self.fault else [])]
            lines = [json.dumps({"test": f"{command[-1]}::{name}", "outcome": came} | FAULT) for name, came in found]
            with open(log, "a") as file:
                file.write("".join(f"{line}\n" for line in lines))
            status = 1 if self.fault else status
        for part in command:
            if part.startswith("--output=") and "bench" in command and status == 0:
                Path(part.partition("=")[2]).write_text(json.dumps(self.speed))
        return Finished(status, "ERROR SUMMARY: 3 errors\n" if status == 9 else "done\n", 1.0)


@pytest.fixture
def with_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts.shutil, "which", lambda name: sys.executable)


@pytest.fixture
def files_of_the_real_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "REHEARSED", parts.TEST_FILES)
    monkeypatch.setattr(gpu_check, "as_planted", lambda outcome: outcome)


def run(stand_in: StandIn, tmp_path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    path = tmp_path / "check.json"
    status = gpu_check.main(["--rehearse", f"--output={path}", *options], stand_in)
    return status, json.loads(path.read_text())


def test_all_parts_in_order_within_the_budget(
    with_tools: None, files_of_the_real_check: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in = StandIn()
    status, report = run(stand_in, tmp_path)
    assert status == 0
    assert [(name, part["status"]) for name, part in report["parts"].items()] == [
        ("build", "skipped"), ("correctness", "passed"), ("hopper", "passed"), ("sanitizer", "passed"),
        ("speed", "passed"),
    ]  # fmt: skip
    watched = [(command[1].partition("=")[2], command[-1]) for command in stand_in.commands if "--tool" in command[1]]
    assert watched == list(parts.WATCHED) and watched[:2] == [("memcheck", "cuda"), ("racecheck", "cuda")]
    uncached = [environment for environment in stand_in.environments if "PYTORCH_NO_CUDA_MEMORY_CACHING" in environment]
    assert len(uncached) == len(watched)
    assert max(stand_in.limits) <= 540 and max(stand_in.limits[:-1]) <= 120
    assert list(tmp_path.iterdir()) == [tmp_path / "check.json"]
    assert all(command[0] == sys.executable for command in stand_in.commands)
    assert report["format"] == "reslora gpu check" and {"driver", "torch", "triton"} <= report["machine"].keys()
    assert "ours-triton lora" in capsys.readouterr().out.rpartition("Time relative to the frozen")[2]
    assert results.read(tmp_path / "check.json").measurements[0].provider == "ours-triton"


def test_tests_run_file_by_file_those_of_hopper_last(tmp_path: Path) -> None:
    stand_in = StandIn()
    outcome = parts.correctness(stand_in, 300.0, tmp_path)
    files = [command[-1] for command in stand_in.commands]
    assert files == list(parts.TEST_FILES) and files[-1] == "tests/kernels/test_hopper.py"
    assert all((parts.ROOT / file).is_file() for file in files)
    assert outcome.summary == f"{FILES} passed, {FILES} skipped"


@pytest.mark.slow
def test_the_rehearsal_loses_nothing_to_tests_that_hang_or_crash(tmp_path: Path) -> None:
    """In real processes: each fault is named, and what stands behind it in its file is run."""
    outcome = parts.correctness(parts.run_child, 60.0, tmp_path, gpu_check.REHEARSED[:2], test_seconds=2.0)
    assert outcome.status == parts.FAILED
    assert [fault.rpartition("::")[2] for fault in outcome.details["faults"]] == [
        "test_that_hangs: it did not come back", "test_that_crashes: it did not come back",
        "test_that_fails: AssertionError: planted",
    ]  # fmt: skip
    assert outcome.summary == "3 passed, 1 failed, 2 hung or crashed"
    slow = {"unfinished": [gpu_check.REHEARSED[-1]]}
    assert gpu_check.as_planted(replace(outcome, details=outcome.details | slow)).status == parts.PASSED
    assert gpu_check.as_planted(outcome).status == parts.FAILED


@pytest.mark.slow
def test_the_rehearsal_keeps_what_slow_tests_found_before_their_end(tmp_path: Path) -> None:
    outcome = parts.correctness(parts.run_child, 8.0, tmp_path, gpu_check.REHEARSED[2:] * 2, test_seconds=3.0)
    assert outcome.status == parts.UNFINISHED and outcome.details["unfinished"] == list(gpu_check.REHEARSED[2:] * 2)
    found = outcomes.read(tmp_path / "tests.jsonl")
    assert {test.outcome for test in found.values()} == {"passed"} and len(found) == outcome.details["passed"]


def test_the_speed_part_asks_for_the_sets_most_important_first(tmp_path: Path) -> None:
    stand_in = StandIn()
    outcome = parts.speed(stand_in, 300.0, tmp_path)
    (command,) = stand_in.commands
    sets = [command[n + 1] for n, part in enumerate(command) if part == "--set"]
    assert sets[:5] == ["first", "standard", "peers", "lorafusion-coarse", "small-m"]
    assert "--budget-seconds=270" in command and outcome.status == parts.PASSED


def test_speed_goes_on_behind_a_set_that_ends_the_process(tmp_path: Path) -> None:
    tries: list[list[str]] = []

    def runner(command: Sequence[str], limit: float, **environment: str) -> Finished:
        sets = [command[n + 1] for n, part in enumerate(command) if part == "--set"]
        tries.append(sets)
        (path,) = (part.partition("=")[2] for part in command if part.startswith("--output="))
        reached = sets[:2] if "standard" in sets else sets
        Path(path).write_text(json.dumps(SPEED | {"measurements": [ROW | {"set": name} for name in reached]}))
        return Finished(1 if "standard" in sets else 0, "Timeout (0:02:00)!", 1.0)

    outcome = parts.speed(runner, 300.0, tmp_path, ("first", "standard", "small-m"))
    assert tries == [["first", "standard", "small-m"], ["small-m"]]
    assert [row["set"] for row in outcome.details["result"]["measurements"]] == ["first", "standard", "small-m"]
    assert outcome.status == parts.FAILED and "ended in standard: status 1: Timeout" in outcome.summary


def test_a_build_that_pip_cannot_do_is_done_without_it(with_tools: None, tmp_path: Path) -> None:
    stand_in = StandIn(statuses={"pip": 1})
    outcome = parts.build(stand_in, 100.0, tmp_path)
    assert stand_in.commands[1] == [sys.executable, "build_cuda.py"] and (parts.ROOT / "build_cuda.py").is_file()
    assert (outcome.status, outcome.summary) == (parts.PASSED, "2 s, without pip: done")
    assert parts.build(StandIn(statuses={"pip": 1, "build_cuda": 1}), 100.0, tmp_path).status == parts.FAILED


@pytest.mark.parametrize(
    ("stand_in", "part", "status", "said"),
    [
        (StandIn(fault=True), "correctness", "failed", f"{FILES} passed, {FILES} failed, {FILES} skipped"),
        (StandIn(statuses={"pytest": None}), "correctness", "ran out of time", f"{FILES} passed"),
        (StandIn(statuses={"racecheck": 9}), "sanitizer", "failed", "racecheck cuda 3 errors"),
        (StandIn(statuses={"initcheck": None}), "sanitizer", "ran out of time", "initcheck cuda ran out of time"),
        (StandIn(statuses={"small_launches cuda": 1}), "sanitizer", "failed", "without a tool, cuda status 1: done"),
        (StandIn(statuses={"small_launches": 4}), "sanitizer", "skipped", "without a tool, triton skipped"),
        (StandIn(statuses={"bench": 2}), "speed", "failed", "no result: done"),
        (StandIn(statuses={"hopper.unavailable_reason": 1}), "hopper", "skipped", "done"),
        (StandIn(statuses={"gpu_check.hopper": 1}), "hopper", "failed", "done"),
        (StandIn(statuses={"benchmarks.tune": None}), "tune", "ran out of time", "done"),
        (
            StandIn(speed=SPEED | {"measurements": [ROW | {"status": "refused", "reason": "wrong result"}]}),
            "speed",
            "failed",
            "1 of ours refused or failed, first ours-triton lora: wrong result",
        ),
    ],
    ids=[
        "test",
        "slow test",
        "race",
        "slow tool",
        "launch",
        "no backend",
        "no result",
        "no Hopper",
        "Hopper",
        "tune",
        "refused",
    ],
)
@pytest.mark.usefixtures("with_tools", "files_of_the_real_check")
def test_verdicts(stand_in: StandIn, part: str, status: str, said: str, tmp_path: Path) -> None:
    code, report = run(stand_in, tmp_path, "--part", part)
    assert code == (status == "failed")
    assert report["parts"][part]["status"] == status and said in report["parts"][part]["summary"]


@pytest.mark.slow
def test_a_kernel_that_hangs_is_left_out_of_another_try(tmp_path: Path) -> None:
    """The script itself, with stand-ins for what it launches: the first kernel never comes back."""
    script = """
import sys, time
from pathlib import Path
from benchmarks.gpu_check import steps
steps.STEP_SECONDS, steps.KERNEL_SECONDS = 3.0, 1.0
one = steps.Steps(Path(sys.argv[1].partition("=")[2]))
def work():
    right = [kernel for kernel in ("slow", "fast") if kernel not in one.wrong]
    for kernel in right:
        one.launching(kernel)
        time.sleep(30 * (kernel == "slow"))
    return {"ran": right}
one.run("first", lambda: {"ran": []})
one.run("second", work)
one.run("third", lambda: time.sleep(30))
one.run("fourth", work)
one.finish(goals=[])
"""
    tries: list[int | None] = []

    def runner(command: Sequence[str], limit: float, **environment: str) -> Finished:
        if "benchmarks.gpu_check.hopper" not in command:
            return Finished(0, "", 0.0)
        finished = parts.run_child([sys.executable, "-c", script, command[3]], limit)
        tries.append(finished.status)
        return finished

    outcome = parts.hopper(runner, 200.0, tmp_path)
    assert tries == [1, 1, 0] and outcome.status == parts.FAILED
    assert outcome.summary.startswith("slow: second: it hung, or ended the process; ")
    found = outcome.details["hopper"]
    assert found["steps"] == {
        "first": {"ran": []}, "second": {"ran": ["fast"]}, "third": {"failed": "it hung, or ended the process"},
        "fourth": {"ran": ["fast"]},
    }  # fmt: skip


@pytest.mark.parametrize("last", [0, 1, None])
def test_tuning_goes_on_without_a_kernel_that_hangs_and_keeps_what_it_measured(
    last: int | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(parts, "ROOT", tmp_path)
    kept = tmp_path / "reslora_kernels" / "tuning" / "measured.json"
    kept.parent.mkdir(parents=True)
    hung = {"wrong": {}, "running": {"step": "check", "kernel": "ping-pong, dx"}}
    through = {"wrong": {"ping-pong, dx": "check: it hung"}, "running": None}
    tries = iter([(1, hung, {}), (last, through, {"sm_90": {"calls": []}})])

    def runner(command: Sequence[str], limit: float, **environment: str) -> Finished:
        files = dict(part.removeprefix("--").split("=") for part in command if part.startswith("--"))
        status, steps, table = next(tries)
        assert Path(files["output"]).read_text() == "{}"
        Path(files["steps"]).write_text(json.dumps(steps))
        Path(files["output"]).write_text(json.dumps(table))
        return Finished(status, "what it said", 1.0)

    outcome = parts.tune(runner, 200.0, tmp_path)
    assert outcome.status == (parts.FAILED if last else parts.PASSED)
    assert outcome.summary == "what it said; without ping-pong, dx" and outcome.details["wrong"] == through["wrong"]
    assert json.loads(kept.read_text()) == outcome.details["measured"] == {"sm_90": {"calls": []}}


def test_tuning_that_measures_nothing_keeps_no_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(parts, "ROOT", tmp_path)
    outcome = parts.tune(StandIn(statuses={"benchmarks.tune": 1}), 200.0, tmp_path)
    assert (outcome.status, outcome.summary, outcome.details) == (parts.FAILED, "done", {})
    assert not (tmp_path / "reslora_kernels").exists()


def test_without_the_sanitizer_it_is_skipped_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts.shutil, "which", lambda name: None)
    monkeypatch.setattr(parts.Path, "is_file", lambda self: False)
    assert "compute-sanitizer is not installed" in parts.sanitizer(StandIn(), 60.0, tmp_path).summary


@pytest.mark.slow
def test_a_child_is_stopped_at_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"  # background jobs ignore it
    )
    code += "try: print('begun', flush=True); time.sleep(60)\nexcept KeyboardInterrupt: print('report')"
    monkeypatch.setattr(parts, "GRACE", 25.0)  # a loaded machine may take a while to let it speak
    stopped = parts.run_child([sys.executable, "-c", code], 3.0)
    assert stopped.status is None and stopped.output == "begun\nreport\n" and stopped.seconds < 28
    monkeypatch.setattr(parts, "GRACE", 1.0)
    stubborn = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: time.sleep(1)"
    assert parts.run_child([sys.executable, "-c", stubborn], 1.5).status is None
    assert parts.run_child([sys.executable, "-c", "raise SystemExit(3)"], 20.0).status == 3


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    finished = processes.run([sys.executable, "-m", "benchmarks.gpu_check"], cwd=parts.ROOT)
    assert finished.returncode == 1 and finished.stderr.startswith("gpu-check needs a CUDA GPU")
    assert finished.stderr.count("\n") == 1


def test_small_launches_run_every_case_through_a_backend() -> None:
    from reslora_kernels.backends import torch as library

    for case in small_launches.cases():
        small_launches.run(library, case, "cpu")


@pytest.mark.parametrize("form", ["one_pass", "two_pass"])
@pytest.mark.slow
def test_small_launches_fit_the_triton_backend(form: str, triton_interpreter: bool) -> None:
    if not triton_interpreter:
        pytest.skip("runs on a CPU, in Triton's interpreter")
    for case in [case for case in small_launches.cases() if case[0] == 17]:
        with forms.assume(gpus.GENERATIONS["interpreter"], (form,)):
            small_launches.run(triton, case, "cpu")


class StandInTimer:
    """Prefers two passes with the second tile forward, the library backward; one tile cannot run."""

    def forward(self, shape: tune.Shape, candidates: Sequence[tune.Candidate]) -> list[float | None]:
        best = next(c for c in candidates if c.form == "two_pass" and c.tile is not None)
        return [None if c.form == "one_pass" else 1e-4 if c is best else 2e-4 for c in candidates]

    def backward(self, shape: tune.Shape, candidates: Sequence[tune.Candidate]) -> list[float | None]:
        return [3e-4 if c.form == "library" else 4e-4 for c in candidates]

    def calls(self, shape: tune.Shape, forward: tune.Candidate, backward: tune.Candidate) -> dict[str, float]:
        assert (forward.form, backward.form) == ("two_pass", "library")
        return {"triton": 7e-4, "torch": 8e-4}

    def calls_with_dropout(self, shape: tune.Shape) -> dict[str, float]:
        return {"triton": 9e-4}


def test_tuning_writes_the_table_that_the_choice_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "measured.json"
    before = {"sm_80": {"matmuls": [], "calls": [], "machine": "kept"}, "sm_90": {"rates": {"H100": [6e14, 2e12]}}}
    path.write_text(json.dumps(before))
    gpu = gpus.GENERATIONS["sm_90"]
    shapes = [tune.Shape(8192, 4096, 14336), tune.Shape(16, 4096, 4096), tune.Shape(8192, 4096, 4096, 128)]
    told: list[int] = []
    table = tune.tune(gpu, StandInTimer(), shapes, lambda found: told.append(len(found["calls"])))
    tune.write(path, gpu.generation, table, {"gpu": "H200", "torch": "2", "triton": "3"}, {"H200": [7e14, 4e12]})
    content = json.loads(path.read_text())
    assert content["sm_80"]["machine"] == "kept" and content["sm_90"]["machine"] == "H200" and told == [1, 2, 3]
    monkeypatch.setattr(gpus, "table", lambda: content)
    of_devices = [gpus.with_rates(gpu, name) for name in ("H200", "H100")]
    assert [(found.flops, found.bandwidth) for found in of_devices] == [(7e14, 4e12), (6e14, 2e12)]
    near = {"m": 8000, "n": 14336, "k": 4096, "rank": 16}
    row = gpus.nearest("sm_90", "matmuls", near, {"dtype": "torch.bfloat16", "one_pass": True})
    assert row is not None and (row["form"], row["seconds"]) == ("two_pass", 1e-4)
    assert tiles.MatmulTile(**row["tile"]) in tiles.matmul_tiles(gpu, 8192, 16, torch.bfloat16, "ieee", False)
    swapped = {"m": 8192, "n": 4096, "k": 14336, "rank": 16}
    row = gpus.nearest("sm_90", "matmuls", swapped, {"dtype": "torch.bfloat16", "one_pass": False})
    assert row is not None and (row["form"], row["tile"], row["seconds"]) == ("library", None, 3e-4)
    call = gpus.nearest("sm_90", "calls", near, {"dtype": "torch.bfloat16"})
    assert call is not None and call["microseconds"] == {"triton": 700.0, "torch": 800.0}
    call = gpus.nearest("sm_90", "calls with dropout", near, {"dtype": "torch.bfloat16"})
    assert call is not None and call["microseconds"] == {"triton": 900.0}


def test_tuning_stops_at_the_deadline_and_knows_what_cannot_be_in_one_pass() -> None:
    gpu = gpus.GENERATIONS["sm_90"]
    nothing = tune.tune(gpu, StandInTimer(), list(tune.shapes()), lambda table: None, deadline=-math.inf)
    assert nothing == {"matmuls": [], "calls": [], "calls with dropout": []}
    forms = {c.form for c in tune.candidates(gpu, tune.Shape(8192, 4096, 4096, triton.ONE_PASS_RANK), True)}
    assert forms == {"library", "two_pass", "one_pass"}
    assert all(shape.rank <= tiles.MAX_RANK for shape in tune.shapes())
    assert len(set(tune.shapes())) == len(list(tune.shapes()))


@pytest.mark.slow
def test_the_real_timer_calls_the_backend(monkeypatch: pytest.MonkeyPatch, triton_interpreter: bool) -> None:
    """On a CPU in Triton's interpreter: the calls are made with the operands that the backend takes."""
    if not triton_interpreter:
        pytest.skip("runs on a CPU, in Triton's interpreter")
    timer = tune.GpuTimer(torch.device("cpu"), tune.Plan(most=2, least=1, warmup=1))
    shape = tune.Shape(8, 16, 24, 4, torch.float32)
    ways = tune.candidates(timer.gpu, shape, True)[:3]
    assert all(seconds is not None and seconds > 0 for seconds in timer.forward(shape, ways))
    assert all(seconds is not None for seconds in timer.backward(shape, ways[:2]))
    assert "torch" in timer.calls(shape, ways[1], ways[0])

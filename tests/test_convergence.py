"""The convergence benchmarks: runs are resumable and repeatable, and the report says what the runs' files say."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.convergence import runs, settings, summary, tasks
from benchmarks.convergence.__main__ import app
from benchmarks.convergence.methods import METHODS
from benchmarks.convergence.report import write_report
from reslora_kernels.cli.demo.settings import QUICK

TINY = settings.Budget(
    name="tiny",
    model=QUICK.replace(hidden_size=32, intermediate_size=48, layers=2, pretraining_steps=6, batch=2, sequence=32),
    tasks=("python", "arithmetic"),
    methods=("lora", "middle", "adalora"),
    steps=6,
    evaluations=2,
    held_out=4,
    rates=(5e-3, 1e-2),
    seeds=(0, 1),
    calibration_batches=2,
)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(settings.SETS, "tiny", TINY)


def run(folder: Path) -> str:
    result = CliRunner().invoke(app, ["run", "--set", "tiny", "--out", str(folder)])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_set_runs_resumes_and_reports(tiny: None, tmp_path: Path) -> None:
    run(tmp_path)
    files = sorted(tmp_path.glob("*.json"))
    assert len(files) == 2 * 3 * (2 + 2)  # tasks, methods, rates and seeds
    first = {path: path.read_text() for path in files}
    lost = tmp_path / "python-middle-0.01-1000.json"
    lost.unlink()
    run(tmp_path)
    again = json.loads(lost.read_text())
    before = json.loads(first.pop(lost))
    for curve in (again["curve"], before["curve"]):
        for point in curve:
            del point["seconds"]
    assert again["curve"] == before["curve"] and again["merges"] == before["merges"]
    assert {path: path.read_text() for path in first} == first
    assert not runs.missing(TINY, tmp_path, runs.best_rates(TINY, tmp_path))
    with pytest.raises(ValueError, match=r"other settings \(steps\)"):
        runs.missing(dataclasses.replace(TINY, steps=7), tmp_path, None)
    if (Path(__file__).parents[1] / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{40}", again["commit"][0])
    report = (tmp_path / "REPORT.md").read_text()
    assert (tmp_path / "python.png").stat().st_size > 5000
    for row in summary.summarize(runs.read_all(tmp_path)):
        assert f"{row.loss:.4f} ± {row.spread:.4f}" in report
    assert len(re.findall(r"\d+\.\d% \|", report)) >= 3


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_learns_and_starts_from_the_base_model(method: str, tmp_path: Path) -> None:
    base = runs.base_model(TINY, tmp_path)
    result = runs.train_one(base, dataclasses.replace(TINY, steps=12), runs.Spec("python", method, 1e-2, 0))
    held_out = tasks.TASKS["python"].held_out(TINY.held_out)
    with torch.no_grad():
        assert result["curve"][0]["loss"] == pytest.approx(tasks.loss_of(base, held_out).item(), rel=1e-5)
    assert result["curve"][-1]["loss"] < result["curve"][0]["loss"]


def test_problems_have_their_answers() -> None:
    generator = random.Random(0)
    for _ in range(50):
        question, answer = tasks.problem(generator)
        numbers = [int(n) for n in re.findall(r"\d+", question)]
        if "buys" in question:
            expected = numbers[0] + numbers[1]
        elif "gives" in question:
            expected = numbers[0] - numbers[1]
        else:
            expected = 2 * numbers[0] + numbers[1]
        assert int(answer) == expected >= 0
        assert len(question + answer) <= tasks.PROBLEM_BYTES


def curve(*points: tuple[float, float]) -> list[dict[str, Any]]:
    return [{"step": 10 * i, "seconds": s, "loss": loss} for i, (s, loss) in enumerate(points)]


def test_crossings_and_paired_tests() -> None:
    falling = curve((0, 4.0), (2, 2.0), (4, 1.0))
    assert summary.crossing(falling, "step", 1.5) == 15
    assert summary.crossing(falling, "seconds", 3.0) == 1
    assert summary.crossing(falling, "step", 0.5) is None
    assert summary.loss_at(falling, 3) == 1.5 and summary.loss_at(falling, 9) == 1.0

    def result(method: str, seed: int, last: float) -> dict[str, Any]:
        return {
            "spec": {"task": "python", "method": method, "rate": 0.01, "seed": seed},
            "curve": curve((0, 4.0), (2, last)), "trained_parameters": 7, "merges": {},
        }  # fmt: skip

    results = [result("lora", s, 2 + s / 10) for s in range(3)] + [result("block", s, 1.9 + s / 9) for s in range(3)]
    lora, block = summary.summarize(results)
    assert (lora.method, lora.p, lora.difference) == ("lora", None, 0)
    assert block.difference == pytest.approx(-0.1 + 1 / 9 - 1 / 10)
    assert block.p is not None and block.p < 0.05
    with pytest.raises(ValueError, match="finish the set first"):
        summary.summarize(results[:-1])
    with pytest.raises(ValueError, match="no final run of 'lora'"):
        summary.summarize(results[3:])


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no runs"):
        write_report(tmp_path)
    result = CliRunner().invoke(app, ["run", "--set", "huge", "--out", str(tmp_path)])
    assert result.exit_code == 2 and "must be one of quick, main, cpu" in result.output

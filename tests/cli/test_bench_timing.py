"""How the benchmark tells a slowdown from noise, under a clock that the test moves."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import pytest

from reslora_kernels.bench import comparison, timing
from reslora_kernels.bench.results import FAILED, Result, read
from reslora_kernels.cli import main

from .fake_clock import FakeClock, result

TIMES = {"frozen": 1.0, "plain": 1.4, "ours-torch": 1.1, "peft": 1.3}


def test_a_planted_slowdown_of_ten_per_cent_is_found() -> None:
    """Alone, although the machine is 30 % slower the second time, slows down further, and every time is noisy."""
    old = result(TIMES, FakeClock(1, jitter=0.05))
    slower_machine = {name: 1.3 * seconds for name, seconds in TIMES.items()}
    planted = slower_machine | {"ours-torch": 1.1 * slower_machine["ours-torch"]}
    new = result(planted, FakeClock(2, jitter=0.05, drift=1e-4))
    found = comparison.compare(old, new)
    assert {change.provider for change in found.slower} == {"ours-torch lora"}
    assert {change.phase for change in found.slower} == set(timing.PHASES)
    assert all(change.change == pytest.approx(0.1, abs=0.03) for change in found.slower)
    assert found.worse and not found.faster and not found.broken
    assert found.machine is not None and found.machine > 1.25


@pytest.mark.parametrize("jitter", [0.0, 0.02, 0.2])
@pytest.mark.slow
def test_two_runs_agree_within_the_stated_noise(jitter: float) -> None:
    for seed in range(5):
        old, new = (result(TIMES, FakeClock(s, jitter), rounds=40) for s in (seed, 100 + seed))
        found = comparison.compare(old, new)
        assert not found.worse and not found.faster
        assert found.compared == 3 * len(timing.PHASES)


@pytest.mark.slow
def test_the_noise_covers_the_truth() -> None:
    """Of the quotient 1.1, in at least 18 of 20 runs with 15 rounds each."""
    covered = 0
    for seed in range(20):
        made = result(TIMES, FakeClock(seed, jitter=0.3), rounds=15)
        row = next(row for row in made.measurements if row.provider == "ours-torch")
        covered += abs(row.times_frozen["both"] / 1.1 - 1) <= row.noise["both"]
    assert covered >= 18


def test_rounds_are_interleaved_in_a_new_order_each() -> None:
    ran: list[str] = []
    clock = FakeClock()
    subjects = [
        timing.Subject(name, lambda i, name=name: ran.append(f"{name}{i}") or clock.work(1.0)) for name in "abc"
    ]
    plan = timing.Plan(most=30, least=30, seconds=1e9, warmup=0, input_sets=2)
    samples = timing.measure(subjects, clock, plan)
    rounds = [ran[n : n + 3] for n in range(0, 90, 3)]
    assert all(sorted(names) == [f"{name}{n % 2}" for name in "abc"] for n, names in enumerate(rounds))
    assert len({"".join(name[0] for name in names) for names in rounds}) == 6
    assert samples["a"].forward == [1.0] * 30 and samples["a"].backward == [0.0] * 30
    assert clock.drained == 3  # once for ten rounds, never between subjects


def test_a_subject_that_raises_is_given_up_and_the_others_go_on() -> None:
    clock, calls = FakeClock(), []

    def breaks(i: int) -> None:
        calls.append(i)
        if len(calls) == 7:
            raise RuntimeError("out of luck\nand more")

    subjects = [clock.subject("sound", 1.0, 1.0), timing.Subject("broken", breaks)]
    asked: list[int] = []
    samples = timing.measure(subjects, clock, timing.Plan(most=20, least=20, seconds=1e9), lambda: asked.append(1))
    assert samples["broken"].failure == "RuntimeError: out of luck"
    assert len(samples["sound"].of("both")) == 20
    assert asked == [1]


@pytest.mark.parametrize(("seconds", "rounds"), [(1e9, 200), (90.0, 30), (1.0, 10)])
def test_rounds_fit_the_time_given(seconds: float, rounds: int) -> None:
    clock = FakeClock()
    samples = timing.measure([clock.subject("a", 1.0, 2.0)], clock, timing.Plan(seconds=seconds))
    assert len(samples["a"].forward) == rounds


def test_no_chunk_begins_after_the_deadline() -> None:
    clock = FakeClock()
    samples = timing.measure([clock.subject("a", 1.0, 2.0)], clock, timing.Plan(seconds=1e9), deadline=-math.inf)
    assert len(samples["a"].forward) == 10


def test_graphs_are_launched_while_the_device_is_held() -> None:
    clock = FakeClock()
    plan = timing.Plan(most=10, least=10, seconds=1e9, warmup=2, hold=True)
    timing.measure([clock.subject("a", 1.0, 1.0), clock.subject("b", 1.0, 1.0)], clock, plan)
    assert clock.held == pytest.approx(12 * 2 * timing.LAUNCH_SECONDS)


def test_percentiles_and_confidence() -> None:
    assert timing.percentiles([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == (2.0, 3.5, 5.0)
    assert timing.percentiles([7.0]) == (7.0, 7.0, 7.0)
    ordered = [float(n) for n in range(1, 26)]
    low, high = timing.confidence(ordered)
    assert (low, statistics.median(ordered), high) == (8.0, 13.0, 18.0)  # ranks of the binomial table for n = 25
    assert timing.confidence([1.0, 2.0, 3.0]) == (1.0, 3.0)


def write(made: Result, path: Path) -> Path:
    made.write(path)
    return path


def test_compare_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = write(result(TIMES, FakeClock(1)), tmp_path / "old.json")
    slow = write(result(TIMES | {"peft": 1.43}, FakeClock(2)), tmp_path / "slow.json")
    assert main(["bench", "compare", str(old), str(old)]) == 0
    assert "9 figures compared: 0 slower beyond the noise" in capsys.readouterr().out
    assert main(["bench", "compare", str(old), str(slow)]) == 1
    printed = capsys.readouterr().out
    assert "peft lora" in printed and "+10.0%" in printed and "ours-torch" not in printed
    assert main(["bench", "compare", str(old), str(slow), "--threshold", "0.2"]) == 0


def test_what_was_timed_and_now_fails_is_worse(tmp_path: Path) -> None:
    old, new = result(TIMES, FakeClock(1)), result(TIMES, FakeClock(1))
    row = new.measurements[1]
    row.status, row.reason, row.seconds, row.times_frozen = FAILED, "out of memory", {}, {}
    found = comparison.compare(old, new)
    assert found.broken == [f"{row.case}, plain lora: failed now, out of memory"] and found.worse
    assert read(write(new, tmp_path / "new.json")) == new


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no result file: not valid JSON"),
        ("[]", "is no result file of `reslora bench`"),
        ('{"format": "reslora demo"}', "is no result file of `reslora bench`"),
        ('{"format": "reslora bench", "version": 99}', "has format version 99, this release reads 1"),
        ('{"format": "reslora bench", "version": 1}', "is a damaged result file"),
        ('{"format": "reslora bench", "version": 1, "measurements": [{"x": 1}], "models": []}', "is a damaged result"),
    ],
)
def test_an_unreadable_result_is_one_clear_line(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    path.write_text(content)
    for arguments in (["compare", str(path), str(path)], ["report", str(path)]):
        assert main(["bench", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert main(["bench", "report", str(tmp_path / "none.json")]) == 2


def test_results_with_nothing_in_common_are_refused() -> None:
    with pytest.raises(ValueError, match="no measurement in common"):
        comparison.compare(result(TIMES, FakeClock()), Result({}, None, None, "2026-01-01", {}))

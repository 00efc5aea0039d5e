"""The GPU check without a GPU: its timing, its refusal of a wrong backend, its table of measurements."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.device_timing import interleaved_seconds
from benchmarks.gpu_check import Results, speed_row, summary, tune
from benchmarks.layer_calls import FORMS, LayerCall, Shape
from reslora_kernels.backends import torch as library
from reslora_kernels.kernels import measured

CPU = torch.device("cpu")
SMALL = Shape(8, 32, 40, 4, torch.float32)


def test_works_take_turns_and_medians_are_theirs() -> None:
    order: list[str] = []
    works = {name: lambda index, name=name: order.append(f"{name}{index}") for name in ("a", "b")}
    seconds = interleaved_seconds(works, sets=2, rounds=3, device=CPU)
    assert order[4:8] == ["a0", "a1", "b0", "b1"]  # after one warm-up each
    assert len(order) == 4 + 3 * 4
    assert all(low <= middle <= high for middle, low, high in seconds.values())


@pytest.mark.parametrize("shortcut", FORMS)
def test_a_row_of_the_speed_part(shortcut: str) -> None:
    row = speed_row(SMALL, shortcut, LayerCall(SMALL, FORMS[shortcut], CPU, sets=2), rounds=2)
    forward, frozen = (row["microseconds"][name][0] for name in ("torch forward", "frozen forward"))
    assert row["torch forward / frozen"] == pytest.approx(forward / frozen)
    assert json.loads(json.dumps(row)) == row


def test_a_backend_with_a_wrong_gradient_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def backward(*arguments: object) -> tuple[torch.Tensor, ...]:
        dx, da, *others = library.backward(*arguments)
        return dx, da * 1.1, *others

    wrong = SimpleNamespace(
        forward=library.forward, backward=backward, unavailable_reason=lambda: None, explain=lambda *_: ""
    )
    monkeypatch.setattr(gpu_check, "triton", wrong)
    row = speed_row(SMALL, "input", LayerCall(SMALL, FORMS["input"], CPU, sets=1), rounds=1)
    assert "differ by 0.1" in row["refused"]
    assert "microseconds" not in row
    assert row["refused"] in summary({"speed": [row]})


def test_tuning_writes_a_table_that_the_choice_can_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, triton_interpreter: bool
) -> None:
    """In the interpreter, whose times mean nothing."""
    if not triton_interpreter:
        pytest.skip("writes a table of the interpreter's times")
    monkeypatch.setattr(measured, "__file__", str(tmp_path / "measured.py"))
    tune(Results(tmp_path / "result.json", CPU), lambda: 1000.0, [SMALL], rounds=1)
    content = json.loads((tmp_path / "measured.json").read_text())
    monkeypatch.setattr(measured, "table", lambda: content)
    sizes = {"m": 8, "n": 40, "k": 32, "rank": 4}
    exact = {"dtype": "torch.float32", "one_pass": True}
    row = measured.nearest("interpreter", "matmuls", sizes, exact)
    assert row is not None and row["form"] in ("one_pass", "two_pass", "library")
    call = measured.nearest("interpreter", "calls", sizes, {"dtype": "torch.float32"})
    assert call is not None and set(call["microseconds"]) == {"torch", "triton"}
    assert {"machine", "commit"} <= set(content["interpreter"])


def test_what_the_time_budget_leaves_undone_is_named(tmp_path: Path) -> None:
    results = Results(tmp_path / "result.json", CPU)
    gpu_check.speed(results, lambda: 0.0, [SMALL])
    assert [row["shortcut"] for row in json.loads((tmp_path / "result.json").read_text())["undone"]] == list(FORMS)
    assert "undone: 4" in summary(results.content)


def test_a_child_that_fails_is_recorded(tmp_path: Path) -> None:
    results = Results(tmp_path / "result.json", CPU)
    gpu_check.run(results, "correctness", ["false"], 10.0)
    gpu_check.run(results, "correctness", ["sleep", "9"], 1.0)
    assert [row["passed"] for row in results.content["correctness"]] == [False, None]


def test_every_kernel_is_in_the_small_calls(triton_interpreter: bool) -> None:
    from reslora_kernels.kernels import launch

    with launch.recording() as launches:
        gpu_check.small_calls(CPU if triton_interpreter else torch.device("cuda"))
    names = {entry.name for entry in launches}
    assert {"project", "augmented_matmul", "pass_over_dy", "pass_over_x", "outer_products"} <= names


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_check"])
    with pytest.raises(SystemExit) as stop:
        gpu_check.main()
    assert stop.value.code == 1
    assert "needs a CUDA GPU" in capsys.readouterr().err

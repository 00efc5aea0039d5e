"""``reslora verify``: one line for each golden case and backend, and a status that tells of any failure."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from reslora_kernels.backends import select
from reslora_kernels.cli import main, verify
from reslora_kernels.testing import golden_cases

USABLE = [status.name for status in select.status() if status.available]


def test_every_case_passes_on_every_usable_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify"]) == 0
    lines = capsys.readouterr().out.splitlines()
    passed = [line.split()[1:3] for line in lines if line.startswith("ok")]
    assert passed == [[backend, case.name] for backend in USABLE for case in golden_cases()]
    total = len(USABLE) * len(golden_cases())
    assert lines[-1] == f"{total} of {total} checks passed"
    skipped = [line.split()[1] for line in lines if line.startswith("skip")]
    assert sorted(USABLE + skipped) == ["cuda", "torch", "triton"]


@pytest.mark.parametrize("tensor", ["y.1", "dx.0", "dlora_A.1", "dlora_B.2"])
def test_wrong_value_fails(tensor: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    case = golden_cases()[0]
    wrong = {**case.tensors, tensor: case.tensors[tensor] + 1e-9}
    monkeypatch.setattr(verify, "golden_cases", lambda: (replace(case, tensors=wrong), *golden_cases()[1:]))
    assert main(["verify"]) == 1
    lines = capsys.readouterr().out.splitlines()
    failures = [line for line in lines if line.startswith("FAIL")]
    assert len(failures) == len(USABLE)
    assert all(case.name in line and "above 1e-10" in line for line in failures)


def test_nan_fails() -> None:
    case = golden_cases()[0]
    poisoned = {**case.tensors, "y.0": torch.full_like(case.tensors["y.0"], float("nan"))}
    assert verify.check_case(replace(case, tensors=poisoned), "torch").failure is not None


def test_failing_backend_is_a_failed_check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("illegal instruction")

    monkeypatch.setattr(verify, "chain_results", broken)
    assert main(["verify"]) == 1
    output = capsys.readouterr().out
    assert "RuntimeError: illegal instruction" in output
    assert f"0 of {len(USABLE) * len(golden_cases())} checks passed" in output


@pytest.mark.parametrize("case", golden_cases(), ids=lambda case: case.name)
def test_backend_without_float64_is_held_to_the_tolerance_rule(
    case: verify.GoldenCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise ValueError("float64 is not supported")

    monkeypatch.setattr(verify, "served_dtype", lambda *arguments: torch.float32)
    check = verify.check_case(case, "torch")
    assert check.failure is None
    assert check.dtype == "float32"
    monkeypatch.undo()
    monkeypatch.setattr(select, "explain", refuse)
    assert verify.served_dtype(case, "torch") is torch.float32


def test_float32_error_beyond_the_rule_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    case = golden_cases()[0]
    results = verify.chain_results(case, "torch", torch.float32)
    results["dx"][1] *= 1 + 1e-5
    monkeypatch.setattr(verify, "served_dtype", lambda *arguments: torch.float32)
    monkeypatch.setattr(verify, "chain_results", lambda *arguments: results)
    failure = verify.check_case(case, "torch").failure
    assert failure is not None
    assert "dx.1" in failure


def test_golden_tensors_are_left_as_they_were() -> None:
    case = golden_cases()[0]
    errors = [verify.check_case(case, "torch").error for _ in range(2)]
    assert errors[0] == errors[1]
    assert not any(tensor.requires_grad for tensor in case.tensors.values())


def test_installation_without_golden_vectors_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verify, "golden_cases", tuple)
    assert main(["verify"]) == 2
    assert "holds no golden vectors" in capsys.readouterr().err

"""The paper's released layers, reproduced to 1e-10 in float64 through every public path and by ``reslora verify``."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from reslora_kernels import ResLoRALinear, apply_reslora, collect_statistics, link, merge_reslora, reference
from reslora_kernels.backends import select
from reslora_kernels.cli import doctor, main
from reslora_kernels.testing import GoldenCase, golden_cases, max_error

CASES = [pytest.param(case, id=case.name) for case in golden_cases()]
MERGED = [pytest.param(case, id=case.name) for case in golden_cases() if case.merge_alpha is not None]
TOLERANCE = 1e-10


class Layers(nn.Module):
    """Independent linears, one input each: the frozen network of a golden case."""

    def __init__(self, case: GoldenCase) -> None:
        super().__init__()
        out_features, in_features = case.tensors["weight.0"].shape
        bias = case.biases()[0] is not None
        self.layers = nn.ModuleList(
            nn.Linear(in_features, out_features, bias=bias, dtype=torch.float64) for _ in range(case.num_layers)
        )

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self.layers, xs, strict=True)]


def fill(layers: nn.ModuleList | list[ResLoRALinear], case: GoldenCase) -> None:
    for n, layer in enumerate(layers):
        names = [("weight", layer.weight), ("lora_A", layer.lora_A), ("lora_B", layer.lora_B), ("bias", layer.bias)]
        for name, parameter in names:
            if parameter is not None:
                parameter.data.copy_(case.tensors[f"{name}.{n}"])


def adapted(case: GoldenCase) -> Layers:
    model = apply_reslora(Layers(case), case.config)
    fill(model.layers, case)
    return model


def check(case: GoldenCase, xs: list[Tensor], ys: list[Tensor], layers: nn.ModuleList | list[ResLoRALinear]) -> None:
    torch.autograd.backward(ys, case.series("dy"))
    for n, layer in enumerate(layers):
        for name, actual in (
            ("y", ys[n]), ("dx", xs[n].grad), ("dlora_A", layer.lora_A.grad), ("dlora_B", layer.lora_B.grad),
        ):  # fmt: skip
            assert max_error(actual, case.tensors[f"{name}.{n}"]) < TOLERANCE, f"{name}.{n}"
        assert layer.weight.grad is None


@pytest.mark.parametrize("case", CASES)
def test_reference(case: GoldenCase) -> None:
    xs, a, b = ([t.clone().requires_grad_() for t in case.series(name)] for name in ("x", "lora_A", "lora_B"))
    config = case.config
    ys = reference.chain_forward(
        config.shortcut, config.pre_num, config.scaling, xs, case.series("weight"), case.biases(), a, b
    )
    torch.autograd.backward(ys, case.series("dy"))
    for n in range(case.num_layers):
        for name, actual in (("y", ys[n]), ("dx", xs[n].grad), ("dlora_A", a[n].grad), ("dlora_B", b[n].grad)):
            assert max_error(actual, case.tensors[f"{name}.{n}"]) < TOLERANCE, f"{name}.{n}"


@pytest.mark.parametrize("case", CASES)
def test_apply_reslora(case: GoldenCase) -> None:
    """A plain module of nn.Linear, adapted."""
    model, xs = adapted(case), [x.clone().requires_grad_() for x in case.series("x")]
    check(case, xs, model(xs), model.layers)


@pytest.mark.parametrize("case", CASES)
def test_layers_linked_by_hand(case: GoldenCase) -> None:
    """ResLoRALinears without a model around them."""
    out_features, in_features = case.tensors["weight.0"].shape
    bias = case.biases()[0] is not None
    layers = [
        ResLoRALinear(in_features, out_features, bias, dtype=torch.float64, config=case.config)
        for _ in range(case.num_layers)
    ]
    fill(layers, case)
    chain, xs = link(layers), [x.clone().requires_grad_() for x in case.series("x")]
    with chain.forward_pass():
        ys = [layer(x) for layer, x in zip(layers, xs, strict=True)]
    check(case, xs, ys, layers)


@pytest.mark.parametrize("case", MERGED)
def test_merge_by_input_norms(case: GoldenCase) -> None:
    """Norms averaged over the window of three batches, then merge "input", as the released code merges."""
    model = adapted(case)
    with collect_statistics(model) as statistics:
        for batch in case.batches():
            model(batch)
    report = merge_reslora(model, "input", statistics=statistics)
    assert all(row.relative_error is not None and row.relative_error > 0 for row in report.rows[1:])
    for n, (layer, x) in enumerate(zip(model.layers, case.series("x"), strict=True)):
        assert max_error(layer(x), case.tensors[f"y_merged.{n}"]) < TOLERANCE


def test_every_shortcut_has_golden_vectors() -> None:
    assert {case.config.shortcut for case in golden_cases()} == {"none", "input", "block", "middle"}
    assert {case.config.shortcut for case in golden_cases() if case.merge_alpha} == {"input", "middle"}


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
    monkeypatch.setattr(doctor, "golden_cases", lambda: (replace(case, tensors=wrong), *golden_cases()[1:]))
    assert main(["verify"]) == 1
    lines = capsys.readouterr().out.splitlines()
    failures = [line for line in lines if line.startswith("FAIL")]
    assert len(failures) == len(USABLE)
    assert all(case.name in line and "above 1e-10" in line for line in failures)


def test_nan_fails() -> None:
    case = golden_cases()[0]
    poisoned = {**case.tensors, "y.0": torch.full_like(case.tensors["y.0"], float("nan"))}
    assert doctor.check_case(replace(case, tensors=poisoned), "torch").failure is not None


def test_failing_backend_is_a_failed_check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("illegal instruction")

    monkeypatch.setattr(doctor, "chain_results", broken)
    assert main(["verify"]) == 1
    output = capsys.readouterr().out
    assert "RuntimeError: illegal instruction" in output
    assert f"0 of {len(USABLE) * len(golden_cases())} checks passed" in output


@pytest.mark.parametrize("case", golden_cases(), ids=lambda case: case.name)
def test_backend_without_float64_is_held_to_the_tolerance_rule(
    case: doctor.GoldenCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise ValueError("float64 is not supported")

    monkeypatch.setattr(doctor, "served_dtype", lambda *arguments: torch.float32)
    check = doctor.check_case(case, "torch")
    assert check.failure is None
    assert check.dtype == "float32"
    monkeypatch.undo()
    monkeypatch.setattr(select, "explain", refuse)
    assert doctor.served_dtype(case, "torch") is torch.float32


def test_float32_error_beyond_the_rule_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    case = golden_cases()[0]
    results = doctor.chain_results(case, "torch", torch.float32)
    results["dx"][1] *= 1 + 1e-5
    monkeypatch.setattr(doctor, "served_dtype", lambda *arguments: torch.float32)
    monkeypatch.setattr(doctor, "chain_results", lambda *arguments: results)
    failure = doctor.check_case(case, "torch").failure
    assert failure is not None
    assert "dx.1" in failure


def test_golden_tensors_are_left_as_they_were() -> None:
    case = golden_cases()[0]
    errors = [doctor.check_case(case, "torch").error for _ in range(2)]
    assert errors[0] == errors[1]
    assert not any(tensor.requires_grad for tensor in case.tensors.values())


def test_installation_without_golden_vectors_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "golden_cases", tuple)
    assert main(["verify"]) == 2
    assert "holds no golden vectors" in capsys.readouterr().err

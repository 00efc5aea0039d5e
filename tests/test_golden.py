"""The paper's released layers, reproduced to 1e-10 in float64 through every public path: values, gradients, merges."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from reslora_kernels import ResLoRALinear, apply_reslora, collect_statistics, link, merge_reslora, reference
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

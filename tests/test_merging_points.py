"""Lines of merging that could be changed one by one without a test noticing, until the tests here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reslora_kernels import ResLoRAConfig, apply_reslora, collect_statistics, export_peft, merge_reslora
from reslora_kernels.merge.closed_form import NEVER_RAN, cholesky_factor, relative_error
from reslora_kernels.merge.sequential import sequential_updates
from reslora_kernels.merge.statistics import LayerStatistics
from reslora_kernels.testing import relative_error as relative
from tests.models import randomize
from tests.test_gates import R, X, residual
from tests.test_single_points import Stack, adapted, linear, with_random_b


def test_a_merged_model_takes_no_joint_steps_for_its_export(tmp_path: Path) -> None:
    model = adapted("block")
    merge_reslora(model)
    with pytest.raises(ValueError, match="joint_steps"):
        export_peft(model, tmp_path / "peft", joint_steps=2)
    assert not (tmp_path / "peft").exists()


def test_statistics_count_the_batches_that_every_layer_saw() -> None:
    model = adapted("middle")
    with collect_statistics(model) as statistics:
        model(torch.randn(2, 6, dtype=torch.float64))
        with model.layers[0].chain.forward_pass():
            model.layers[0](torch.randn(2, 6, dtype=torch.float64))
    assert statistics.layers["layers.0"].calls == 2
    assert statistics.calls == 1


def test_a_layer_that_saw_zeros_only_merges_as_plain_lora() -> None:
    model = adapted("input")
    for one in model.layers:
        nn.init.zeros_(one.bias)
    plain = [one.weight + one.scaling * one.lora_B @ one.lora_A for one in model.layers]
    merge_reslora(model, "least_squares", calibration=[torch.zeros(3, 6, dtype=torch.float64)])
    for one, expected in zip(model.layers[1:], plain[1:], strict=True):  # layer 0 counts its own input twice
        torch.testing.assert_close(one.weight.data, expected.data)


def test_batches_that_do_not_come_again_are_refused() -> None:
    class Once:
        def __init__(self) -> None:
            self.left = [[torch.randn(3, 6, dtype=torch.float64)]]

        def __iter__(self) -> Iterator[Tensor]:
            return iter(self.left.pop() if self.left else [])

    with pytest.raises(ValueError, match="no batch on a second run"):
        merge_reslora(adapted("input"), calibration=Once(), sequential=True)


def test_statistics_keep_the_names_that_files_hold() -> None:
    model = adapted("middle")
    with collect_statistics(model, second_moments=True) as statistics:
        model(torch.randn(2, 6, dtype=torch.float64))
    assert list(statistics.layers["layers.1"].state_dict()) == [
        "calls", "x_norms", "h_norms", "gram", "cross", "shortcut_gram",
    ]  # fmt: skip


class TwoStacks(nn.Module):
    """A chain of three layers and one of two."""

    def __init__(self) -> None:
        super().__init__()
        self.long, self.short = Stack(3), Stack(2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.short(self.long(x))
        return y


class Routed(nn.Module):
    """Three blocks of a linear layer and two experts."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": linear(), "experts": nn.ModuleList([linear(), linear()])}) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block["up"](x))
            x = x + sum(expert(x) for expert in block["experts"])
        return x


def test_layer_by_layer_of_chains_of_different_lengths() -> None:
    torch.manual_seed(0)
    model = with_random_b(apply_reslora(TwoStacks(), ResLoRAConfig(r=2, shortcut="middle", target_modules=r".*\.\d")))
    batches = [torch.randn(40, 6, dtype=torch.float64)]
    report = merge_reslora(model, "least_squares", calibration=batches, sequential=True)
    for row in report.rows:
        first = row.name.endswith("0")
        assert row.relative_error is not None
        assert (row.method, row.relative_error > 0) == (("exact", False) if first else ("least_squares", True))


def test_layer_by_layer_experts_are_plain_lora() -> None:
    torch.manual_seed(0)
    model = apply_reslora(Routed(), ResLoRAConfig(r=2, shortcut="input", target_modules=r".*(up|experts\.\d)"))
    experts = [one for block in with_random_b(model).blocks for one in block["experts"]]
    expected = [one.weight + one.scaling * one.lora_B @ one.lora_A for one in experts]
    batches = [torch.randn(40, 6, dtype=torch.float64)]
    report = merge_reslora(model, "least_squares", calibration=batches, sequential=True)
    for one, weight in zip(experts, expected, strict=True):
        torch.testing.assert_close(one.weight.detach(), weight.detach(), rtol=1e-12, atol=1e-12)
    assert {row.method for row in report.rows if "experts" in row.name} == {"exact"}


def test_layer_by_layer_of_half_precision_is_fitted_in_single() -> None:
    torch.manual_seed(0)
    model, batches = adapted("middle").to(torch.bfloat16), [torch.randn(40, 6, dtype=torch.bfloat16)]
    chain = model.layers[0].chain
    updates = sequential_updates(model, [chain], batches, 1e-6)
    assert {updates[one].a.dtype for one in chain.layers[1:]} == {torch.float32}


def test_what_cannot_be_solved_for_is_named() -> None:
    few = [torch.randn(2, 6, dtype=torch.float64)]
    for sequential in (False, True):
        with pytest.raises(ValueError, match=r"layer \d of chain 'layers\.\*'|chain 'layers\.\*'"):
            merge_reslora(adapted("middle"), calibration=few, regularization=0.0, sequential=sequential)


def test_chains_of_one_layer_and_of_experts_alone_merge_layer_by_layer() -> None:
    batches = [torch.randn(40, 6, dtype=torch.float64)]
    single = apply_reslora(Stack(1), ResLoRAConfig(r=2, shortcut="input", target_modules=r"layers\.\d"))
    plain = apply_reslora(Stack(), ResLoRAConfig(r=2, shortcut="block", target_modules=r"layers\.\d"))
    for model, shape in ((single, [2]), (plain, [2, 4, 4])):
        layers = list(with_random_b(model).layers)
        updates = sequential_updates(model, [layers[0].chain], batches, 1e-6)
        assert [len(updates[one].a) for one in layers] == shape


def moments(shortcut: str, x: Tensor, v: Tensor | None, a: Tensor, **options: bool) -> LayerStatistics:
    statistics = LayerStatistics(
        ResLoRAConfig(r=len(a), shortcut=shortcut), tuple(a.shape), a, options.get("second_moments", True)
    )
    statistics.observe(x, a, v)
    return statistics


@pytest.mark.parametrize(("shortcut", "second_moments"), [("none", True), ("block", True), ("middle", False)])
def test_no_moments_are_held_where_nothing_is_fitted(shortcut: str, second_moments: bool) -> None:
    state = moments(shortcut, torch.ones(3, 4), None, torch.ones(2, 4), second_moments=second_moments).state_dict()
    assert set(state) == {"calls", "x_norms", "h_norms"}


def test_the_error_is_that_of_the_outputs_at_any_size_and_0_of_nothing() -> None:
    torch.manual_seed(0)
    x, v = torch.randn(20, 4, dtype=torch.float64) * 1e-3, torch.randn(20, 2, dtype=torch.float64) * 1e-3
    a, b, other = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 4), (3, 2), (2, 4)))
    exact = (x @ a.T + v) @ b.T
    expected = ((x @ other.T @ b.T - exact).norm() / exact.norm()).item()
    seen = moments("middle", x, v, a)
    assert relative_error(seen, a, b, other, b) == pytest.approx(expected, rel=1e-9)
    assert relative_error(seen, a, b * 0, other, b * 0) == 0.0


def test_moments_that_rounding_made_negative_are_raised_by_the_size_of_rounding() -> None:
    gram = torch.diag(torch.tensor([100.0, -1e-5]))
    factor = cholesky_factor(gram, 1e-12, "layer")
    raised = gram.double() + 4 * torch.finfo(torch.float32).eps * gram.double().norm() * torch.eye(2)
    torch.testing.assert_close(factor @ factor.T, raised, rtol=1e-12, atol=1e-12)


class Half(Stack):
    """Of its layers all but the last run."""

    def forward(self, x: Tensor, whole: bool = False) -> Tensor:
        for one in self.layers if whole else self.layers[:-1]:
            x = torch.tanh(one(x))
        return x


def half_run(shortcut: str, pre_num: int = 1) -> nn.Module:
    torch.manual_seed(0)
    config = ResLoRAConfig(r=2, shortcut=shortcut, pre_num=pre_num, target_modules=r"layers\.\d")
    example = {"x": torch.ones(1, 6, dtype=torch.float64), "whole": True}
    return with_random_b(apply_reslora(Half(4), config, example_inputs=example))


def test_layers_that_ran_once_are_fitted_beside_one_that_never_did() -> None:
    model, x = half_run("middle"), torch.randn(40, 6, dtype=torch.float64)
    report = merge_reslora(model, "least_squares", calibration=[x])
    assert [row.method for row in report.rows] == ["exact", "least_squares", "least_squares", NEVER_RAN]
    assert [row.relative_error is not None and row.relative_error > 0 for row in report.rows[1:3]] == [True, True]
    with pytest.raises(ValueError, match=r"layer 1 of chain 'layers\.\*'"):
        merge_reslora(half_run("middle"), "least_squares", calibration=[x[:2]], regularization=0.0)


def test_middle_over_no_earlier_block_merges_exactly_whether_it_ran_or_not() -> None:
    model = half_run("middle", 0)
    with collect_statistics(model) as statistics, torch.no_grad():
        model(torch.randn(40, 6, dtype=torch.float64))
    assert "gram" not in "".join(statistics.state_dict())
    report = merge_reslora(model, statistics=statistics)
    assert {(row.method, row.relative_error) for row in report.rows} == {("exact", 0.0)}


def test_statistics_go_on_in_another_process_and_only_of_the_same_layers() -> None:
    x = torch.randn(40, 6, dtype=torch.float64)
    model = adapted("middle")
    with collect_statistics(model) as first, torch.no_grad():
        model(x)
    state = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    with collect_statistics(model) as second, torch.no_grad():
        second.load_state_dict(state)
        model(2 * x)
    with collect_statistics(model) as both, torch.no_grad():
        model(x)
        model(2 * x)
    assert second.calls == 2
    torch.testing.assert_close(second.state_dict(), both.state_dict(), rtol=0, atol=0)
    for change, said in (
        ({"layers.7/calls": x}, "'layers.7' is no adapted layer"),
        ({"layers.1/gram": x}, "'layers.1'"),
    ):
        with collect_statistics(model) as fresh, pytest.raises(ValueError, match=said):
            fresh.load_state_dict(state | change)


@pytest.mark.parametrize(
    "merge",
    [{"method": "input"}, {"method": "weights"}, {}, {"sequential": True}, {"joint_steps": 4}],
    ids=["input", "weights", "least squares", "sequential", "joint"],
)
@pytest.mark.parametrize(("shortcut", "pre_num"), [("input", 1), ("middle", 2), ("middle", -1)])
def test_every_merge_weighs_the_terms(shortcut: str, pre_num: int, merge: dict[str, Any]) -> None:
    """With equal inputs in all layers a merge is exact, but for two that work with norms of other things than x."""
    torch.manual_seed(0)
    model: Any = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(8, 8).double() for _ in range(3))
    model.forward = lambda x: torch.cat([layer(x) for layer in model.layers], -1)
    config = ResLoRAConfig(r=R, lora_alpha=R, shortcut=shortcut, pre_num=pre_num, gates="rank")
    randomize(apply_reslora(model, config, example_inputs=X))
    before = model(X).detach()
    weights = [layer.weight.detach().clone() for layer in model.layers]
    report = merge_reslora(model, calibration=[X, X.flip(0)], regularization=0.0, **merge)
    method = merge.get("method")
    if (shortcut, method) not in (("input", "weights"), ("middle", "input")):
        assert relative(model(X), before) < 1e-8 and report.worst() < 1e-6
        return
    a, b = ([getattr(layer, name).detach() for layer in model.layers] for name in ("lora_A", "lora_B"))
    gates = [layer.lora_gates.detach()[:, :, None] for layer in model.layers]
    norms: list[Tensor] = []
    for n, layer in enumerate(model.layers):
        if method == "weights":
            shares = [norms[n - 2] / norms[n - 1] if n >= 2 else 1.0]
        else:
            shares = [(X @ a[n - k].T).norm() / (X @ a[n].T).norm() for k in range(1, len(gates[n]))]
        factor = gates[n][0] + sum(gates[n][k] * share for k, share in enumerate(shares, 1))
        assert relative(layer.weight, weights[n] + b[n] @ (factor * a[n])) < 1e-12
        norms.append(layer.weight.detach().norm())


def test_reported_errors_are_those_of_the_gated_layers() -> None:
    model = residual(shortcut="middle", pre_num=2)
    with torch.no_grad(), collect_statistics(model) as statistics:
        model(X)
    seen = []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, args, y: seen.append((args[0], y.detach())))
    model(X)
    report = merge_reslora(model, "weights", statistics=statistics)
    for n, (row, layer) in enumerate(zip(report.rows, model.layers, strict=True)):
        x, y = seen[n]
        term = y - nn.functional.linear(x, model._reslora.merged.originals[row.name], layer.bias)
        merged = nn.functional.linear(x, layer.weight, layer.bias) - y + term
        assert row.relative_error == pytest.approx(float((merged - term).norm() / term.norm()), abs=1e-9)

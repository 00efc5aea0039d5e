"""Every merge against the reference's equations, joint fits, and the error that a merge reports."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from reslora_kernels import (
    ResLoRAConfig,
    apply_reslora,
    checkpoint_context,
    collect_statistics,
    merge_reslora,
    reference,
)
from reslora_kernels.merge import joint_fit as joint
from reslora_kernels.merge import sequential as kept
from reslora_kernels.merge.closed_form import LowRankUpdate
from reslora_kernels.merge.sequential import Kept
from reslora_kernels.testing import max_error, relative_error

from .models import randomize

WIDTH, RANK, DEPTH = 12, 3, 5
INEXACT = [("input", 1), ("middle", 2), ("middle", -1)]
METHODS = ["input", "weights", "least_squares"]


class Residual(nn.Module):
    """A pre-norm residual stack; returns every layer's input and output."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        xs, ys = [], []
        for layer in self.layers:
            xs.append(nn.functional.layer_norm(x, (WIDTH,)))
            ys.append(layer(xs[-1]))
            x = x + torch.tanh(ys[-1])
        return xs, ys


def adapted(
    shortcut: str, pre_num: int, dtype: torch.dtype = torch.float64, kind: type[Residual] = Residual, **options
) -> Residual:
    torch.manual_seed(0)
    model = kind().to(dtype)
    config = ResLoRAConfig(r=RANK, lora_alpha=RANK, shortcut=shortcut, pre_num=pre_num, **options)
    apply_reslora(model, config, example_inputs=torch.zeros(1, WIDTH, dtype=dtype))
    for layer in model.layers:
        nn.init.normal_(layer.lora_B, std=0.3)
    return model


@pytest.mark.parametrize(("shortcut", "pre_num"), INEXACT)
def test_layers_alone_in_their_chains_merge_exactly_without_data(shortcut: str, pre_num: int) -> None:
    """Nothing is handed on: a last layer alone, or a model of one block."""
    torch.manual_seed(0)
    model = Residual().double()
    apply_reslora(model, ResLoRAConfig(r=RANK, shortcut=shortcut, pre_num=pre_num, target_modules=["layers.2"]))
    randomize(model)
    x = torch.randn(4, WIDTH, dtype=torch.float64)
    expected = model(x)[1][2]
    assert [row.method for row in merge_reslora(model).rows] == ["exact"]
    assert max_error(model(x)[1][2], expected) < 1e-14


def batches(seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 9, WIDTH, generator=generator, dtype=torch.float64).to(dtype) for _ in range(6)]


def pieces(model: Residual) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return tuple(
        [getattr(layer, name).detach().clone() for layer in model.layers] for name in ("weight", "lora_A", "lora_B")
    )


def reference_updates(model: Residual, shortcut: str, pre_num: int, method: str, data: list[Tensor]) -> list[Tensor]:
    weights, a, b = pieces(model)
    seen = [[x.detach() for x in model(batch)[0]] for batch in data]
    x_norms = [float(torch.stack([batch[n].norm() for batch in seen]).mean()) for n in range(DEPTH)]
    h_norms = [float(torch.stack([(batch[n] @ a[n].T).norm() for batch in seen]).mean()) for n in range(DEPTH)]
    if method == "least_squares":
        return reference.merge_least_squares(shortcut, pre_num, 1.0, seen, a, b)
    if method == "input":
        return reference.merge_input(shortcut, pre_num, 1.0, x_norms if shortcut == "input" else h_norms, a, b)
    if shortcut == "input":
        return reference.merge_weights_input(1.0, weights, a, b)
    return reference.merge_weights_middle(pre_num, 1.0, x_norms, a, b)


@pytest.mark.parametrize(("shortcut", "pre_num"), INEXACT)
@pytest.mark.parametrize("method", METHODS)
def test_merge_equals_the_table(shortcut: str, pre_num: int, method: str) -> None:
    model, data = adapted(shortcut, pre_num), batches(1)
    weights = pieces(model)[0]
    expected = [w + u for w, u in zip(weights, reference_updates(model, shortcut, pre_num, method, data), strict=True)]
    merge_reslora(model, method, calibration=data)
    for layer, weight in zip(model.layers, expected, strict=True):
        assert max_error(layer.weight, weight) < 1e-10


@pytest.mark.parametrize(("shortcut", "pre_num"), INEXACT)
@pytest.mark.parametrize("method", METHODS)
def test_reported_error_is_the_error_on_the_data(shortcut: str, pre_num: int, method: str) -> None:
    """‖s (x A*ᵀ - u) Bᵀ‖ / ‖s u Bᵀ‖ from the second moments equals the one measured by running the layers."""
    model, data = adapted(shortcut, pre_num), batches(2)
    weights, a, b = pieces(model)
    seen = [model(batch)[0] for batch in data]
    report = merge_reslora(model, method, calibration=data)
    for n, row in enumerate(report.rows):
        unmerged = [reference.low_rank_term(shortcut, pre_num, 1.0, n, xs, a, b) for xs in seen]
        merged = [xs[n] @ (model.layers[n].weight - weights[n]).T for xs in seen]
        assert row.relative_error == pytest.approx(relative_error(torch.cat(merged), torch.cat(unmerged)), abs=1e-6)
        assert row.rank == RANK


@pytest.mark.parametrize(("shortcut", "pre_num"), INEXACT)
def test_least_squares_is_best_on_the_calibration_data(shortcut: str, pre_num: int) -> None:
    """It minimises over all replacements of A, so no method of the paper can be better in any layer."""
    errors = {}
    for method in METHODS:
        report = merge_reslora(adapted(shortcut, pre_num), method, calibration=batches(3))
        errors[method] = [row.relative_error for row in report.rows]
    for n in range(1, DEPTH):
        assert errors["least_squares"][n] <= min(errors["input"][n], errors["weights"][n]) + 1e-6
    assert errors["least_squares"][0] == errors["input"][0] == 0


@pytest.mark.parametrize(("shortcut", "pre_num"), [("input", 1), ("middle", -1)])
def test_sequential_fits_each_layer_on_the_model_merged_before_it(shortcut: str, pre_num: int) -> None:
    """Layer n's A* solves the normal equations of x from the merged model and v from the unmerged one."""
    model, data = adapted(shortcut, pre_num), batches(4)
    weights, a, b = pieces(model)
    unmerged_xs = [[x.detach() for x in model(batch)[0]] for batch in data]
    merge_reslora(model, calibration=data, sequential=True)
    merged_xs = [[x.detach() for x in model(batch)[0]] for batch in data]  # x_n depends on layers before n only
    for n in range(1, DEPTH):
        x = torch.cat([xs[n].flatten(0, -2) for xs in merged_xs])
        window = [1] if shortcut == "input" else range(1, n + 1)
        parts = [
            torch.cat([xs[n - k].flatten(0, -2) for xs in unmerged_xs]) @ a[n if shortcut == "input" else n - k].T
            for k in window
        ]
        gram = x.T @ x
        gram += 1e-6 * gram.diagonal().mean() * torch.eye(WIDTH, dtype=x.dtype)
        fitted = a[n] + torch.linalg.solve(gram, x.T @ sum(parts)).T
        assert max_error(model.layers[n].weight, weights[n] + b[n] @ fitted) < 1e-9


class Last(Residual):
    """Returns the last layer's output alone, unless asked for all."""

    def forward(self, x: Tensor, whole: bool = False) -> Any:
        xs, ys = super().forward(x)
        return (xs, ys) if whole else ys[-1]


@pytest.mark.parametrize(("shortcut", "pre_num"), [("input", 1), ("middle", -1)])
def test_a_joint_fit_brings_the_output_nearer_and_reports_its_errors(shortcut: str, pre_num: int) -> None:
    data, distances = batches(4), {}
    for steps, rank in ((0, 0), (64, 0), (64, 2)):
        model = adapted(shortcut, pre_num, kind=Last)
        weights, wanted = pieces(model)[0], [model(batch).detach() for batch in data]
        xs, ys = model(torch.cat(data), whole=True)
        report = merge_reslora(model, calibration=data, joint_steps=steps, extra_rank=rank)
        distances[steps, rank] = sum(
            float(joint.distance(model(x), y, False)) for x, y in zip(data, wanted, strict=True)
        )
        for row, layer, weight, x, y in zip(report.rows, model.layers, weights, xs, ys, strict=True):
            low_rank = y - nn.functional.linear(x, weight, layer.bias)
            error = relative_error(x @ (layer.weight - weight).T, low_rank)
            assert row.relative_error == pytest.approx(error, rel=1e-6, abs=1e-7)
            assert row.rank == RANK + rank
    assert distances[64, 0] < 0.7 * distances[0, 0]
    assert distances[64, 2] < 0.95 * distances[64, 0]


def test_a_wider_update_starts_as_it_was_with_the_directions_of_the_largest_gradients() -> None:
    model, data = adapted("middle", 2, kind=Last), batches(4)
    with torch.no_grad(), collect_statistics(model) as seen:
        for batch in data:
            model(batch)
    white = {}
    for n, layer in enumerate(model.layers):
        update = LowRankUpdate(layer.lora_A.detach(), layer.lora_B.detach(), layer.scaling, "exact", 0.0)
        white[layer] = joint._white(layer, update, seen.layers[f"layers.{n}"])
    rows = joint._new_rows(model, Kept(data, lambda batch: joint._unmerged_output(model, batch)), white, 2)
    deltas = {layer: (one.b @ one.update()[0]).detach().requires_grad_() for layer, one in white.items()}
    wanted = [model(batch).detach() for batch in data]
    identity = torch.eye(WIDTH, dtype=torch.float64)
    with joint.replaced({layer: (identity, delta) for layer, delta in deltas.items()}):
        sum(joint.distance(model(x), y, False) for x, y in zip(data, wanted, strict=True)).backward()
    for layer, one in white.items():
        wider = one.wider(rows[layer])
        assert max_error(wider.b @ wider.update()[0], deltas[layer]) < 1e-12
        expected = torch.linalg.svd(deltas[layer].grad @ one.unwhiten.T)[2][:2]
        added = wider.update()[0][-2:] @ torch.linalg.inv(one.unwhiten)
        cosines = nn.functional.normalize(added, dim=1) @ expected.T
        assert max_error(cosines.abs(), torch.eye(2, dtype=torch.float64)) < 1e-2
        assert added.square().mean().sqrt() == pytest.approx(one.sizes[0])


def test_a_joint_fit_that_brings_the_output_no_nearer_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint, "RATES", {"a": 1e3, "b": 1e3})
    plain, dropped = adapted("middle", -1, kind=Last), adapted("middle", -1, kind=Last)
    merge_reslora(plain, calibration=batches(4))
    merge_reslora(dropped, calibration=batches(4), joint_steps=8)
    assert all(map(torch.equal, pieces(plain)[0], pieces(dropped)[0]))


def test_a_wider_fit_that_fails_is_tried_with_smaller_rows_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    for sizes, same, rank in (((1e4, 0.1), (0.1,), 2), ((1e4, 1e4), (), 0)):
        merged = []
        for tried in (sizes, same):
            monkeypatch.setattr(joint, "NEW_ROWS", tried)
            model = adapted("middle", -1, kind=Last)
            extra_rank = 2 if tried else 0
            report = merge_reslora(model, calibration=batches(4), joint_steps=24, extra_rank=extra_rank)
            assert {(row.method, row.rank) for row in report.rows} == {("joint", RANK + rank)}
            merged.append(pieces(model)[0])
        assert all(map(torch.equal, *merged))


class Checkpointed(Last):
    """``Last`` with every layer checkpointed."""

    context_fn = staticmethod(noop_context_fn)

    def forward(self, x: Tensor, whole: bool = False) -> Any:
        y = x
        for layer in self.layers:
            normed = nn.functional.layer_norm(x, (WIDTH,))
            y = checkpoint(layer, normed, use_reentrant=False, context_fn=self.context_fn)
            x = x + torch.tanh(y)
        return y


@pytest.mark.parametrize("case", ["checkpointed", "inference_mode"])
def test_a_joint_fit_is_the_same_with_checkpointed_layers_and_in_inference_mode(case: str) -> None:
    plain, model = adapted("middle", 2, kind=Last), adapted("middle", 2, kind=Last)
    if case == "checkpointed":
        model = adapted("middle", 2, kind=Checkpointed)
        model.context_fn = checkpoint_context(model)
    merge_reslora(plain, calibration=batches(4), joint_steps=8, extra_rank=2)
    with torch.inference_mode(case == "inference_mode"):
        report = merge_reslora(model, calibration=batches(4), joint_steps=8, extra_rank=2)
    assert {row.method for row in report.rows} == {"joint"}
    assert all(max_error(*pair) < 1e-12 for pair in zip(pieces(model)[0], pieces(plain)[0], strict=True))


def test_first_directions_are_the_singular_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 40, generator=generator, dtype=torch.float64)).Q for n in (48, 96))
    matrix = (u * 0.8 ** torch.arange(40)) @ v.T
    found = joint._first_directions(matrix, 4)
    assert max_error((found @ v[:, :4]).abs(), torch.eye(4, dtype=torch.float64)) < 1e-3
    assert joint._first_directions(matrix, 0).shape == (0, 96)
    assert joint._first_directions(torch.zeros(6, 9), 4).isfinite().all()


def test_an_update_is_no_wider_than_the_weight() -> None:
    report = merge_reslora(adapted("middle", 2, kind=Last), calibration=batches(4), joint_steps=2, extra_rank=100)
    assert {row.rank for row in report.rows} == {WIDTH}


@pytest.mark.parametrize("values", [0, 1, 2])  # that there is room for
def test_what_is_kept_is_what_was_computed(values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "BYTES", 4 * values)
    written_over, computed = torch.zeros(1), []

    def compute(batch: float) -> Tensor:
        computed.append(batch)
        return written_over.fill_(batch)

    pairs = Kept([1.0, 2.0, 3.0], compute)
    for _ in range(2):
        assert [(batch, float(value)) for batch, value in list(pairs)] == [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)]
    assert computed == [1.0, 2.0, 3.0, *[1.0, 2.0, 3.0][values:]]


class Loader:
    """Batches that may be others in another run through them, as a shuffling DataLoader's are."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(batches(4))


@pytest.mark.parametrize("way", ["sequential", "joint"])
def test_the_unmerged_model_runs_once_a_batch_where_it_may(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, weights = [], []
    for room, calibration in ((2**30, batches(4)), (0, batches(4)), (2**30, Loader())):
        monkeypatch.setattr(kept, "BYTES", room)
        model, count = adapted("middle", 2, kind=Last), [0]
        model.register_forward_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        options = {"sequential": True} if way == "sequential" else {"joint_steps": 8, "extra_rank": 2}
        merge_reslora(model, calibration=calibration, **options)
        calls.append(count[0])
        weights.append(pieces(model)[0])
    if way == "sequential":
        before, merged = 0, 6 * (DEPTH - 1)  # at each position but the first
    else:
        before, merged = 6, 6 + 6 + 8 + 6  # statistics; the distance before, the directions, the steps, the distance
    assert calls == [before + 6 + merged, before + 2 * merged, before + 2 * merged]
    assert all(torch.equal(*pair) for other in weights[1:] for pair in zip(weights[0], other, strict=True))


class Padded(Last):
    """Returns logits of a batch with a mask, padded or not."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Any:
        return {"logits": super().forward(x)}


def test_a_joint_fit_leaves_out_what_the_mask_hides() -> None:
    updates = []
    for noise in (0.0, 1.0):
        model = adapted("middle", 2, kind=Padded)
        mask = torch.arange(9) < torch.tensor([[9], [4], [7], [2]])
        data = [{"x": x, "attention_mask": mask} for x in batches(4)]
        with torch.no_grad(), collect_statistics(model) as seen:
            for batch in data:
                model(**batch)
        layers = {layer: seen.layers[f"layers.{n}"] for n, layer in enumerate(model.layers)}
        plain = {
            layer: LowRankUpdate(layer.lora_A.detach(), layer.lora_B.detach(), 1.0, "exact", 0.0)
            for layer in model.layers
        }
        for batch in data:
            batch["x"] = torch.where(mask[..., None], batch["x"], noise)
        fitted = joint.joint_updates(model, plain, layers, data, 8)
        updates.append([matrix for update in fitted.values() for matrix in (update.a, update.b)])
    assert all(map(torch.equal, *updates))


def test_a_joint_fit_in_float16_keeps_the_small_gradients_of_many_tokens() -> None:
    class Head(Last):
        def forward(self, x: Tensor, whole: bool = False) -> Any:
            return {"logits": 0.01 * super().forward(x).repeat(256, 1, 1)}

    report = merge_reslora(
        adapted("middle", -1, torch.float16, Head),
        calibration=[x.half() for x in batches(4)],
        joint_steps=64,
        extra_rank=2,
    )
    assert {row.method for row in report.rows} == {"joint"}


def test_a_joint_fit_compares_logits_as_distributions() -> None:
    found, wanted = torch.randn(2, 2, 5, 7, generator=torch.Generator().manual_seed(0)).unbind()
    p, q = wanted.softmax(-1), found.softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean()
    output = {"loss": torch.zeros(()), "past": [torch.zeros(2, 2)], "logits": found}
    assert torch.equal(joint.output_of(output)[0], found.flatten(0, 1)) and joint.output_of(output)[1]
    assert joint.distance(*(joint.output_of({"logits": t})[0] for t in (found, wanted)), True).allclose(expected)
    shown = {"attention_mask": torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])}  # the rest is padding
    assert torch.equal(joint.output_of(output, shown)[0], torch.cat((found[0, :2], found[1])))
    assert len(joint.output_of({"logits": found[0]}, shown)[0]) == 5  # a row a text
    translated = SimpleNamespace(logits=found, encoder_last_hidden_state=found)
    assert len(joint.output_of(translated, shown)[0]) == 10  # the mask is the encoder's
    assert len(joint.output_of(translated, {"decoder_attention_mask": shown["attention_mask"]})[0]) == 7
    for other in (torch.zeros(4), torch.zeros(2, 1), torch.zeros(2, 3, 4, 4)):  # rewards, regression, pixels
        assert joint.output_of({"logits": other}) == (other, False)
    assert joint.output_of((torch.zeros(()), torch.ones(3, 3, dtype=torch.long), wanted)) == (wanted, False)
    with pytest.raises(TypeError, match="returns logits or another tensor, got int"):
        joint.output_of(3)


@pytest.mark.parametrize(("shortcut", "pre_num"), [("none", 0), ("block", 1), ("block", -1), ("middle", 0)])
def test_exact_merges_need_no_data_and_lose_nothing(shortcut: str, pre_num: int) -> None:
    model, x = adapted(shortcut, pre_num), batches(6)[0]
    expected = model(x)[1]
    report = merge_reslora(model)
    assert report.worst() == 0
    for actual, truth in zip(model(x)[1], expected, strict=True):
        assert max_error(actual, truth) < 1e-13


def test_statistics_keep_the_last_batches_of_the_window() -> None:
    model = adapted("input", 1, norm_window=2)
    data = batches(7)
    with collect_statistics(model, second_moments=False) as statistics:
        for batch in data:
            model(batch)
    norms = [float(model(batch)[0][3].detach().norm()) for batch in data]
    assert statistics.calls == len(data)
    assert statistics.layers["layers.3"].norm_of_x() == pytest.approx(sum(norms[-2:]) / 2)
    with pytest.raises(ValueError, match="second moments"):
        merge_reslora(model, "least_squares", statistics=statistics)
    assert merge_reslora(model, "input", statistics=statistics).worst() == 0, "only layer 0's error is known"


def test_statistics_do_not_change_a_training_step() -> None:
    model, x = adapted("middle", -1, lora_dropout=0.2).train(), batches(8)[0]
    results = []
    for collecting in (False, True):
        torch.manual_seed(1)
        if collecting:
            with collect_statistics(model):
                loss = torch.stack(model(x)[1]).square().mean()
        else:
            loss = torch.stack(model(x)[1]).square().mean()
        results.append(torch.autograd.grad(loss, [layer.lora_A for layer in model.layers]))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
    assert all(layer.observer is None for layer in model.layers)


class Skipping(nn.Module):
    """A chain of five layers of which the third never runs, as a tower on batches without its modality."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, dtype=torch.float64) for _ in range(5))

    def forward(self, x: Tensor, whole: bool = False) -> Tensor:
        for n, layer in enumerate(self.layers):
            x = x + torch.tanh(layer(x)) if whole or n != 2 else x
        return x


@pytest.mark.parametrize(
    "way", [{}, {"method": "input"}, {"method": "weights"}, {"sequential": True}, {"joint_steps": 2}]
)
@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_layer_that_never_ran_merges_as_plain_lora(shortcut: str, way: dict[str, Any]) -> None:
    """The layer after it ran as layer 0, and so it merges: exactly."""
    x = torch.randn(4, 40, WIDTH, dtype=torch.float64)
    model = Skipping()
    config = ResLoRAConfig(r=3, lora_alpha=5, shortcut=shortcut, pre_num=1)
    apply_reslora(model, config, example_inputs={"x": x, "whole": True})
    randomize(model)
    before = copy.deepcopy(model.layers)
    report = merge_reslora(model, calibration=[x[:2], x[2:]], **way)
    assert [row.name for row in report.rows if "never ran" in row.method] == ["layers.2"]
    own = [config.scaling * layer.lora_B @ layer.lora_A for layer in before]
    delta = [layer.weight - old.weight for layer, old in zip(model.layers, before, strict=True)]
    assert torch.allclose(delta[2], own[2])
    if "joint_steps" not in way:
        assert torch.allclose(delta[3], own[3] * (2 if shortcut == "input" else 1), rtol=1e-4)

"""DoRA, AdaLoRA's schedule, ReLoRA's restarts and LoRA+ with ResLoRA; against PEFT where it has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from reslora_kernels import (
    RankAllocator,
    ResLoRAConfig,
    add_adapter,
    apply_reslora,
    export_peft,
    load_adapter,
    load_peft_adapter,
    loraplus_groups,
    merge_reslora,
    restart_reslora,
    save_adapter,
    unmerge_reslora,
)
from reslora_kernels.adapt.record import adapted_layers
from reslora_kernels.layers.initialization import row_norms
from reslora_kernels.testing import relative_error
from reslora_kernels.training import AdapterCheckpoints

from .models import FAMILIES, llama, logits, randomize, train
from .test_gates import residual

SHORTCUTS = ("none", "input", "block", "middle")
LLAMA = FAMILIES["llama"]
BATCH = LLAMA.batch(5)
ROUNDING = 1e-9  # float64


def adapted(shortcut: str = "block", base: nn.Module | None = None, **changes: Any) -> nn.Module:
    config = ResLoRAConfig(**({"r": 4, "lora_alpha": 6, "shortcut": shortcut, "pre_num": 2} | changes))
    return apply_reslora(llama().double() if base is None else base, config)


def with_magnitudes(shortcut: str, **changes: Any) -> nn.Module:
    return randomize(adapted(shortcut, use_dora=True, **changes))


def test_norms_of_rows() -> None:
    torch.manual_seed(0)
    w, a, b = (torch.randn(*shape, dtype=torch.float64) for shape in ((12, 20), (3, 20), (12, 3)))
    expected = torch.linalg.vector_norm(w + 1.5 * b @ a, dim=1)
    torch.testing.assert_close(row_norms(w, a, b, 1.5), expected)
    assert row_norms(torch.zeros(2, 4), torch.zeros(1, 4), torch.zeros(2, 1), 1.0).gt(0).all()


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_dora_starts_as_the_base_model(shortcut: str) -> None:
    model = adapted(shortcut, use_dora=True)
    assert relative_error(logits(model), logits(llama().double())) < ROUNDING
    model(**BATCH).loss.backward()
    assert all(layer.lora_magnitude_vector.grad.any() for layer in adapted_layers(model).values())


def test_dora_is_that_of_peft(tmp_path: Path) -> None:
    """Values, all gradients, and both ways through files."""
    model = with_magnitudes("none")
    export_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama().double(), tmp_path, is_trainable=True, autocast_adapter_dtype=False)
    assert relative_error(logits(theirs), logits(model)) < ROUNDING
    model(**BATCH).loss.backward()
    theirs(**BATCH).loss.backward()
    modules = dict(theirs.base_model.model.named_modules())
    for name, layer in adapted_layers(model).items():
        other = modules[name]
        magnitude = other.lora_magnitude_vector["default"].weight
        s = layer.scaling  # the export folds it into B
        for own, their in (
            (layer.lora_A.grad, other.lora_A["default"].weight.grad),
            (layer.lora_B.grad, other.lora_B["default"].weight.grad * s),
            (layer.lora_magnitude_vector.grad, magnitude.grad),
        ):
            assert relative_error(own, their) < ROUNDING
    back = load_peft_adapter(llama().double(), tmp_path)
    assert relative_error(logits(back), logits(model)) < ROUNDING
    loaded: Any = llama().double()
    loaded.load_adapter(str(tmp_path))  # by Transformers, as diffusers does for text encoders
    assert relative_error(logits(loaded.eval()), logits(model)) < 1e-6


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_dora_saves_merges_and_exports(shortcut: str, tmp_path: Path) -> None:
    model = with_magnitudes(shortcut, init_lora_weights="olora" if shortcut == "block" else True)
    expected = logits(model)
    save_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(load_adapter(llama().double(), tmp_path / "adapter")), expected)
    with pytest.raises(ValueError, match="use_dora"):
        load_adapter(adapted(shortcut), tmp_path / "adapter")
    export_peft(model, tmp_path / "peft", calibration=[BATCH])
    merge_reslora(model, calibration=[BATCH])
    merged = logits(model)
    if shortcut in ("none", "block"):
        assert relative_error(merged, expected) < ROUNDING
    served = peft.PeftModel.from_pretrained(llama().double(), tmp_path / "peft", autocast_adapter_dtype=False)
    assert relative_error(logits(served), merged) < ROUNDING
    export_peft(model, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(llama().double(), tmp_path / "again", autocast_adapter_dtype=False)
    assert relative_error(logits(again), merged) < ROUNDING
    unmerge_reslora(model)
    assert torch.equal(logits(model), expected)


def test_dora_with_a_bias() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5))
    x = torch.randn(3, 6)
    expected = model(x)
    apply_reslora(model, ResLoRAConfig(r=2, use_dora=True), example_inputs=x)
    torch.testing.assert_close(model(x), expected)
    model[0].lora_magnitude_vector.data.mul_(3)
    torch.testing.assert_close(model(x), 3 * (expected - model[0].bias) + model[0].bias)


def test_budget_is_that_of_peft() -> None:
    from peft.tuners.adalora.layer import RankAllocator as Theirs

    config = peft.AdaLoraConfig(
        init_r=6, target_r=2, tinit=5, tfinal=10, total_step=60, deltaT=4, target_modules=["q_proj"]
    )
    base = peft.get_peft_model(llama(), config)
    theirs = Theirs(base, config, "default")
    ours = RankAllocator(
        adapted(r=6, target_modules=["q_proj"]), target_r=2, tinit=5, tfinal=10, total_step=60, deltaT=4
    )
    assert [ours.budget(step) for step in range(1, 61)] == [theirs.budget_schedule(step) for step in range(1, 61)]


@pytest.mark.parametrize("shortcut", ["block", "middle"])
def test_ranks_are_allocated_within_the_budget_and_stay(shortcut: str) -> None:
    model = randomize(adapted(shortcut, llama(), r=4, target_modules=["q_proj", "v_proj", "up_proj"])).train()
    layers = adapted_layers(model)
    allocator = RankAllocator(model, target_r=2, tinit=2, tfinal=4, total_step=12)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(1, 13):
        LLAMA.loss(model, LLAMA.batch(step)).backward()
        optimizer.step()
        allocator.step()
        optimizer.zero_grad()
        left = {name: int((layer.lora_B != 0).any(0).sum()) for name, layer in layers.items()}
        assert left == allocator.rank_pattern()
        assert sum(left.values()) == allocator.budget(step)[0]
    assert sum(left.values()) == 2 * len(layers)
    assert len(set(left.values())) > 1, "all layers the same: nothing was allocated"


def test_the_most_sensitive_triplets_stay() -> None:
    """One step, so that importance is |w dL/dw|² up to a factor, worked out here by hand."""
    model = randomize(adapted("none", llama(), r=4, target_modules=["q_proj"]))
    layers = adapted_layers(model)
    allocator = RankAllocator(model, target_r=1, total_step=2, tfinal=1)
    for _ in range(2):
        model.zero_grad()
        model(**BATCH).loss.backward()
        scores = torch.stack(
            [
                (layer.lora_A * layer.lora_A.grad).square().mean(1)
                + (layer.lora_B * layer.lora_B.grad).square().mean(0)
                for layer in layers.values()
            ]
        )
        if allocator.steps == 0:
            first = scores
        allocator.step()
    best = first.flatten().topk(3).indices
    kept = torch.stack(list(allocator.keep.values())).flatten().nonzero().flatten()
    assert set(kept.tolist()) == set(best.tolist())


def test_restart_keeps_what_was_learnt_and_adds_rank() -> None:
    base, model = llama(), adapted("block", llama(), target_modules=["q_proj", "up_proj"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for round_ in range(2):
        for step in range(4):
            optimizer.zero_grad()
            LLAMA.loss(model, LLAMA.batch(10 * round_ + step)).backward()
            optimizer.step()
        before = logits(model)
        restart_reslora(model, optimizer)
        assert relative_error(logits(model), before) < 1e-4
        assert not any(layer.lora_B.any() for layer in adapted_layers(model).values())
        assert all(parameter not in optimizer.state for parameter in model.parameters())
    name = "model.layers.0.mlp.up_proj"
    change = model.get_submodule(name).weight - base.get_submodule(name).weight
    assert torch.linalg.matrix_rank(change, atol=1e-4) == 8  # twice r: layer 0 has no window
    assert train(model, LLAMA, 4)[1] < LLAMA.loss(model, LLAMA.batch(100)).item() + 1


def test_restarted_models_are_saved_whole(tmp_path: Path) -> None:
    model = randomize(adapted("block"))
    restart_reslora(model)
    for save in (save_adapter, export_peft):
        with pytest.raises(ValueError, match="restarted"):
            save(model, tmp_path)
    other = adapted("block")
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))


def test_refused() -> None:
    model = randomize(adapted("middle"))
    before = logits(model)
    grouped = apply_reslora(nn.Sequential(nn.Conv1d(4, 4, 3, groups=2)), ResLoRAConfig(r=4, target_modules=["0"]))
    for call, error, message in (
        (lambda: restart_reslora(model), ValueError, "needs data"),
        (lambda: restart_reslora(model, "adam"), TypeError, "optimizer must be"),
        (lambda: restart_reslora(model, keep_original=True), TypeError, "it takes no keep_original"),
        (lambda: restart_reslora(with_magnitudes("none")), ValueError, "use_dora"),
        (lambda: restart_reslora(add_adapter(adapted(), "b", ResLoRAConfig())), ValueError, "share the weights"),
        (lambda: RankAllocator(model, target_r=4, total_step=9), ValueError, "target_r must be below the mean rank 4"),
        (lambda: RankAllocator(model, target_r=2, total_step=9, tfinal=9), ValueError, "must be less than total_step"),
        (lambda: RankAllocator(model, target_r=2, total_step=9, beta1=1.0), ValueError, "beta1"),
        (lambda: RankAllocator(grouped, target_r=2, total_step=9), ValueError, "'0' is a convolution with groups"),
        (lambda: RankAllocator(model, target_r=2.5, total_step=9), TypeError, "target_r must be an int"),
        (lambda: RankAllocator(model, target_r=2, total_step=9).step(), RuntimeError, "has no gradients"),
        (lambda: ResLoRAConfig(use_dora=1), TypeError, "use_dora must be True or False"),
    ):
        with pytest.raises(error, match=message):
            call()
    assert torch.equal(logits(model), before)


RATES = {"lr": 1e-3, "loraplus_lr_ratio": 16.0, "weight_decay": 0.1}


def rates_of(groups: list[dict[str, Any]], names: dict[int, str]) -> dict[str, tuple[float, float]]:
    return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


@pytest.mark.parametrize("bias", ["none", "lora_only"])
def test_groups_are_those_of_peft(bias: str) -> None:
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    def base() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))

    theirs = peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules=["0", "2"], bias=bias))
    made = create_loraplus_optimizer(theirs, torch.optim.AdamW, **{**RATES, "loraplus_weight_decay": 0.1})
    names = {
        id(p): n.removeprefix("base_model.model.").replace(".default.weight", "").replace("base_layer.", "")
        for n, p in theirs.named_parameters()
    }
    ours = base()
    apply_reslora(
        ours, ResLoRAConfig(r=2, target_modules=["0", "2"], bias=bias, shortcut="none"), example_inputs=torch.ones(1, 8)
    )
    groups = loraplus_groups(ours, **RATES)
    own_names = {id(p): n for n, p in ours.named_parameters()}
    expected = rates_of(made.param_groups, names)
    assert rates_of(groups, own_names) == {name: pytest.approx(rates) for name, rates in expected.items()}


def test_b_moves_by_the_ratio() -> None:
    model = apply_reslora(llama(), ResLoRAConfig(r=2, target_modules=["q_proj", "v_proj"], shortcut="input"))
    optimizer = torch.optim.SGD(loraplus_groups(model, lr=0.1, loraplus_lr_ratio=4, weight_decay=0.0))
    layer = model.model.layers[0].self_attn.q_proj
    before = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
    for p in (layer.lora_A, layer.lora_B):
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(before[0] - layer.lora_A, torch.full_like(before[0], 0.1))
    torch.testing.assert_close(before[1] - layer.lora_B, torch.full_like(before[1], 0.4))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lr": 0}, ValueError, "lr must be a finite number above 0, got 0"),
        ({"loraplus_lr_ratio": float("inf")}, ValueError, "loraplus_lr_ratio must be a finite number above 0, got inf"),
        ({"loraplus_lr_ratio": "16"}, TypeError, "loraplus_lr_ratio must be a finite number above 0, got '16'"),
        ({"weight_decay": -1}, ValueError, "weight_decay must be a finite number of 0 or more, got -1"),
        ({"model": "llama"}, TypeError, "model must be an nn.Module, got str"),
        ({"model": nn.Linear(2, 2)}, ValueError, "model has no ResLoRALinear that trains"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"model": nn.Linear(2, 2), **RATES, **change}
    with pytest.raises(error, match=message):
        loraplus_groups(arguments.pop("model"), **arguments)


def test_weight_decay_leaves_gates_alone() -> None:
    model = residual(shortcut="block")
    gates = {id(layer.lora_gates) for layer in model.layers}
    groups = loraplus_groups(model, lr=1e-3, loraplus_lr_ratio=8, weight_decay=0.1)
    of_gates = [group for group in groups if gates & {id(p) for p in group["params"]}]
    assert [(group["lr"], group["weight_decay"], len(group["params"])) for group in of_gates] == [(1e-3, 0.0, 4)]
    assert sum(len(group["params"]) for group in groups) == 3 * 4

    class Base:
        def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
            return [name for name, _ in model.named_parameters()]

    class Trainer(AdapterCheckpoints, Base):
        def __init__(self) -> None:
            """Without a Trainer's arguments."""

    decayed = Trainer().get_decay_parameter_names(model)
    assert "layers.0.lora_A" in decayed and not any("gates" in name for name in decayed)

"""What ResLoRA shares with PEFT's LoRA is what PEFT does: patterns of ranks, ways to start, modules trained whole."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from reslora_kernels import ResLoRAConfig, apply_reslora, export_peft, load_adapter, merge_reslora, save_adapter
from reslora_kernels.adapt.record import adapted_layers, record_of
from reslora_kernels.testing import relative_error

from .models import FAMILIES, llama, logits, randomize, roberta

SHORTCUTS = ("none", "input", "block", "middle")
STARTS = ("pissa", "pissa_niter_8", "olora")
ROUNDING = 1e-9  # float64; the same algebra in another order
BATCH = FAMILIES["llama"].batch(5)


def adapted(shortcut: str = "none", **changes: Any) -> nn.Module:
    return apply_reslora(
        llama().double(), ResLoRAConfig(**({"r": 4, "lora_alpha": 6, "shortcut": shortcut, "pre_num": 2} | changes))
    )


def of_peft_by_name(model: nn.Module) -> dict[str, Any]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }


def test_patterns_mean_the_layers_that_peft_gives_them_to() -> None:
    patterns: dict[str, Any] = {
        "rank_pattern": {"q_proj": 2, r".*layers\.1\.mlp\.(up|gate)_proj": 3, "model.layers.2.self_attn.o_proj": 5},
        "alpha_pattern": {"v_proj": 3, r"layers\.0\..*": 9},
    }
    reference = peft.get_peft_model(
        llama(), peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", use_rslora=True, **patterns)
    )
    expected = {
        name: (module.r["default"], module.scaling["default"]) for name, module in of_peft_by_name(reference).items()
    }
    model = adapted(use_rslora=True, **patterns)
    assert {name: (layer.config.r, layer.scaling) for name, layer in adapted_layers(model).items()} == expected


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_ranks_of_a_pattern_train_merge_save_and_load(shortcut: str, tmp_path: Path) -> None:
    patterns: dict[str, Any] = {
        "rank_pattern": {"layers.1.self_attn.q_proj": 7, "v_proj": 2},
        "alpha_pattern": {"up_proj": 2},
    }
    model = randomize(adapted(shortcut, **patterns))
    chains = {chain.name: [layer.config.r for layer in chain.layers] for chain in record_of(model).chains}
    assert sorted(ranks for name, ranks in chains.items() if ".q_proj" in name) == [[4, 4], [7]]
    assert chains["model.layers.*.self_attn.v_proj"] == [2, 2, 2]
    expected = logits(model)
    save_adapter(model, tmp_path)
    assert torch.equal(logits(load_adapter(llama().double(), tmp_path)), expected)
    other = randomize(adapted(shortcut, **(patterns | {"rank_pattern": {"v_proj": 2}})))
    with pytest.raises(ValueError, match="rank_pattern"):
        load_adapter(other, tmp_path)
    report = merge_reslora(model, calibration=[BATCH])
    if shortcut in ("none", "block"):
        assert relative_error(logits(model), expected) < ROUNDING
    assert {row.name: row.rank for row in report.rows}["model.layers.1.self_attn.q_proj"] == 7


@pytest.mark.parametrize("init", STARTS)
def test_starts_of_peft(init: str) -> None:
    """Float32, which is what PEFT computes them in."""
    torch.manual_seed(3)
    model = apply_reslora(llama(), ResLoRAConfig(r=4, lora_alpha=6, shortcut="none", init_lora_weights=init))
    torch.manual_seed(3)
    reference = peft.get_peft_model(
        llama(), peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=init)
    )
    theirs = of_peft_by_name(reference)
    for name, layer in adapted_layers(model).items():
        a, b = theirs[name].lora_A["default"].weight, theirs[name].lora_B["default"].weight
        if "niter" in init:  # random: as large a part of the weight, not the same
            assert (layer.lora_B @ layer.lora_A).norm().item() == pytest.approx((b @ a).norm().item(), rel=0.1)
        else:
            assert relative_error(layer.lora_B @ layer.lora_A, b @ a) < 1e-5
        with torch.no_grad():  # trained alike, they are the same model
            for own, other in ((layer.lora_A, a), (layer.lora_B, b)):
                change = 0.1 * torch.randn_like(own)
                own.add_(change)
                other.add_(change)
    if "niter" not in init:
        assert relative_error(logits(model), logits(reference)) < 1e-5


def test_gaussian_start() -> None:
    torch.manual_seed(3)
    layers = adapted_layers(adapted(init_lora_weights="gaussian")).values()
    assert not any(bool(layer.lora_B.any()) for layer in layers)
    values = torch.cat([layer.lora_A.detach().flatten() for layer in layers])
    assert values.std() == pytest.approx(1 / 4, rel=0.05)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_a_start_from_the_weights_changes_nothing_and_is_kept(shortcut: str, start: str, tmp_path: Path) -> None:
    model = adapted(shortcut, init_lora_weights=start, rank_pattern={"k_proj": 2})
    base = llama().double()
    assert relative_error(logits(model), logits(base)) < ROUNDING
    for name, layer in adapted_layers(model).items():
        assert torch.equal(layer.weight, base.get_submodule(name).weight)
    randomize(model)
    expected = logits(model)
    save_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(load_adapter(llama().double(), tmp_path / "adapter")), expected)
    assert torch.equal(
        logits(
            load_adapter(adapted(shortcut, init_lora_weights="olora", rank_pattern={"k_proj": 2}), tmp_path / "adapter")
        ),
        expected,
    )
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), expected)
    report = export_peft(model, tmp_path / "peft", calibration=[BATCH])
    assert report.max_lora_rank == (24 if shortcut == "block" else 8)
    exported = peft.PeftModel.from_pretrained(base, tmp_path / "peft", autocast_adapter_dtype=False)
    merge_reslora(model, calibration=[BATCH])
    assert relative_error(logits(exported), logits(model)) < ROUNDING
    if shortcut in ("none", "block"):
        assert relative_error(logits(model), expected) < ROUNDING


def test_a_start_trains_only_a_and_b() -> None:
    model = adapted("middle", init_lora_weights="pissa")
    starts = {name: p.clone() for name, p in model.named_parameters() if "start_" in name}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss = model(**BATCH).loss
    loss.backward()
    optimizer.step()
    assert model(**BATCH).loss.item() < loss.item()
    assert len(starts) == 2 * len(adapted_layers(model))
    assert all(torch.equal(p, starts[name]) for name, p in model.named_parameters() if name in starts)


def test_modules_to_save(tmp_path: Path) -> None:
    config = ResLoRAConfig(r=4, shortcut="block", target_modules=["query", "value"], modules_to_save=["classifier"])
    model = apply_reslora(roberta(), config)
    whole = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert whole == {name for name, _ in model.named_parameters() if name.startswith("classifier.")}
    reference = peft.get_peft_model(
        roberta(), peft.LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"])
    )
    theirs = {
        name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
        for name, p in reference.named_parameters()
        if p.requires_grad and "lora_" not in name
    }
    assert whole == theirs
    randomize(model)
    with torch.no_grad():
        model.classifier.out_proj.weight.add_(1)
    batch = FAMILIES["roberta"].batch(5)
    save_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(load_adapter(roberta(), tmp_path / "adapter"), batch), logits(model, batch))
    export_peft(model, tmp_path / "peft")
    exported = peft.PeftModel.from_pretrained(roberta(), tmp_path / "peft")
    merge_reslora(model)
    torch.testing.assert_close(logits(exported, batch), logits(model, batch), rtol=1e-4, atol=1e-4)


def test_all_linear_leaves_modules_to_save_alone() -> None:
    model = apply_reslora(roberta(), ResLoRAConfig(modules_to_save=["classifier"]))
    assert not any(name.startswith("classifier") for name in adapted_layers(model))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank_pattern": {"qproj": 4}}, "rank_pattern key 'qproj' matches no adapted layer"),
        ({"alpha_pattern": {"lm_head": 4}}, "alpha_pattern key 'lm_head' matches no adapted layer"),
        ({"modules_to_save": ["score"]}, "modules_to_save: 'score' matches no module"),
        ({"target_modules": ["embed_tokens"]}, "An embedding can be trained whole: name it in modules_to_save"),
        ({"init_lora_weights": "olora", "r": 64}, "needs r of at most"),
    ],
)
def test_refused_and_left_as_it_was(changes: dict[str, Any], message: str) -> None:
    model = llama()
    before = {name: (p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        apply_reslora(model, ResLoRAConfig(**changes))
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(p.requires_grad == before[name][0] and torch.equal(p, before[name][1]) for name, p in after.items())

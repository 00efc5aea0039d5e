"""What ResLoRA shares with PEFT's LoRA: adapters to start from, patterns of ranks, ways to start, whole modules."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reslora_kernels import (
    ResLoRAConfig,
    apply_reslora,
    export_peft,
    load_adapter,
    load_peft_adapter,
    merge_reslora,
    save_adapter,
)
from reslora_kernels.adapt.record import adapted_layers, record_of
from reslora_kernels.testing import relative_error

from .models import FAMILIES, llama, logits, randomize, roberta
from .test_damaged_adapters import assert_unchanged, state

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
        (
            {"target_modules": ["norm"]},
            "a LlamaRMSNorm; .* Another module can be trained whole: name it in modules_to_save",
        ),
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


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

KINDS: dict[str, dict[str, Any]] = {
    "names": {"target_modules": ["q_proj", "v_proj"]},
    "patterns": {
        "target_modules": "all-linear",
        "use_rslora": True,
        "rank_pattern": {"layers.1.mlp.up_proj": 2, "v_proj": 6},
        "alpha_pattern": {"v_proj": 5, "not_there": 3},
    },
    "some layers": {"target_modules": r".*layers\.[02]\..*(q|down)_proj", "lora_dropout": 0.1},
    "biases": {"target_modules": ["q_proj"], "bias": "all"},
    "a head": {"target_modules": ["o_proj"], "modules_to_save": ["lm_head"]},
}


def trained_by_peft(folder: Path, **changes: Any) -> PeftModel:
    model = get_peft_model(llama(), LoraConfig(**({"r": 4, "lora_alpha": 6} | changes)))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_computes_what_peft_does_and_goes_back(kind: str, tmp_path: Path) -> None:
    theirs = trained_by_peft(tmp_path / "theirs", **KINDS[kind])
    model = load_peft_adapter(llama(), tmp_path / "theirs")
    assert relative_error(logits(model), logits(theirs)) < 1e-5
    trained = {name for name, p in theirs.named_parameters() if p.requires_grad and "lora_" not in name}
    assert sum(p.requires_grad and "lora_" not in n for n, p in model.named_parameters()) == len(trained)
    export_peft(model, tmp_path / "back", pattern=True)
    again = PeftModel.from_pretrained(llama(), tmp_path / "back").eval()
    assert relative_error(logits(again), logits(theirs)) < 1e-5
    ours, before = json.loads((tmp_path / "back" / CONFIG).read_text()), load_file(tmp_path / "theirs" / WEIGHTS)
    assert load_file(tmp_path / "back" / WEIGHTS).keys() == before.keys()
    assert ours["modules_to_save"] == KINDS[kind].get("modules_to_save")


@pytest.mark.parametrize("shortcut", ["input", "block", "middle"])
def test_a_shortcut_starts_with_the_same_matrices(shortcut: Any, tmp_path: Path) -> None:
    trained_by_peft(tmp_path, target_modules=["q_proj", "v_proj"])
    model = load_peft_adapter(llama(), tmp_path, shortcut=shortcut, pre_num=2)
    expected = load_file(tmp_path / WEIGHTS)
    for name, layer in adapted_layers(model).items():
        for kind in ("lora_A", "lora_B"):
            assert torch.equal(getattr(layer, kind), expected[f"base_model.model.{name}.{kind}.weight"])
    assert {chain.name for chain in record_of(model).chains} == {
        f"model.layers.*.self_attn.{kind}" for kind in ("q_proj", "v_proj")
    }
    assert record_of(model).config.shortcut == shortcut


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        about = json.loads((folder / CONFIG).read_text())
        change(about)
        (folder / CONFIG).write_text(json.dumps(about))

    return edit


def tampered(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return edit


KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edited(lambda about: about.update(lora_bias=True)), "lora_bias=True is no plain LoRA"),
        (
            edited(lambda about: about.update(alora_invocation_tokens=[5])),
            "alora_invocation_tokens=.5. is no",
        ),
        (edited(lambda about: about.update(of_a_later_peft=True)), "of_a_later_peft=True is no plain LoRA"),
        (edited(lambda about: about.update(peft_type="LOHA")), "peft_type must be 'LORA', got 'LOHA'"),
        (edited(lambda about: about.update(init_lora_weights="pissa")), "changed the base model"),
        (edited(lambda about: about.update(r=3)), "must be .3, 32., got .4, 32."),
        (edited(lambda about: about.update(lora_alpha="x")), "lora_alpha"),
        (lambda folder: (folder / CONFIG).write_text("{"), "not valid JSON"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"12345678"), "damaged"),
        (tampered(lambda tensors: tensors[KEY].fill_(float("nan"))), "holds NaN or Inf"),
        (tampered(lambda tensors: tensors.pop(KEY)), "no such tensor"),
        (tampered(lambda tensors: tensors.update({KEY.replace("q_proj", "zz"): torch.ones(1)})), "has no module"),
        (tampered(lambda tensors: tensors.update({KEY.replace("lora_A", "lora_Z"): torch.ones(1)})), "neither A, B"),
        (tampered(lambda tensors: tensors.update({"base_model.model.zz.weight": torch.ones(1)})), "a parameter of it"),
    ],
)
def test_refused_adapters_change_nothing(edit: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    trained_by_peft(tmp_path, target_modules=["q_proj"])
    edit(tmp_path)
    model = llama()
    before = state(model)
    with pytest.raises((ValueError, TypeError), match=message):
        load_peft_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_config\.json"):
        load_peft_adapter(llama(), tmp_path)


def test_serves_the_same_text_through_peft_and_transformers(tmp_path: Path) -> None:
    """Greedy text of the merged model, of PEFT's and of Transformers' own loader."""
    model = randomize(apply_reslora(llama(), ResLoRAConfig(r=4, shortcut="middle", pre_num=-1)))
    export_peft(model, tmp_path, calibration=[BATCH])
    merge_reslora(model, calibration=[BATCH])
    with_transformers = llama()
    with_transformers.load_adapter(str(tmp_path))
    prompt = torch.tensor([[1, 5, 9], [1, 7, 11]])

    def text(served: Any) -> Tensor:
        return served.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False
        )

    expected = text(model)
    assert torch.equal(text(PeftModel.from_pretrained(llama(), tmp_path)), expected)
    assert torch.equal(text(with_transformers), expected)
    assert not torch.equal(text(llama()), expected)


@pytest.mark.parametrize("shortcut", ["block", "input"])
def test_passes_the_checks_of_a_servers_loader(shortcut: Any, tmp_path: Path) -> None:
    """What vLLM asks of such files: keys, one rank within --max-lora-rank, plain LoRA, target modules that it packs."""
    model = randomize(apply_reslora(llama(), ResLoRAConfig(r=4, shortcut=shortcut, pre_num=2)))
    report = export_peft(model, tmp_path, calibration=[BATCH])
    about, tensors = json.loads((tmp_path / CONFIG).read_text()), load_file(tmp_path / WEIGHTS)
    assert about["peft_type"] == "LORA" and about["bias"] == "none"
    assert not about["modules_to_save"] and not about.get("use_dora")
    assert not about["rank_pattern"] and not about["alpha_pattern"]
    assert about["r"] == report.max_lora_rank and about["lora_alpha"] == about["r"]
    modules: dict[str, set[str]] = {}
    for key, tensor in tensors.items():
        start, middle, module, kind, weight = key[:17], *key[17:].rsplit(".", 3)
        assert (start, weight) == ("base_model.model.", "weight") and middle
        assert module in about["target_modules"] and module.endswith("_proj")
        assert tensor.shape[0 if kind == "lora_A" else 1] == about["r"]
        modules.setdefault(f"{middle}.{module}", set()).add(kind)
    assert all(kinds == {"lora_A", "lora_B"} for kinds in modules.values())
    assert modules.keys() == adapted_layers(model).keys()


def test_exported_adapters_are_combined_by_peft(tmp_path: Path) -> None:
    bases = {}
    for seed, name in enumerate(("a", "b")):
        model = randomize(apply_reslora(llama(), ResLoRAConfig(r=4, shortcut="block")), seed)
        export_peft(model, tmp_path / name)
        merge_reslora(model)
        bases[name] = {n: layer.weight for n, layer in adapted_layers(model).items()}
    combined = PeftModel.from_pretrained(llama(), tmp_path / "a", adapter_name="a")
    combined.load_adapter(str(tmp_path / "b"), adapter_name="b")
    combined.add_weighted_adapter(["a", "b"], [0.5, 2.0], "both", combination_type="cat")
    combined.set_adapter("both")
    merged = combined.merge_and_unload()
    plain = llama()
    for name in bases["a"]:
        w = plain.get_submodule(name).weight
        expected = w + 0.5 * (bases["a"][name] - w) + 2.0 * (bases["b"][name] - w)
        torch.testing.assert_close(merged.get_submodule(name).weight, expected, rtol=1e-4, atol=1e-5)

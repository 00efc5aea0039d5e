"""Starts beside PiSSA and OLoRA: each against PEFT's, and the model as its base where it is to be so."""

from __future__ import annotations

import copy
import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig, EvaConfig
from peft.tuners.lora.eva import initialize_lora_eva_weights
from torch import Tensor, nn

from reslora_kernels import (
    ResLoRAConfig,
    adapter_names,
    add_adapter,
    apply_reslora,
    load_adapter,
    merge_reslora,
    restart_reslora,
    save_adapter,
    set_adapter,
    start_adapters,
)
from reslora_kernels.adapt.record import adapted_layers
from reslora_kernels.layers.initialization import fill
from reslora_kernels.peft import ResLoRAPeftConfig
from reslora_kernels.testing import relative_error

from .models import FAMILIES, llama, logits, randomize

TARGETS = ["q_proj", "down_proj"]
BATCHES = [FAMILIES["llama"].batch(seed) for seed in range(2)]
SINGLE = [{"input_ids": row[None], "labels": row[None]} for row in BATCHES[0]["input_ids"]]  # as CorDA in PEFT has it


def ours(start: str, **changes: Any) -> nn.Module:
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "shortcut": "none"}
    return apply_reslora(llama(), ResLoRAConfig(**fields | {"init_lora_weights": start} | changes))


def peft_config(start: str, **changes: Any) -> LoraConfig:
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS}
    return LoraConfig(**fields | {"init_lora_weights": start} | changes)


def pairs(model: nn.Module, theirs: Any) -> list[tuple[Any, Tensor, Tensor]]:
    """Each layer of ours with A and B of PEFT's."""
    layers = adapted_layers(model)
    assert len(layers) == 2 * 3
    others = [theirs.base_model.model.get_submodule(name) for name in layers]
    return [
        (layer, other.lora_A["default"].weight, other.lora_B["default"].weight)
        for layer, other in zip(layers.values(), others, strict=True)
    ]


def test_orthogonal_is_drawn_as_in_peft() -> None:
    layer = get_peft_model(llama(), peft_config("orthogonal")).base_model.model.model.layers[0].self_attn.q_proj
    a, b = torch.empty(4, 32), torch.empty(32, 4)
    torch.manual_seed(3)
    layer.orthogonal_init("default")
    torch.manual_seed(3)
    fill(ResLoRAConfig(r=4, init_lora_weights="orthogonal"), a, b)
    assert torch.equal(a, layer.lora_A["default"].weight)
    assert torch.equal(b, layer.lora_B["default"].weight)
    assert float((b @ a).abs().max()) < 1e-6


@pytest.mark.parametrize("shortcut", ["none", "input", "block"])
def test_orthogonal_begins_as_the_base_and_trains_both_at_once(shortcut: Any) -> None:
    model = ours("orthogonal", shortcut=shortcut)
    assert relative_error(logits(model), logits(llama())) < 1e-5
    model(**BATCHES[0]).loss.backward()
    assert all(bool(p.grad.any()) for p in model.parameters() if p.grad is not None)


def test_eva_is_that_of_peft() -> None:
    theirs = get_peft_model(llama(), peft_config("eva", eva_config=EvaConfig(rho=1.0)))
    initialize_lora_eva_weights(theirs, BATCHES[:1], show_progress_bar=False)
    model = start_adapters(ours("eva"), BATCHES[:1])
    for layer, a, b in pairs(model, theirs):
        assert not b.any() and not layer.lora_B.any()
        assert torch.allclose(layer.lora_A @ layer.lora_A.T, torch.eye(4), atol=1e-5)
        assert float(nn.functional.cosine_similarity(layer.lora_A, a).min()) > 0.99
    assert torch.equal(logits(model), logits(llama()))


@pytest.mark.parametrize(("r", "rho"), [(4, 1.5), (4, 3.0), (1, 4.0)])
def test_eva_moves_ranks_as_peft_does(r: int, rho: float, tmp_path: Path) -> None:
    """With (1, 4) some layers have no rank left, and lose their adapters."""
    targets = ["q_proj", "k_proj", "up_proj", "down_proj"]
    config = peft_config("eva", r=r, target_modules=targets, eva_config=EvaConfig(rho=rho))
    theirs: Any = get_peft_model(llama(), config)
    initialize_lora_eva_weights(theirs, BATCHES[:1], show_progress_bar=False)
    others = {name: m for name, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
    model: Any = ours("eva", r=r, target_modules=targets)
    add_adapter(model, "other", ResLoRAConfig(r=2))
    model.lm_head.weight.requires_grad_(True)
    assert start_adapters(model, BATCHES[:1], rho=rho) is model
    layers: Any = adapted_layers(model)
    assert layers.keys() == others.keys() and (len(layers) < 12) == (r == 1)
    assert sum(layer.config.r for layer in layers.values()) == 12 * r
    for name, layer in layers.items():
        assert (layer.config.r, layer.scaling) == (others[name].r["default"], others[name].scaling["default"])
        a = others[name].lora_A["default"].weight
        assert float(nn.functional.cosine_similarity(layer.lora_A, a).detach().min()) > 0.99
    assert torch.equal(logits(model), logits(llama())) and adapter_names(model) == ["default", "other"]
    trained = [name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name]
    assert trained == ["lm_head.weight"], "what trains beside the adapters stays so"
    model.lm_head.weight.requires_grad_(False)
    step = model.train()(**BATCHES[0]).loss
    step.backward()
    assert all(layer.lora_B.grad.any() for layer in layers.values())
    randomize(model)
    save_adapter(model, tmp_path)
    assert torch.equal(logits(load_adapter(llama(), tmp_path)), logits(model.eval()))
    assert logits(set_adapter(model, "other")).shape == logits(llama()).shape


def test_eva_leaves_out_what_does_not_count() -> None:
    batch = BATCHES[0]["input_ids"]
    mask = torch.ones_like(batch)
    mask[:, -4:] = 0
    padded = start_adapters(ours("eva"), [{"input_ids": batch, "attention_mask": mask}])
    cut = start_adapters(ours("eva"), [{"input_ids": batch[:, :-4]}])
    for one, other in zip(adapted_layers(padded).values(), adapted_layers(cut).values(), strict=True):
        assert relative_error(one.lora_A, other.lora_A) < 1e-3


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_is_that_of_peft(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # PEFT's file takes its dataclass from attrs, which PEFT does not require
    monkeypatch.setitem(sys.modules, "attr", SimpleNamespace(dataclass=dataclasses.dataclass))
    from peft.tuners.lora.corda import preprocess_corda

    base = llama()
    config = peft_config("corda", corda_config=CordaConfig(corda_method=method))

    def run() -> None:
        for batch in SINGLE:
            base(**batch)

    preprocess_corda(base, config, run)
    theirs = get_peft_model(base, config)
    model = start_adapters(ours("corda" if method == "ipm" else "corda_kpm"), SINGLE)
    for layer, a, b in pairs(model, theirs):
        assert relative_error(layer.lora_B @ layer.lora_A, b @ a) < 1e-2
        if method == "ipm":
            assert relative_error(layer.lora_A.abs(), a.abs()) < 1e-2
    assert relative_error(logits(model), logits(llama())) < 1e-5


def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every randomised decomposition draw the same."""
    decompose = torch.svd_lowrank

    def again(*args: Any, **kwargs: Any) -> Any:
        torch.manual_seed(5)
        return decompose(*args, **kwargs)

    monkeypatch.setattr(torch, "svd_lowrank", again)


def test_lora_ga_is_that_of_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    loraga = pytest.importorskip("peft.tuners.lora.loraga", reason="this PEFT has no LoRA-GA")
    from peft.tuners.lora.config import LoraGAConfig

    seeded(monkeypatch)
    base, config = llama(), peft_config("lora_ga", lora_ga_config=LoraGAConfig())

    def step() -> None:
        for batch in BATCHES:
            base(**batch).loss.backward()

    loraga.preprocess_loraga(base, config, step)
    theirs = get_peft_model(base, config)
    model = start_adapters(ours("lora_ga"), BATCHES)
    for layer, a, b in pairs(model, theirs):
        assert relative_error(layer.lora_A, a) < 1e-2
        assert relative_error(layer.lora_B, b) < 1e-2
    assert relative_error(logits(model), logits(llama())) < 1e-5
    assert all(p.grad is None for p in model.parameters())


def copied(model: Any, folder: Path) -> Any:
    return copy.deepcopy(model)


def saved(model: Any, folder: Path) -> Any:
    save_adapter(model, folder)
    return load_adapter(llama(), folder)


def filled(model: Any, folder: Path) -> Any:
    save_adapter(model, folder)
    return load_adapter(ours("eva", shortcut="block"), folder)


def restored(model: Any, folder: Path) -> Any:
    other = ours("eva", shortcut="block")
    other.load_state_dict(model.state_dict())
    return other


def assigned(model: Any, folder: Path) -> Any:
    with torch.device("meta"):
        other: Any = ours("eva", shortcut="block")
    other.load_state_dict(model.state_dict(), assign=True)
    other.model.rotary_emb = model.model.rotary_emb  # its buffers are in no state dict
    return other


@pytest.mark.parametrize("again", [copied, saved, filled, restored, assigned])
def test_a_start_outlives_what_adapters_go_through(again: Any, tmp_path: Path) -> None:
    model = again(start_adapters(ours("eva", shortcut="block"), BATCHES), tmp_path).train()
    model(**BATCHES[0]).loss.backward()
    assert not any(layer.detour for layer in adapted_layers(model).values())


@pytest.mark.parametrize("start", ["eva", "corda", "corda_kpm", "lora_ga", "loftq"])
def test_nothing_trains_or_is_saved_before_its_start(start: str, tmp_path: Path) -> None:
    model: Any = ours(start)
    assert torch.equal(logits(model), logits(llama())), "B is zero"
    model(**BATCHES[0]).loss.backward()  # in evaluation mode: gradients are looked at
    asked = rf"init_lora_weights='{start}'.*call start_adapters\(model, \S+\).*take init_lora_weights=True"
    with pytest.raises(ValueError, match=asked):
        save_adapter(model, tmp_path)
    add_adapter(model, "other", ResLoRAConfig(r=2))
    with pytest.raises(ValueError, match=asked):
        set_adapter(model, ["default", "other"])
    model.train()
    whole = copy.deepcopy(model)
    for run in (model, whole.model):
        with pytest.raises(RuntimeError, match=asked):
            run(BATCHES[0]["input_ids"])
    with pytest.raises(RuntimeError, match=asked if torch.__version__ >= "2.9" else "Observed exception"):
        torch.compile(model, backend="eager", fullgraph=True)(BATCHES[0]["input_ids"])
    with torch.no_grad():
        model(**BATCHES[0])
    model.requires_grad_(False)(**BATCHES[0])


def test_peft_asks_for_the_start_too(tmp_path: Path) -> None:
    config = ResLoRAPeftConfig(r=4, target_modules=TARGETS, init_lora_weights="eva")
    model = get_peft_model(llama(), config).train()
    with pytest.raises(RuntimeError, match="call start_adapters"):
        model(**BATCHES[0])
    with pytest.raises(ValueError, match="nothing was saved"):
        model.save_pretrained(tmp_path)
    start_adapters(model, BATCHES)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True).train()
    again(**BATCHES[0]).loss.backward()


def test_a_restart_asks_for_the_start_again() -> None:
    model = start_adapters(ours("lora_ga"), BATCHES).train()
    restart_reslora(model)
    with pytest.raises(RuntimeError, match="call start_adapters"):
        model(**BATCHES[0])
    start_adapters(model, BATCHES)(**BATCHES[0]).loss.backward()


@pytest.mark.parametrize("shortcut", ["none", "input", "block", "middle"])
@pytest.mark.parametrize("start", ["eva", "corda", "lora_ga"])
def test_with_every_shortcut_the_model_begins_as_its_base(start: str, shortcut: Any, tmp_path: Path) -> None:
    model = start_adapters(ours(start, shortcut=shortcut), BATCHES)
    assert all(layer.lora_A.any() for layer in adapted_layers(model).values())
    assert relative_error(logits(model), logits(llama())) < 1e-5
    randomize(model)
    save_adapter(model, tmp_path)
    assert torch.equal(logits(load_adapter(llama(), tmp_path)), logits(model))
    if shortcut in ("none", "block"):
        before = logits(model)
        merge_reslora(model)
        assert relative_error(logits(model), before) < 1e-4


def test_loftq_is_that_of_peft_and_nearer_to_the_plain_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from peft.utils import loftq_utils

    base, plain = llama(), dict(llama().state_dict())
    for layer in base.model.layers:
        for owner, name in ((layer.self_attn, "q_proj"), (layer.mlp, "down_proj")):
            linear = getattr(owner, name)
            quantized = bitsandbytes.nn.Linear4bit(
                linear.in_features, linear.out_features, bias=False, quant_type="nf4", compute_dtype=torch.float32
            )
            quantized.weight = bitsandbytes.nn.Params4bit(linear.weight.data, quant_type="nf4", requires_grad=False)
            setattr(owner, name, quantized.to("cpu"))
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 4, "target_modules": TARGETS, "shortcut": "none"}
    model = apply_reslora(base, ResLoRAConfig(init_lora_weights="loftq", **fields))
    exact, rounded = logits(llama()), logits(model)
    start_adapters(model, weights=plain)
    assert relative_error(logits(model), exact) < relative_error(rounded, exact)
    move = torch.Tensor.to
    monkeypatch.setattr(  # PEFT computes on a GPU, whatever there is
        torch.Tensor, "to", lambda self, *a, **k: move(self, *a, **{n: v for n, v in k.items() if n != "device"})
    )
    for name, one in adapted_layers(model).items():
        a, b = loftq_utils._loftq_init_new(one.base_layer.weight, plain[f"{name}.weight"], 4, 4)
        assert relative_error(one.lora_B @ one.lora_A, b @ a) < 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": "orthogonal", "r": 3}, "must be even"),
        ({"start": "orthogonal", "shortcut": "middle"}, "which shortcut='middle' multiplies"),
        ({"start": "loftq", "shortcut": "block"}, "take shortcut='none'"),
        ({"start": "loftq", "shortcut": "input", "pre_num": 0}, "take shortcut='none'"),
        ({"start": "loftq", "use_dora": True}, "use_dora"),
        ({"start": "eva", "target_modules": ["embed_tokens"]}, "is for linear layers: take True"),
    ],
    ids=str,
)
def test_what_has_no_start_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours(**changes)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match="is there from the beginning"):
        start_adapters(ours("pissa"), BATCHES)
    with pytest.raises(ValueError, match="give calibration="):
        start_adapters(ours("eva"))
    for changes, message in (
        ({"start": "corda"}, "init_lora_weights='eva'"),
        ({"shortcut": "block"}, "shortcut='none'"),
    ):
        with pytest.raises(ValueError, match=f"rho=2.0 moves ranks .* which is for {message}"):
            start_adapters(ours(**{"start": "eva", **changes}), BATCHES, rho=2.0)
    with pytest.raises(ValueError, match="rho must be a finite number of 1 or more"):
        start_adapters(ours("eva"), BATCHES, rho=0.5)
    with pytest.raises(ValueError, match=r"more than 100 tokens and features.*got \d+ tokens and 32 features"):
        start_adapters(ours("eva"), BATCHES, rho=25)
    with pytest.raises(ValueError, match="at least one batch"):
        start_adapters(ours("corda"), [])
    with pytest.raises(ValueError, match="give labels in the batches"):
        start_adapters(ours("lora_ga"), [{"input_ids": BATCHES[0]["input_ids"]}])
    with pytest.raises(ValueError, match="is for a quantised base"):
        start_adapters(ours("loftq"), weights={})
    with pytest.raises(ValueError, match="lower r"):
        start_adapters(ours("lora_ga", r=20), BATCHES)

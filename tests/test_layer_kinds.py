"""Layers that are no ``nn.Linear``: GPT-2's Conv1D. Against PEFT, and against the linear layers that they amount to."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from reslora_kernels import (
    ResLoRAConfig,
    add_adapter,
    apply_reslora,
    export_peft,
    inspect,
    load_adapter,
    load_peft_adapter,
    merge_reslora,
    save_adapter,
    set_adapter,
    unload,
    unmerge_reslora,
)
from reslora_kernels.adapt.record import adapted_layers
from reslora_kernels.peft import ResLoRAPeftConfig
from reslora_kernels.testing import relative_error

from .models import VOCABULARY, randomize

SHORTCUTS = ("none", "input", "block", "middle")
TOKENS = {"input_ids": torch.arange(24).reshape(2, 12) % VOCABULARY}


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=3, n_head=4, initializer_range=0.2,
        bos_token_id=1, eos_token_id=None, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def with_linear_layers(model: Any) -> Any:
    """The same function with ``nn.Linear`` for every Conv1D."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if type(module).__name__ == "Conv1D":
            linear = nn.Linear(*module.weight.shape)
            linear.weight, linear.bias = nn.Parameter(module.weight.T.clone()), module.bias
            twin.set_submodule(name, linear)
    return twin


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**TOKENS).logits
    return found


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of a loss that weighs every output; by the names of the layers and of their parameters."""
    output = model(**TOKENS).logits
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    (output * weights).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert found
    for name, value in expected.items():
        assert relative_error(found[name], value) < 1e-5, name


def trained_by_peft(model: nn.Module, **config: Any) -> PeftModel:
    peft_model = get_peft_model(model, LoraConfig(**({"r": 4, "lora_alpha": 6} | config)))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return peft_model.eval()


class TestConv1D:
    @pytest.mark.parametrize("shortcut", SHORTCUTS)
    def test_is_the_linear_layer_with_the_weight_transposed(self, shortcut: Any) -> None:
        config = ResLoRAConfig(r=4, shortcut=shortcut, pre_num=-1)
        model, twin = (randomize(apply_reslora(make, config)) for make in (gpt2(), with_linear_layers(gpt2())))
        kept = dict(gpt2().named_parameters())
        assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters() if name in kept)
        assert relative_error(logits(model), logits(twin)) < 1e-6
        assert_close(gradients(model), gradients(twin))
        before = logits(model)
        data = {"calibration": [TOKENS]} if shortcut in ("input", "middle") else {}
        merge_reslora(model, **data)
        merge_reslora(twin, **data)
        assert relative_error(logits(model), logits(twin)) < 1e-5
        unmerge_reslora(model)
        assert torch.equal(logits(model), before)

    def test_all_linear_means_what_it_does_in_peft(self) -> None:
        coverage = inspect(apply_reslora(gpt2(), ResLoRAConfig(r=2)))
        theirs = get_peft_model(gpt2(), LoraConfig(r=2, target_modules="all-linear"))
        adapted = {
            name.removeprefix("base_model.model.").rpartition(".lora_A")[0]
            for name, _ in theirs.named_parameters()
            if "lora_A" in name
        }
        assert {row.name for row in coverage.layers} == adapted
        assert dict(coverage.unmatched) == {"lm_head": "the model's output head, which 'all-linear' leaves out"}
        assert {row.chain for row in coverage.layers} == {
            f"transformer.h.*.{role}" for role in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        }
        assert {row.chain_length for row in coverage.layers} == {3}

    def test_equals_peft_and_travels_both_ways(self, tmp_path: Path) -> None:
        theirs = trained_by_peft(gpt2(), target_modules=["c_attn", "c_fc"], rank_pattern={"c_fc": 3})
        theirs.save_pretrained(tmp_path / "theirs")
        ours = load_peft_adapter(gpt2(), tmp_path / "theirs")
        assert relative_error(logits(ours), logits(theirs)) < 1e-6
        expected = {
            name.removeprefix("base_model.model.").replace(".default.weight", ""): value
            for name, value in gradients(theirs).items()
        }
        assert_close(gradients(ours), expected)
        export_peft(ours, tmp_path / "back")
        assert json.loads((tmp_path / "back/adapter_config.json").read_text())["fan_in_fan_out"] is True
        again = PeftModel.from_pretrained(gpt2(), tmp_path / "back").eval()
        assert relative_error(logits(again), logits(theirs)) < 1e-6

    @pytest.mark.parametrize("shortcut", SHORTCUTS)
    def test_survives_saving_other_adapters_and_unloading(self, shortcut: Any, tmp_path: Path) -> None:
        model = randomize(apply_reslora(gpt2(), ResLoRAConfig(r=4, shortcut=shortcut)))
        before, plain = logits(model), logits(gpt2())
        save_adapter(model, tmp_path)
        assert torch.equal(logits(load_adapter(gpt2(), tmp_path)), before)
        add_adapter(model, "second", ResLoRAConfig(r=2, target_modules=["c_fc"]))
        assert torch.equal(logits(set_adapter(model, "second")), plain)
        assert torch.equal(logits(set_adapter(model, "default")), before)
        unload(model)
        assert torch.equal(logits(model), plain)
        assert type(model.transformer.h[0].mlp.c_fc).__name__ == "Conv1D"
        assert model.state_dict().keys() == gpt2().state_dict().keys()

    def test_as_a_method_of_peft(self, tmp_path: Path) -> None:
        config = ResLoRAPeftConfig(r=4, target_modules="all-linear", shortcut="middle")
        model = randomize(get_peft_model(gpt2(), config)).eval()
        native = apply_reslora(gpt2(), ResLoRAConfig(r=4, shortcut="middle"))
        for name, layer in adapted_layers(native).items():
            inner = model.base_model.model.get_submodule(name).reslora_adapter["default"]
            layer.load_state_dict(inner.state_dict(), strict=False)
        assert relative_error(logits(model), logits(native)) < 1e-6
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(PeftModel.from_pretrained(gpt2(), tmp_path).eval()), logits(model))
        merged = model.merge_and_unload(calibration=[TOKENS])
        merge_reslora(native, calibration=[TOKENS])
        assert relative_error(logits(merged), logits(native)) < 1e-5

    def test_checkpointed_and_compiled(self) -> None:
        model = randomize(apply_reslora(gpt2(), ResLoRAConfig(r=4, shortcut="input")))
        plain, before = gradients(model), logits(model)
        model.zero_grad()
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
        assert_close(gradients(model), plain)
        compiled = torch.compile(model.eval(), backend="aot_eager")
        assert relative_error(logits(compiled), before) < 1e-5

    def test_a_conv1d_of_another_forward_is_refused(self) -> None:
        model = gpt2()
        mlp = model.transformer.h[0].mlp
        mlp.c_fc.__class__ = type("Scaled", (type(mlp.c_fc),), {"forward": lambda self, x: 2 * x})
        with pytest.raises(ValueError, match=r"c_fc', a Scaled, whose forward is not that of Conv1D"):
            apply_reslora(model, ResLoRAConfig(target_modules=["c_fc"]))

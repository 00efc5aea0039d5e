"""Layers that are no ``nn.Linear``: GPT-2's Conv1D and nn.MultiheadAttention. Against PEFT, and the sum of weights."""

from __future__ import annotations

import copy
import json
import warnings
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
    disable_adapter,
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

from .models import VOCABULARY, needs_transformers_5, randomize, t5

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

    @pytest.mark.slow
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


X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3))


class Encoder(nn.Module):
    """As OpenCLIP's: blocks that call attention on one tensor, then one across two."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"attn": nn.MultiheadAttention(16, 4, batch_first=True), "fc": nn.Linear(16, 16)})
            for _ in range(3)
        )
        self.cross = nn.MultiheadAttention(16, 2, batch_first=True, bias=False, add_bias_kv=True)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for block in self.blocks:
            y = y + block["attn"](y, y, y, need_weights=False)[0]
            y = y + block["fc"](y).tanh()
        out: Tensor = self.cross(y, x, x)[0]
        return out


def disturbed(model: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def adapted(shortcut: Any = "block", **changes: Any) -> Any:
    config = {"r": 4, "shortcut": shortcut, "pre_num": -1, "target_modules": ["attn", "cross", "fc"]} | changes
    return disturbed(apply_reslora(Encoder(), ResLoRAConfig(**config)))


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(X)
    return found


def encoder_gradients(model: nn.Module) -> dict[str, Tensor]:
    output = model(X)
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for part in ("base_model.model.", ".default", ".base_layer", ".weight"):
        found = {name.replace(part, ""): gradient for name, gradient in found.items()}
    return found


def test_in_proj_equals_peft_and_out_proj_counts_twice_there(tmp_path: Path) -> None:
    """PEFT 0.21 adds out_proj's update to a weight that has it already: files are not exchanged while that is so."""
    targets = ["attn", "cross", "fc"]
    ours = disturbed(apply_reslora(Encoder(), ResLoRAConfig(r=4, shortcut="none", target_modules=targets)))
    theirs = get_peft_model(Encoder(), LoraConfig(r=4, lora_alpha=8, target_modules=targets)).eval()
    own = {name: p for name, p in ours.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                for part in ("base_model.model.", ".default", ".base_layer", ".weight"):
                    name = name.replace(part, "")
                scale = (0.5 if "out_proj" in name else 1.0) if name.endswith("B") else 1.0
                parameter.copy_(own[name] * scale)
    assert relative_error(run(ours), run(theirs)) < 1e-5
    expected, found = encoder_gradients(theirs), encoder_gradients(ours)
    assert found.keys() == expected.keys()
    for key in ("cross.lora_A", "blocks.0.attn.lora_A", "blocks.1.attn.lora_A", "blocks.0.fc.lora_A"):
        assert relative_error(found[key], expected[key]) < 1e-4, key
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"update twice in PEFT .*merge_and_unload"):
        load_peft_adapter(Encoder(), tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"attn' cannot be exported: PEFT adds the update of its out_proj twice"):
        export_peft(ours, tmp_path / "ours")


@pytest.mark.parametrize("shortcut", ["none", "block"])
def test_merges_saves_switches_and_unloads(shortcut: Any, tmp_path: Path) -> None:
    model = adapted(shortcut)
    before, plain = run(model), run(Encoder().eval())
    assert relative_error(before, plain) > 1e-2
    save_adapter(model, tmp_path / "saved")
    assert torch.equal(run(load_adapter(Encoder(), tmp_path / "saved").eval()), before)
    merge_reslora(model)
    assert relative_error(run(model), before) < 1e-5
    unmerge_reslora(model)
    assert torch.equal(run(model), before)
    add_adapter(model, "second", ResLoRAConfig(r=2, target_modules=["attn"]))
    assert relative_error(run(set_adapter(model, "second")), plain) < 1e-6  # PyTorch has a fused path for frozen ones
    assert torch.equal(run(set_adapter(model, "default")), before)
    unload(model)
    assert relative_error(run(model), plain) < 1e-6
    assert type(model.cross) is nn.MultiheadAttention
    assert model.state_dict().keys() == Encoder().state_dict().keys()
    assert vars(model.cross).keys() == vars(Encoder().cross).keys()


def test_block_runs_along_the_blocks_and_inspect_says_how() -> None:
    coverage = inspect(adapted())
    rows = {row.name: row for row in coverage.layers}
    assert rows["blocks.1.attn"].chain == "blocks.*.attn"
    assert rows["blocks.1.attn.out_proj"].chain == "blocks.*.attn.out_proj"
    assert rows["blocks.1.attn.out_proj"].chain_length == 3
    assert all("no fused kernel" in row.reason for name, row in rows.items() if "fc" not in name)
    assert "no fused kernel" not in rows["blocks.1.fc"].reason
    assert dict(coverage.unmatched) == {}


def test_gradients_of_block_are_those_of_the_summed_weights() -> None:
    model = adapted()
    found = encoder_gradients(model)
    twin = Encoder().eval()
    layers, values = adapted_layers(model), {}
    for name, layer in layers.items():
        if "fc" in name:
            continue
        members = layer.chain.layers[: layer.position + 1]
        delta = layer.scaling * sum(each.lora_B @ each.lora_A for each in members)
        own = f"{name}.weight" if name.endswith("out_proj") else f"{name}.in_proj_weight"
        values[own] = twin.get_parameter(own).detach() + delta
    for block, other in zip(twin.blocks, model.blocks, strict=True):
        block["fc"] = other["fc"]
    output = torch.func.functional_call(twin, values, (X,))
    parameters = {
        f"{name}.{kind}": getattr(layer, kind) for name, layer in layers.items() for kind in ("lora_A", "lora_B")
    }
    loss = (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum()
    for (name, _), truth in zip(parameters.items(), torch.autograd.grad(loss, list(parameters.values())), strict=True):
        assert relative_error(found[name], truth) < 1e-4, name


def test_an_encoder_of_torch() -> None:
    """nn.TransformerEncoderLayer reads the weights itself where it can; then the adapter would have no effect."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    plain = run(model)
    disturbed(apply_reslora(model, ResLoRAConfig(r=4, target_modules=["self_attn", "linear1"])))
    unfused = run(model)
    assert relative_error(unfused, plain) > 1e-2
    model.train()
    assert relative_error(run(model), unfused) < 1e-5
    merge_reslora(model.eval())
    assert relative_error(run(model), unfused) < 1e-5


@pytest.mark.parametrize(
    ("module", "changes", "message"),
    [
        (nn.MultiheadAttention(16, 4), {"shortcut": "middle"}, "shortcut='middle' hands on .* take 'block' or 'none'"),
        (nn.MultiheadAttention(16, 4), {"use_dora": True}, "use_dora is for linear layers"),
        (nn.MultiheadAttention(16, 4, kdim=8), {}, "without a packed in_proj"),
        (type("Mine", (nn.MultiheadAttention,), {"forward": lambda self, x: x})(16, 4), {}, "a Mine, whose forward"),
    ],
    ids=["middle", "DoRA", "apart", "another forward"],
)
def test_what_cannot_be_is_refused_by_name(module: Any, changes: dict[str, Any], message: str) -> None:
    model = nn.Sequential(module)
    with pytest.raises(ValueError, match=message):
        apply_reslora(model, ResLoRAConfig(**{"r": 2, "target_modules": ["0"]} | changes))
    assert model[0] is module
    with pytest.raises(ValueError, match=r"call apply_reslora on the model|whose forward|packed|middle|dora"):
        get_peft_model(nn.Sequential(module), ResLoRAPeftConfig(**{"r": 2, "target_modules": ["0"]} | changes))


def test_out_proj_alone_has_no_effect() -> None:
    model = Encoder().eval()
    plain = run(model)
    with pytest.warns(UserWarning, match="has no effect: MultiheadAttention reads its weight and never runs it"):
        disturbed(apply_reslora(model, ResLoRAConfig(r=2, target_modules=["out_proj"])))
    assert relative_error(run(model), plain) < 1e-6


@needs_transformers_5
def test_an_embedding_that_never_runs_is_named() -> None:
    """T5 has one table in four modules: ``shared`` itself is not called, and a head would have two adapters."""
    with pytest.warns(UserWarning, match=r"'shared' does not run: 'encoder.embed_tokens' has its weight"):
        apply_reslora(t5(), ResLoRAConfig(r=2, target_modules=["shared", "q"]))
    model = t5()
    for name in ("shared", "embed_tokens"):
        with pytest.raises(ValueError, match=r"shares its weight with '\S+' too, which would stay as it is"):
            apply_reslora(model, ResLoRAConfig(r=2, target_modules=[name], ensure_weight_tying=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_reslora(model, ResLoRAConfig(r=2, target_modules=["embed_tokens", "q"]))


@pytest.mark.parametrize("target", ["c_attn", "attn.c_proj"])
@pytest.mark.parametrize("shortcut", ["none", "block"])
def test_peft_3531_dora_comes_apart_from_transposed_weights(shortcut: Any, target: str) -> None:
    config = ResLoRAConfig(r=4, target_modules=[target], use_dora=True, shortcut=shortcut)
    model = randomize(apply_reslora(gpt2(), config))
    before, weights = model(**TOKENS).logits, {name: p.clone() for name, p in model.named_parameters()}
    merge_reslora(model)
    assert relative_error(model(**TOKENS).logits, before) < 1e-5
    unmerge_reslora(model)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    with disable_adapter(model):
        assert torch.equal(model(**TOKENS).logits, gpt2()(**TOKENS).logits)


@needs_transformers_5
def test_peft_2710_experts_have_several_adapters() -> None:
    """Of one parameter and of both: each merges, and so does the sum of them, in either order."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 3, "initializer_range": 0.2}
    base = MixtralForCausalLM(MixtralConfig(**sizes, **heads)).eval()
    apply_reslora(base, ResLoRAConfig(target_modules=[], target_parameters=["experts.gate_up_proj"]), adapter_name="a")
    randomize(base)
    both = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    add_adapter(base, "b", ResLoRAConfig(r=2, lora_alpha=3, **both))
    randomize(set_adapter(base, "b"))
    found = []
    for names in ("a", "b", ["a", "b"], ["b", "a"]):
        before = set_adapter(base, names)(**TOKENS).logits
        merge_reslora(base)
        found.append(base(**TOKENS).logits)
        assert relative_error(found[-1], before) < 1e-5
        unmerge_reslora(base)
        assert torch.equal(base(**TOKENS).logits, before)
    assert relative_error(found[2], found[3]) < 1e-5 and relative_error(found[2], found[1]) > 1e-2

"""Real models, tiny and from a config: chains, training, merging, equality with PEFT."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from reslora_kernels import (
    ResLoRAConfig,
    ResLoRALinear,
    add_adapter,
    apply_reslora,
    collect_statistics,
    inspect,
    merge_reslora,
    set_adapter,
    unmerge_reslora,
)
from reslora_kernels.adapt.record import adapted_layers, record_of
from reslora_kernels.peft import ResLoRAPeftConfig
from reslora_kernels.testing import relative_error

from .models import FAMILIES, Scrambled, llama, needs_transformers_5, randomize, roberta, t5, train, unet

SHORTCUTS = ("none", "input", "block", "middle")
ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-12}  # the same algebra summed in another order


def config(shortcut: str, **changes: Any) -> ResLoRAConfig:
    return ResLoRAConfig(**({"r": 4, "lora_alpha": 8, "shortcut": shortcut, "pre_num": 2} | changes))


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal but for the order of sums."""
    assert relative_error(actual, expected) <= ROUNDING[expected.dtype]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def nothing_open(model: nn.Module) -> bool:
    return all(not chain.passes._open for chain in record_of(model).chains)


def chains_of(model: nn.Module) -> list[list[str]]:
    rows = inspect(model).layers
    return [[row.name for row in rows if row.chain == title] for title in dict.fromkeys(row.chain for row in rows)]


@cache
def trained(name: str, shortcut: str) -> tuple[nn.Module, list[float]]:
    """An adapted model after a few steps, and the loss before and after. Shared: copy it before changing it."""
    model = apply_reslora(FAMILIES[name].make(), config(shortcut))
    return model, train(model, FAMILIES[name], steps=16)


class TestChains:
    def test_llama(self) -> None:
        model = apply_reslora(llama(), config("block"))
        own = {
            "self_attn": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "mlp": ["gate_proj", "up_proj", "down_proj"],
        }
        expected = [
            [f"model.layers.{i}.{part}.{role}" for i in range(3)] for part, roles in own.items() for role in roles
        ]
        assert chains_of(model) == expected
        coverage = inspect(model)
        assert coverage.order == "the structure, confirmed by a run"
        assert [name for name, _ in coverage.unmatched] == ["lm_head"]
        assert [row.position for row in coverage.layers] == [0, 1, 2] * 7
        assert coverage.trainable_parameters == sum(row.parameters for row in coverage.layers)
        assert "model.layers.2.mlp.down_proj" in str(coverage)

    def test_roberta(self) -> None:
        model = apply_reslora(roberta(), config("block"))
        prefix = "roberta.encoder.layer"
        attention = [[f"{prefix}.{i}.attention.self.{role}" for i in range(3)] for role in ("query", "key", "value")]
        dense = [
            [f"{prefix}.{i}.{part}.dense" for i in range(3)] for part in ("attention.output", "intermediate", "output")
        ]
        assert sorted(chains_of(model)) == sorted([*attention, *dense])  # the head is trained whole

    def test_unet_middle_runs_before_up_though_registered_after(self) -> None:
        model = apply_reslora(unet(), config("block", target_modules=["to_q", "to_k"]))
        registered = list(adapted_layers(model))
        up, mid = (next(i for i, name in enumerate(registered) if name.startswith(at)) for at in ("up_", "mid_"))
        assert up < mid

        def attention(block: str, *ends: str) -> list[str]:
            return [f"{block}.transformer_blocks.0.{end}" for end in ends]

        outer = ["down_blocks.0.attentions.0", "up_blocks.1.attentions.0", "up_blocks.1.attentions.1"]
        inner = [
            "down_blocks.1.attentions.0",
            "mid_block.attentions.0",
            "up_blocks.0.attentions.0",
            "up_blocks.0.attentions.1",
        ]
        expected = []
        for level in (outer, inner):
            keys = [f"attn{i}.{end}" for i in (1, 2) for end in ("to_q", "to_k")]
            expected += [[name for block in level for name in attention(block, key)] for key in keys]
        assert sorted(chains_of(model)) == sorted(expected)

    def test_unet_time_embeddings_of_one_width_are_one_chain(self) -> None:
        model = apply_reslora(unet(), config("block", target_modules=["time_emb_proj"]))
        assert chains_of(model) == [
            ["down_blocks.0.resnets.0.time_emb_proj", *(f"up_blocks.1.resnets.{i}.time_emb_proj" for i in (0, 1))],
            [
                "down_blocks.1.resnets.0.time_emb_proj",
                *(f"mid_block.resnets.{i}.time_emb_proj" for i in (0, 1)),
                *(f"up_blocks.0.resnets.{i}.time_emb_proj" for i in (0, 1)),
            ],
        ]

    def test_t5_keeps_encoder_from_decoder_and_self_from_cross_attention(self) -> None:
        model = apply_reslora(t5(), config("block"))
        chains = chains_of(model)
        assert sum(map(len, chains)) == len(adapted_layers(model)) == 3 * 6 + 2 * 10
        for names in chains:
            assert len({name.split(".")[0] for name in names}) == 1, names
            if names[0].endswith((".k", ".v")):
                assert len({name.split(".")[-2] for name in names}) == 1, names
        assert [f"decoder.block.{i}.layer.1.EncDecAttention.k" for i in range(2)] in chains

    def test_t5_keeps_them_apart_also_with_examples_of_equal_length(self) -> None:
        tokens = torch.zeros(1, 6, dtype=torch.long)
        examples = {"input_ids": tokens, "decoder_input_ids": tokens}
        model = apply_reslora(t5(), config("block"), example_inputs=examples)
        assert all(len({name.split(".")[0] for name in names}) == 1 for names in chains_of(model))

    def test_vit(self) -> None:
        model = apply_reslora(FAMILIES["vit"].make(), config("block"))
        assert inspect(model).order == "the structure, confirmed by a run"
        assert all(len(names) == 3 for names in chains_of(model) if "classifier" not in names)

    @pytest.mark.parametrize("name", FAMILIES)
    def test_chains_hold_every_layer_once(self, name: str) -> None:
        model = apply_reslora(FAMILIES[name].make(), config("input"))
        assert sorted(name for names in chains_of(model) for name in names) == sorted(adapted_layers(model))


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "unet" else []) for name in FAMILIES]
)
class TestTraining:
    def test_loss_falls_and_the_base_stays(self, name: str, shortcut: str) -> None:
        model, (first, last) = trained(name, shortcut)
        assert last < 0.95 * first
        base = FAMILIES[name].make().state_dict()
        after = {key: value for key, value in model.state_dict().items() if "lora_" not in key}
        assert after.keys() == base.keys()
        moves = {key for key, _ in model.named_parameters() if "lora_" in key or key.startswith("classifier")}
        assert all(torch.equal(after[key], base[key]) == (key not in moves) for key in base)
        for key, parameter in model.named_parameters():
            assert parameter.requires_grad == (key in moves)
            assert (parameter.grad is None) == (key not in moves)
        assert all(layer.lora_B.abs().sum() > 0 for layer in adapted_layers(model).values())
        assert nothing_open(model)

    def test_exact_merges_are_exact_and_undone_bit_for_bit(self, name: str, shortcut: str) -> None:
        family, model = FAMILIES[name], copy.deepcopy(trained(name, shortcut)[0])
        model.double()  # float32 would show T5's unscaled attention, not the merge
        batch = {key: value.double() if value.is_floating_point() else value for key, value in family.batch(1).items()}
        weights = {key: value.clone() for key, value in model.state_dict().items()}
        with torch.no_grad():
            before = family.outputs(model, batch)
            merge_reslora(model, calibration=[batch])
            merged = family.outputs(model, batch)
            unmerge_reslora(model)
            assert torch.equal(family.outputs(model, batch), before)
        if shortcut in ("none", "block"):
            assert_same(merged, before)
        assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("shortcut", ["input", "middle"])
@pytest.mark.parametrize("name", ["llama", "roberta", "unet"])
@pytest.mark.slow
def test_least_squares_beats_the_papers_merges_on_held_out_data(name: str, shortcut: str) -> None:
    family, model = FAMILIES[name], copy.deepcopy(trained(name, shortcut)[0])
    calibration, held_out = [family.batch(seed) for seed in range(8)], [family.batch(seed) for seed in (900, 901)]

    @torch.no_grad()
    def outputs() -> Tensor:
        return torch.cat([family.outputs(model, batch) for batch in held_out])

    unmerged = outputs()
    errors = {}
    with collect_statistics(model) as statistics, torch.no_grad():
        for batch in calibration:
            model(**batch)
    for method in ("input", "weights", "least_squares"):
        merge_reslora(model, method, statistics=statistics)
        errors[method] = relative_error(outputs(), unmerged)
        unmerge_reslora(model)
    if name != "unet":  # its longest chain has 8 layers, and every one costs a run
        merge_reslora(model, "least_squares", calibration=calibration, sequential=True)
        errors["sequential"] = relative_error(outputs(), unmerged)
        unmerge_reslora(model)
    paper = min(errors["input"], errors["weights"])
    assert max(errors["least_squares"], errors.get("sequential", 0.0)) < 0.95 * paper, errors
    merge_reslora(model, "least_squares", calibration=calibration, joint_steps=16)
    assert relative_error(outputs(), unmerged) < errors["least_squares"], errors


def through_examples(kind: str) -> tuple[nn.Module, Any]:
    x = torch.zeros(2, 3, 12, dtype=torch.float64)
    return Scrambled(), {"dict": {"x": x}, "tuple": (x,), "list": [x], "tensor": x, "none": None}[kind]


class TestCustomModule:
    ORDER = ("blocks.0.fc", "blocks.1.fc", "blocks.2.fc")

    @pytest.mark.parametrize("kind", ["dict", "tuple", "list", "tensor", "none"])
    def test_order_from_the_structure_with_example_inputs_of_any_kind(self, kind: str) -> None:
        model, examples = through_examples(kind)
        apply_reslora(model, config("input"), example_inputs=examples)
        assert list(adapted_layers(model))[1:] != list(self.ORDER)
        assert sorted(chains_of(model)) == [list(self.ORDER), ["out"]]
        assert inspect(model).order == ("the structure" if kind == "none" else "the structure, confirmed by a run")

    @pytest.mark.parametrize("shortcut", SHORTCUTS)
    def test_fused_inference_of_torchs_encoder_does_not_pass_the_adapters_by(self, shortcut: str) -> None:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(12, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
        model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
        x = torch.linspace(-1, 1, 120, dtype=torch.float64).reshape(2, 5, 12)
        randomize(apply_reslora(model, config(shortcut), example_inputs=x))
        with torch.no_grad():
            inference = model(x)
        assert_same(inference, model(x.clone().requires_grad_()).detach())

    def test_statistics_under_autocast(self) -> None:
        model = randomize(apply_reslora(Scrambled(dtype=torch.float32), config("input")))
        batches = [torch.randn(40, 12) for _ in range(2)]
        model(batches[0])
        with collect_statistics(model) as statistics, torch.autocast("cpu", dtype=torch.bfloat16):
            for batch in batches:
                model(batch)
        moments = statistics.layers["blocks.0.fc"].gram
        assert moments is not None
        truth = sum(batch.double().T @ batch.double() for batch in batches)
        assert relative_error(moments, truth) <= ROUNDING[torch.float32]


@pytest.mark.parametrize("use_rslora", [False, True], ids=["alpha/r", "alpha/sqrt(r)"])
def test_shortcut_none_is_peft_lora(use_rslora: bool) -> None:
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "v_proj", "down_proj"]
    family, batch = FAMILIES["llama"], FAMILIES["llama"].batch(1)
    own = config("none", target_modules=targets, lora_alpha=6, use_rslora=use_rslora)
    model = randomize(apply_reslora(llama().double(), own))
    theirs = get_peft_model(
        llama().double(), LoraConfig(r=4, lora_alpha=6, target_modules=targets, use_rslora=use_rslora)
    )

    def same_name(name: str) -> str:
        return f"base_model.model.{name}.default.weight"

    parameters = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameters[same_name(name)].copy_(parameter)
    assert_same(family.outputs(model, batch).detach(), family.outputs(theirs, batch).detach())
    for each in (model, theirs):
        family.loss(each, batch).backward()
    ours, expected = gradients(model), gradients(theirs)
    assert {same_name(name) for name in ours} == expected.keys()
    for name, grad in ours.items():
        assert_same(grad, expected[same_name(name)])


def test_hooks_of_a_swapped_layer_go_on_working() -> None:
    """Also full backward hooks, which a flag beside the hooks tells from the old kind."""
    model, seen = Scrambled(), []
    fc = model.blocks["0"]["fc"]
    fc.register_full_backward_hook(lambda m, grad_input, grad_output: seen.append(grad_input[0].shape))
    handle = fc.register_forward_hook(lambda m, args, out: seen.append(type(m)))
    apply_reslora(model, config("block"), example_inputs=torch.zeros(2, 12, dtype=torch.float64))
    seen.clear()
    model(torch.zeros(2, 12, dtype=torch.float64, requires_grad=True)).sum().backward()
    assert seen == [ResLoRALinear, torch.Size([2, 12])]
    handle.remove()
    model(torch.zeros(2, 12, dtype=torch.float64))
    assert len(seen) == 2


@needs_transformers_5
@pytest.mark.parametrize("door", ["native", "second", "peft"])
@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_gemma_4_goes_on_with_the_last_tokens(shortcut: str, door: str) -> None:
    """Its layers that share keys see, in ``generate``, only the tokens to be predicted from: chains go on over that."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    kinds = ["sliding_attention", "full_attention"] * 2
    model: Any = transformers.Gemma4ForCausalLM(
        transformers.Gemma4TextConfig(
            vocab_size=48, num_hidden_layers=4, head_dim=8, global_head_dim=16, vocab_size_per_layer_input=48,
            hidden_size_per_layer_input=8, layer_types=kinds, num_kv_shared_layers=2, sliding_window=16, **sizes,
        )
    ).double().eval()  # fmt: skip
    own = config(shortcut, pre_num=3)
    if door == "peft":
        own_config = ResLoRAPeftConfig(r=4, lora_alpha=8, shortcut=shortcut, pre_num=3, target_modules="all-linear")
        model = get_peft_model(model, own_config).eval()
    else:
        apply_reslora(model, own)
    if door == "second":
        add_adapter(model, "second", own)
        set_adapter(model, "second")
    randomize(model)
    ids = torch.randint(3, 48, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        for kept in (1, 3):
            last = model(input_ids=ids, logits_to_keep=kept).logits
            assert relative_error(last, whole[:, -kept:]) < 1e-6  # its rotations are in float32

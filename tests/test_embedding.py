"""Adapted embeddings: against the linear layer on one-hot rows, against PEFT, tied heads and scaled tables included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from reslora_kernels import (
    ResLoRAConfig,
    adapters_per_sample,
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
from reslora_kernels.peft import ResLoRAPeftConfig, from_native, to_native
from reslora_kernels.reference import chain_forward
from reslora_kernels.testing import relative_error

from .models import VOCABULARY, llama, t5

IDS = torch.arange(24).reshape(2, 12) % VOCABULARY


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2,
        bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def gemma3() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, bos_token_id=1, eos_token_id=None,
        pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


MODELS: dict[str, tuple[Any, str]] = {
    "llama": (llama, "embed_tokens"),
    "gpt2, tied and transposed": (gpt2, "wte"),
    "gemma3, tied and scaled": (gemma3, "embed_tokens"),
}


def run(model: Any) -> Tensor:
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    return model(input_ids=IDS, **more).logits  # type: ignore[no-any-return]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return run(model)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    output = run(model)
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return {
        name.removeprefix("base_model.model.")
        .replace("lora_embedding_", "lora_")
        .replace(".default", "")
        .removesuffix(".weight"): p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def disturbed(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("model", MODELS)
class TestAgainstPeft:
    def test_starts_as_the_frozen_model_and_as_peft_starts(self, model: str) -> None:
        make, name = MODELS[model]
        ours = apply_reslora(make(), ResLoRAConfig(r=4, target_modules=[name]))
        assert torch.equal(logits(ours), logits(make()))
        layer = next(iter(adapted_layers(ours).values()))
        assert not layer.lora_A.any()
        assert 0.7 < float(layer.lora_B.std()) < 1.3

    def test_equal_values_gradients_and_files(self, model: str, tmp_path: Path) -> None:
        make, name = MODELS[model]
        theirs = disturbed(
            get_peft_model(make(), LoraConfig(r=4, lora_alpha=6, target_modules=[name, "c_fc", "q_proj"]))
        )
        theirs.save_pretrained(tmp_path / "theirs")
        ours = load_peft_adapter(make(), tmp_path / "theirs")
        assert relative_error(logits(ours), logits(theirs)) < 1e-5
        expected, found = gradients(theirs), gradients(ours)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert relative_error(found[key], value) < 1e-4, key
        export_peft(ours, tmp_path / "back")
        again = PeftModel.from_pretrained(make(), tmp_path / "back").eval()
        assert relative_error(logits(again), logits(theirs)) < 1e-5

    def test_saves_switches_and_unloads(self, model: str, tmp_path: Path) -> None:
        make, name = MODELS[model]
        ours = disturbed(apply_reslora(make(), ResLoRAConfig(r=4, target_modules=[name])))
        before, plain = logits(ours), logits(make())
        assert relative_error(before, plain) > 1e-3
        save_adapter(ours, tmp_path)
        assert torch.equal(logits(load_adapter(make(), tmp_path)), before)
        add_adapter(ours, "second", ResLoRAConfig(r=2, target_modules=[name]))
        assert torch.equal(logits(set_adapter(ours, "second")), plain)
        assert torch.equal(logits(set_adapter(ours, "default")), before)
        unload(ours)
        assert torch.equal(logits(ours), plain)
        base = make()
        assert type(ours.get_input_embeddings()) is type(base.get_input_embeddings())
        assert vars(ours.get_input_embeddings()).keys() == vars(base.get_input_embeddings()).keys()
        assert ours.state_dict().keys() == base.state_dict().keys()

    def test_as_a_method_of_peft(self, model: str, tmp_path: Path) -> None:
        make, name = MODELS[model]
        native = disturbed(apply_reslora(make(), ResLoRAConfig(r=4, target_modules=[name])))
        under_peft = get_peft_model(make(), ResLoRAPeftConfig(r=4, target_modules=[name])).eval()
        for layer, adapted_layer in adapted_layers(native).items():
            inner = under_peft.base_model.model.get_submodule(layer).reslora_adapter["default"]
            inner.load_state_dict(adapted_layer.adapter_parameters())
        assert relative_error(logits(under_peft), logits(native)) < 1e-6
        under_peft.save_pretrained(tmp_path)
        assert torch.equal(logits(PeftModel.from_pretrained(make(), tmp_path).eval()), logits(under_peft))


def test_merges_where_the_weight_is_no_one_elses() -> None:
    model = disturbed(apply_reslora(llama(), ResLoRAConfig(r=4, target_modules=["embed_tokens"])))
    before = logits(model)
    merge_reslora(model)
    assert relative_error(logits(model), before) < 1e-5
    unmerge_reslora(model)
    assert torch.equal(logits(model), before)


def test_tied_to_the_head_it_does_not_merge_into_both() -> None:
    model = disturbed(apply_reslora(gpt2(), ResLoRAConfig(r=4, target_modules=["wte"])))
    before = logits(model)
    with pytest.raises(ValueError, match=r"lm_head\.weight' is shared with 'transformer\.wte\.weight'"):
        merge_reslora(model)
    assert torch.equal(logits(model), before)


class Tables(nn.Module):
    """An embedding of the same tokens in every block."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.ModuleDict({"table": nn.Embedding(9, 5, padding_idx=0)}) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        return torch.stack([block["table"](ids) for block in self.blocks])


@pytest.mark.parametrize("shortcut", ["none", "block"])
def test_is_the_linear_layer_on_one_hot_rows(shortcut: Any) -> None:
    config = ResLoRAConfig(r=2, shortcut=shortcut, pre_num=-1, target_modules=["table"])
    model = disturbed(apply_reslora(Tables(), config).double())
    layers, ids = list(adapted_layers(model).values()), torch.tensor([[1, 8, 3], [5, 3, 2]])
    assert layers[0].chain is not None and len(layers[0].chain) == 3
    rows = nn.functional.one_hot(ids, 9).double()
    expected = chain_forward(
        shortcut, -1, layers[0].scaling, [rows] * 3, [layer.weight.T for layer in layers], [None] * 3,
        [layer.lora_A for layer in layers], [layer.lora_B for layer in layers],
    )  # fmt: skip
    found = model(ids)
    assert relative_error(found, torch.stack(expected)) < 1e-12
    parameters = [p for layer in layers for p in (layer.lora_A, layer.lora_B)]
    gradients = torch.autograd.grad(found.square().sum(), parameters)
    truth = torch.autograd.grad(torch.stack(expected).square().sum(), parameters)
    assert all(relative_error(one, other) < 1e-12 for one, other in zip(gradients, truth, strict=True))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(ids), found) < 1e-12
    row = inspect(model).layers[0]
    assert (row.backend, row.hands_on) == ("torch", f"no: shortcut {shortcut!r}")
    assert "no fused kernel" in row.reason


@pytest.mark.parametrize(
    ("module", "changes", "message"),
    [
        (nn.Embedding(4, 6), {"shortcut": "middle"}, "shortcut='middle' hands on .* take 'block' or 'none'"),
        (nn.Embedding(4, 6), {"shortcut": "input"}, "shortcut='input' hands on"),
        (nn.Embedding(4, 6), {"use_dora": True}, "use_dora is for linear layers"),
        (nn.Embedding(4, 6), {"init_lora_weights": "pissa"}, "'pissa' is for linear layers"),
        (nn.Embedding(4, 6), {"backend": "triton"}, "has no kernel for it|cannot run here"),
        (nn.Embedding(4, 6, max_norm=1.0), {}, "max_norm=1.0, which changes its weight"),
        (type("Shifted", (nn.Embedding,), {"forward": lambda self, x: self.weight[x + 1]})(4, 6), {}, "no lookup"),
        (nn.EmbeddingBag(4, 6), {}, "a EmbeddingBag; only linear layers"),
    ],
    ids=["middle", "input", "DoRA", "a start", "a kernel", "max_norm", "another forward", "bag"],
)
def test_what_cannot_be_is_refused_by_name(module: Any, changes: dict[str, Any], message: str) -> None:
    model = nn.Sequential(module, nn.Linear(6, 3))
    with pytest.raises((ValueError, RuntimeError), match=message):
        apply_reslora(model, ResLoRAConfig(**{"r": 2, "target_modules": ["0", "1"]} | changes))
    assert model[0] is module
    assert all(p.requires_grad for p in model.parameters())


def test_positions_that_are_no_lookup_of_the_ids_are_refused() -> None:
    """OPT's and BART's learned positions add an offset to what they get, which an adapter beside would not."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, ffn_dim=8,
                       max_position_embeddings=16, word_embed_proj_dim=8)  # fmt: skip
    with pytest.raises(ValueError, match=r"OPTLearnedPositionalEmbedding, whose forward is no lookup"):
        apply_reslora(OPTForCausalLM(config), ResLoRAConfig(target_modules=["embed_positions"]))


@pytest.mark.parametrize("model", [*MODELS, "t5, with three embeddings of one weight"])
class TestTrainedTokens:
    """``trainable_token_indices``: rows of the table that train whole, in all embeddings and heads on one table."""

    def test_equal_to_peft_in_values_gradients_and_files(self, model: str, tmp_path: Path) -> None:
        make, name = MODELS.get(model, (t5, "shared"))
        config = LoraConfig(r=4, target_modules=["c_fc", "q_proj", "q"], trainable_token_indices={name: [3, 20, 7]})
        theirs = shifted(disturbed(get_peft_model(make(), config)))
        theirs.save_pretrained(tmp_path / "theirs")
        ours = load_peft_adapter(make(), tmp_path / "theirs")
        assert relative_error(logits(ours), logits(theirs)) < 1e-5
        rows = [value for key, value in gradients(theirs).items() if "trainable_tokens_delta" in key]
        (own,) = [value for key, value in gradients(ours).items() if key.endswith("trained_tokens")]
        assert len(rows) == 1
        assert relative_error(own, rows[0]) < 1e-4
        export_peft(ours, tmp_path / "back")
        again = PeftModel.from_pretrained(make(), tmp_path / "back").eval()
        assert relative_error(logits(again), logits(theirs)) < 1e-5

    def test_saves_merges_and_unloads(self, model: str, tmp_path: Path) -> None:
        make, _ = MODELS.get(model, (t5, "shared"))
        config = ResLoRAConfig(r=4, target_modules=["c_fc", "q_proj", "q"], trainable_token_indices=[3, 20])
        ours = apply_reslora(make(), config)
        trained = {name.rpartition(".")[2]: p for name, p in ours.named_parameters() if p.requires_grad}
        assert trained.keys() == {"lora_A", "lora_B", "trained_tokens"}
        assert trained["trained_tokens"].shape == (2, 32)
        assert relative_error(logits(ours), logits(make())) < 1e-6
        shifted(disturbed(ours))
        before, plain = logits(ours), logits(make())
        assert relative_error(before, plain) > 1e-2
        save_adapter(ours, tmp_path)
        assert torch.equal(logits(load_adapter(make(), tmp_path)), before)
        with disable_adapter(ours):
            assert torch.equal(logits(ours), plain)
        merge_reslora(ours)
        assert relative_error(logits(ours), before) < 1e-5
        unmerge_reslora(ours)
        assert torch.equal(logits(ours), before)
        ours.load_state_dict(make().state_dict())  # a base checkpoint, which has no such rows
        assert torch.equal(logits(ours), before)
        unload(ours)
        assert torch.equal(logits(ours), plain)
        assert ours.state_dict().keys() == make().state_dict().keys()

    def test_as_a_method_of_peft(self, model: str, tmp_path: Path) -> None:
        make, name = MODELS.get(model, (t5, "shared"))
        config = ResLoRAPeftConfig(r=4, target_modules=["c_fc", "q_proj", "q"], trainable_token_indices={name: [3, 20]})
        ours = shifted(disturbed(get_peft_model(make(), config)))
        ours.save_pretrained(tmp_path / "peft")
        to_native(tmp_path / "peft", tmp_path / "native")
        assert relative_error(logits(load_adapter(make(), tmp_path / "native")), logits(ours)) < 1e-5
        from_native(tmp_path / "native", tmp_path / "again")
        again = PeftModel.from_pretrained(make(), tmp_path / "again").eval()
        assert relative_error(logits(again), logits(ours)) < 1e-5


def shifted(model: nn.Module) -> Any:
    """The trained rows, which start as the table's, moved."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name or name.endswith("trained_tokens"):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    return model


def test_tokens_that_were_added() -> None:
    """The embedding is resized first; the new tokens train, the old ones and the tie stay as they are."""
    model = gpt2()
    model.resize_token_embeddings(VOCABULARY + 2)
    new = [VOCABULARY, VOCABULARY + 1]
    apply_reslora(model, ResLoRAConfig(r=2, target_modules=["c_attn"], trainable_token_indices=new))
    before = model.transformer.wte.weight.clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = torch.tensor([[1, new[0], 2, new[1]]])
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(model.transformer.wte.weight, before)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_head_with_a_weight_of_its_own(tmp_path: Path) -> None:
    """As huggingface/peft#2863: embeddings and head are untied, and the same tokens train in both."""
    rows = {"embed_tokens": [3, 20], "lm_head": [3, 20]}
    theirs = shifted(get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], trainable_token_indices=rows)))
    theirs.save_pretrained(tmp_path)
    ours = load_peft_adapter(llama(), tmp_path)
    assert relative_error(logits(ours), logits(theirs.eval())) < 1e-5
    assert sum(name.endswith("trained_tokens") for name, _ in ours.named_parameters()) == 2


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"trainable_token_indices": [VOCABULARY]}, ValueError, f"{VOCABULARY} is not in 'transformer.wte'"),
        ({"trainable_token_indices": {"no_such": [1]}}, ValueError, "'no_such' is no embedding and no linear head"),
        ({"trainable_token_indices": [1], "target_modules": ["wte"]}, ValueError, "is in target_modules too"),
        ({"trainable_token_indices": [1], "modules_to_save": ["wte"]}, ValueError, "trained whole by modules_to_save"),
        ({"trainable_token_indices": {"wte": [1], "lm_head": [2]}}, ValueError, "share a weight and train other"),
        ({"trainable_token_indices": {"lm_head": [1]}}, ValueError, "shares its weight with 'transformer.wte'"),
        ({"trainable_token_indices": [1], "modules_to_save": ["lm_head"]}, ValueError, "'lm_head' is trained whole"),
        ({"trainable_token_indices": [1, 1]}, ValueError, "each there once"),
        ({"trainable_token_indices": []}, TypeError, "at least one int"),
        ({"trainable_token_indices": "3"}, TypeError, "at least one int"),
        ({"trainable_token_indices": {"wte": [True]}}, TypeError, "at least one int"),
    ],
    ids=str,
)
def test_tokens_that_cannot_train_are_refused(changes: dict[str, Any], error: Any, message: str) -> None:
    model = gpt2()
    with pytest.raises(error, match=message):
        apply_reslora(model, ResLoRAConfig(**{"r": 2, "target_modules": ["c_attn"]} | changes))
    assert model.state_dict().keys() == gpt2().state_dict().keys()
    assert all(p.requires_grad for p in model.parameters())


def test_a_head_tied_to_an_adapted_embedding_is_that_of_peft(tmp_path: Path) -> None:
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    theirs = disturbed(get_peft_model(gemma3(), config))
    theirs.save_pretrained(tmp_path)
    ours = load_peft_adapter(gemma3(), tmp_path)
    assert relative_error(logits(ours), logits(theirs)) < 1e-5
    expected, found = gradients(theirs), gradients(ours)
    name = "model.embed_tokens"
    for which, other in ("AB", "BA"):  # PEFT's head may have parameters of its own, on the same memory
        head = expected.pop(f"lm_head.lora_{other}", None)
        both = expected.pop(f"{name}.lora_{which}") + (0 if head is None else head.T)
        assert relative_error(found.pop(f"{name}.lora_{which}"), both) < 1e-4
    assert found.keys() == expected.keys()
    assert all(relative_error(found[key], value) < 1e-4 for key, value in expected.items())


def test_peft_ties_no_head_to_an_embedding_of_another_name(tmp_path: Path) -> None:
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["wte", "c_attn"], ensure_weight_tying=True)
    theirs = disturbed(get_peft_model(gpt2(), config))
    theirs.save_pretrained(tmp_path)
    assert relative_error(logits(load_peft_adapter(gpt2(), tmp_path)), logits(theirs)) < 1e-5


@pytest.mark.parametrize(("make", "table"), [(gpt2, "wte"), (gemma3, "embed_tokens")], ids=["gpt2", "gemma3"])
def test_a_tied_head_goes_through_files_and_merges(make: Any, table: str, tmp_path: Path) -> None:
    targets = f".*({table}|c_attn|q_proj)"
    untied = disturbed(apply_reslora(make(), ResLoRAConfig(r=2, target_modules=targets)))
    ours = disturbed(apply_reslora(make(), ResLoRAConfig(r=2, target_modules=targets, ensure_weight_tying=True)))
    before = logits(ours)
    assert relative_error(before, logits(untied)) > 0.01
    export_peft(ours, tmp_path / "back")
    assert relative_error(logits(PeftModel.from_pretrained(make(), tmp_path / "back").eval()), before) < 1e-5
    assert relative_error(logits(load_peft_adapter(make(), tmp_path / "back")), before) < 1e-5
    save_adapter(ours, tmp_path / "ours")
    assert torch.equal(logits(load_adapter(make(), tmp_path / "ours")), before)
    with pytest.raises(ValueError, match="ensure_weight_tying"):
        load_adapter(untied, tmp_path / "ours")
    with disable_adapter(ours):
        assert torch.equal(logits(ours), logits(make()))
    merge_reslora(ours)
    assert relative_error(logits(ours), before) < 1e-5
    unmerge_reslora(ours)
    add_adapter(ours, "second", ResLoRAConfig(r=2, target_modules=".*(c_attn|q_proj)"))
    assert torch.equal(logits(set_adapter(ours, "second")), logits(make()))
    assert torch.equal(logits(set_adapter(ours, "default")), before)
    with pytest.raises(ValueError, match="in a head too"), adapters_per_sample(ours, ["default", "__base__"]):
        pass
    add_adapter(ours, "third", ResLoRAConfig(r=2, target_modules=f".*{table}", ensure_weight_tying=True))
    disturbed(set_adapter(ours, ["default", "third"]))
    summed = logits(ours)
    assert relative_error(summed, before) > 0.01
    with disable_adapter(ours):
        assert torch.equal(logits(ours), logits(make()))
    assert torch.equal(logits(ours), summed)
    unload(set_adapter(ours, "default"))
    assert torch.equal(logits(ours), logits(make()))


@pytest.mark.parametrize(
    "whole", [{"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": {"embed_tokens": [3, 20]}}], ids=str
)
def test_what_peft_trains_whole_and_ties_comes_over(whole: dict[str, Any], tmp_path: Path) -> None:
    theirs = get_peft_model(gemma3(), LoraConfig(r=2, target_modules=["q_proj"], ensure_weight_tying=True, **whole))
    with torch.no_grad():
        for parameter in dict.fromkeys(p for p in theirs.parameters() if p.requires_grad):
            parameter.add_(0.1)
    theirs.save_pretrained(tmp_path)
    ours = load_peft_adapter(gemma3(), tmp_path)
    assert relative_error(logits(ours), logits(theirs.eval())) < 1e-5
    assert ours.lm_head.weight is ours.get_input_embeddings().weight


def test_trained_tokens_are_everyones() -> None:
    model = apply_reslora(gpt2(), ResLoRAConfig(r=2, target_modules=["c_attn"], trainable_token_indices=[3]))
    with pytest.raises(ValueError, match="those of every sample"), adapters_per_sample(model, ["default", "__base__"]):
        pass


def test_a_head_has_one_adapter(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'lm_head' the adapter of 'transformer\.wte'"):
        apply_reslora(gpt2(), ResLoRAConfig(target_modules=["wte", "lm_head"], ensure_weight_tying=True))
    with pytest.warns(UserWarning, match="no head of the model shares"):
        apply_reslora(llama(), ResLoRAConfig(target_modules=["embed_tokens"], ensure_weight_tying=True))
    tied = disturbed(apply_reslora(gpt2(), ResLoRAConfig(r=2, target_modules=["wte"], ensure_weight_tying=True)))
    save_adapter(tied, tmp_path / "native")
    with pytest.raises(ValueError, match="ensure_weight_tying"):
        from_native(tmp_path / "native", tmp_path / "peft")

"""Models that lay samples out, read weights or change them otherwise than most: right, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reslora_kernels import (
    ResLoRAConfig,
    adapters_per_sample,
    add_adapter,
    apply_reslora,
    load_adapter,
    save_adapter,
    set_adapter,
)
from reslora_kernels.peft import ResLoRAPeftConfig

from .models import VOCABULARY, llama, randomize

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
SIZES = dict(vocab_size=VOCABULARY, hidden_size=16, num_attention_heads=2, intermediate_size=24, num_hidden_layers=2)
NAMES = ["a", "b", "b", "a"]
SQUARE = torch.randint(3, VOCABULARY, (4, 4), generator=torch.Generator().manual_seed(0))


def two_adapters(model: nn.Module, targets: list[str]) -> nn.Module:
    config = ResLoRAConfig(r=2, target_modules=targets, shortcut="block")
    randomize(apply_reslora(model, config, adapter_name="a"), 1)
    randomize(set_adapter(add_adapter(model, "b", config), "b"), 2)
    return model.eval()


def states(model: Any, tokens: Tensor = SQUARE) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens).last_hidden_state
    return found


class TestSamplesAmongDimensionsOfOneSize:
    """As many tokens as samples: which dimension of x holds the samples is seen in a run of one sample."""

    def expected(self, model: nn.Module) -> Tensor:
        alone = {name: states(set_adapter(model, name)) for name in "ab"}
        return torch.stack([alone[name][i] for i, name in enumerate(NAMES)])

    def test_first_as_almost_everywhere(self) -> None:
        torch.manual_seed(0)
        model = two_adapters(transformers.BertModel(transformers.BertConfig(**SIZES)), ["query", "value"])
        expected = self.expected(model)
        with adapters_per_sample(model, NAMES):
            torch.testing.assert_close(states(model), expected)

    def test_first_under_peft(self) -> None:
        torch.manual_seed(0)
        config = ResLoRAPeftConfig(r=2, target_modules=["query", "value"], shortcut="middle")
        bert = transformers.BertModel(transformers.BertConfig(**SIZES))
        model = peft.get_peft_model(bert, config, adapter_name="one")
        model.add_adapter("two", config)
        randomize(model.base_model.model)
        model.eval()
        names = ["one", "two", "__base__", "one"]
        with torch.no_grad():
            together = model(input_ids=SQUARE, adapter_names=names).last_hidden_state
            for i, name in enumerate(names):
                alone = model(input_ids=SQUARE[i : i + 1], adapter_names=[name]).last_hidden_state
                torch.testing.assert_close(together[i : i + 1], alone)

    def test_second_is_refused(self) -> None:
        """XLNet works on [tokens, samples, width]."""
        torch.manual_seed(0)
        config = transformers.XLNetConfig(vocab_size=VOCABULARY, d_model=16, n_layer=2, n_head=2, d_inner=24)
        model = two_adapters(transformers.XLNetModel(config), ["layer_1", "layer_2"])
        with (
            pytest.raises(ValueError, match="either dimension could be the 4 samples"),
            adapters_per_sample(model, NAMES),
        ):
            states(model)

    def test_experts_are_refused(self) -> None:
        """One may be given as many tokens as there are samples, by chance."""
        torch.manual_seed(0)
        config = transformers.SwitchTransformersConfig(
            vocab_size=VOCABULARY, d_model=16, d_ff=24, d_kv=8, num_heads=2, num_layers=2, num_experts=2,
            num_sparse_encoder_layers=1,
        )  # fmt: skip
        model = transformers.SwitchTransformersEncoderModel(config)
        model = two_adapters(model, ["wi", "wo"])
        with (
            pytest.raises(ValueError, match="is an expert, which sees a choice"),
            adapters_per_sample(model, ["a", "b"]),
        ):
            pass


def test_a_head_that_is_given_the_embedding_is_no_place_for_an_adapter() -> None:
    """DeBERTa's multiplies with the weight of the embedding that its forward gets."""
    config = transformers.DebertaV2Config(**SIZES, legacy=False, max_position_embeddings=16)
    model = transformers.DebertaV2ForMaskedLM(config)
    with pytest.raises(ValueError, match="DebertaV2LMPredictionHead reads the weight of an embedding"):
        apply_reslora(model, ResLoRAConfig(target_modules=["query_proj"], trainable_token_indices=[3]))
    with pytest.raises(ValueError, match="whose weight DebertaV2LMPredictionHead reads past an adapter"):
        apply_reslora(model, ResLoRAConfig(target_modules=["word_embeddings"]))
    assert inspectable(apply_reslora(model, ResLoRAConfig(target_modules=["query_proj"])))


def inspectable(model: nn.Module) -> bool:
    return any(name.endswith("lora_A") for name, _ in model.named_parameters())


def test_weights_that_are_divided_in_evaluation_are_refused() -> None:
    sizes = dict(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=3, context_length=16)
    with pytest.raises(ValueError, match=r"from 2 on in evaluation.*rescale_every = 0"):
        apply_reslora(transformers.RwkvModel(transformers.RwkvConfig(**sizes, rescale_every=2)), ResLoRAConfig())
    for every in (0, 6):
        assert inspectable(
            apply_reslora(
                transformers.RwkvModel(transformers.RwkvConfig(**sizes, rescale_every=every)), ResLoRAConfig()
            )
        )


def test_names_that_differ_by_a_part_in_front_say_so(tmp_path: Path) -> None:
    config = ResLoRAConfig(r=2, target_modules=["q_proj"])
    whole, inner = llama(), llama().model
    save_adapter(randomize(apply_reslora(inner, config)), tmp_path / "inner")
    with pytest.raises(ValueError, match=r"what this model has as its 'model': load_adapter\(model\.model, \.\.\.\)"):
        load_adapter(whole, tmp_path / "inner")
    load_adapter(whole.model, tmp_path / "inner")
    save_adapter(apply_reslora(llama(), config), tmp_path / "whole")
    with pytest.raises(ValueError, match=r"on a model that has one like this as its 'model'"):
        load_adapter(llama().model, tmp_path / "whole")

"""Exports that PEFT would put elsewhere, or call with other arguments, than they were made for."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn

from reslora_kernels import ResLoRAConfig, apply_reslora, export_peft

from .models import randomize, t5

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = {"vocab_size": 99, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0} | SIZES
IDS = torch.arange(3, 10)[None]


def glm4_moe() -> Any:
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1}
    config = transformers.Glm4MoeConfig(**TEXT, **experts, first_k_dense_replace=1, n_group=1, topk_group=1)
    return transformers.Glm4MoeForCausalLM(config).eval()


def whisper() -> Any:
    config = transformers.WhisperConfig(
        vocab_size=99, num_mel_bins=8, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=12,
        max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config).eval()


def llava() -> Any:
    vision = {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 4, "projection_dim": 32} | SIZES
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama"} | TEXT, vision_config=vision, image_token_index=98, vision_feature_layer=-1
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


MODELS = {
    "whisper": (
        whisper,
        {"input_features": torch.randn(2, 8, 24), "decoder_input_ids": IDS[:, :5].expand(2, -1)},
        None,
    ),
    "llava": (llava, {"input_ids": IDS}, None),
    "t5": (t5, {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]}, "SEQ_2_SEQ_LM"),
    "glm4 attention": (glm4_moe, {"input_ids": IDS}, "CAUSAL_LM"),
}


@pytest.mark.parametrize("name", MODELS)
def test_peft_runs_what_was_exported(name: str, tmp_path: Path) -> None:
    make, batch, task = MODELS[name]
    base = make()
    model = copy.deepcopy(base)
    apply_reslora(model, ResLoRAConfig(r=4, shortcut="none", exclude_modules=r".*\.(gate|up|down)_proj"))
    export_peft(randomize(model), tmp_path)
    loaded = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    assert loaded.peft_config["default"].task_type == task
    with torch.no_grad():
        assert torch.allclose(loaded(**batch).logits, model(**batch).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "target_modules", ["all-linear", ["gate_proj"], r".*shared_experts\.up_proj", ["q_proj", "down_proj"]]
)
def test_layers_that_peft_takes_for_fused_experts_are_refused(target_modules: Any, tmp_path: Path) -> None:
    model = apply_reslora(glm4_moe(), ResLoRAConfig(r=4, shortcut="none", target_modules=target_modules))
    with pytest.raises(ValueError, match=r"PEFT takes .* of a Glm4MoeForCausalLM for parts of its fused experts"):
        export_peft(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


class Twice(nn.Module):
    """One layer under two parents; and one block in two places, which PEFT changes in both."""

    def __init__(self, block: bool) -> None:
        super().__init__()
        self.first = nn.ModuleDict({"fc": nn.Linear(8, 8)})
        self.second = self.first if block else nn.ModuleDict({"fc": self.first["fc"]})

    def forward(self, x: Tensor) -> Tensor:
        return self.second["fc"](torch.tanh(self.first["fc"](x)))


@pytest.mark.parametrize("block", [True, False])
def test_layer_in_two_places(block: bool, tmp_path: Path) -> None:
    base, x = Twice(block).double(), torch.randn(4, 8, dtype=torch.float64)
    model = copy.deepcopy(base)
    randomize(apply_reslora(model, ResLoRAConfig(r=2, shortcut="none"), example_inputs=(x,)))
    if not block:
        with pytest.raises(ValueError, match=r"layer 'first.fc' is 'second.fc' too"):
            export_peft(model, tmp_path / "adapter")
        assert not (tmp_path / "adapter").exists()
        return
    export_peft(model, tmp_path)
    assert torch.allclose(PeftModel.from_pretrained(base, str(tmp_path))(x), model(x), rtol=0, atol=1e-12)

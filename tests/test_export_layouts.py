"""Exports as diffusers' pipelines load them, and the model card that every export writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from reslora_kernels import ResLoRAConfig, apply_reslora, export_peft, merge_reslora

from .models import FAMILIES, llama, randomize, roberta, unet

PARTS = {"unet": ["to_q", "to_k", "to_v", "to_out.0"], "text_encoder": ["q_proj", "v_proj", "fc1"]}
LORA_NAME = "pytorch_lora_weights.safetensors"


def pipeline() -> Any:
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    network = unet()
    torch.manual_seed(0)
    sizes = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=48)
    return StableDiffusionPipeline(
        unet=network,
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=2),
        text_encoder=CLIPTextModel(CLIPTextConfig(bos_token_id=0, eos_token_id=2, **sizes)).eval(),
        tokenizer=None,
        scheduler=PNDMScheduler(steps_offset=1, skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(torch.float64)


@torch.no_grad()
def outputs(pipe: Any) -> list[Tensor]:
    text = pipe.text_encoder(torch.arange(3, 13)[None])[0]
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    return [text, pipe.unet(noise, 7, text).sample]


def far(some: list[Tensor], others: list[Tensor]) -> list[float]:
    return [float((a - b).abs().max()) for a, b in zip(some, others, strict=True)]


class TestDiffusers:
    @pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
    def test_pipeline_loads_all_its_parts(self, dora: bool, tmp_path: Path) -> None:
        pipe = pipeline()
        before = outputs(pipe)
        for name, targets in PARTS.items():
            model = getattr(pipe, name)
            randomize(apply_reslora(model, ResLoRAConfig(r=3, use_dora=dora, target_modules=targets)))
            if dora:
                merge_reslora(model)  # diffusers' DoRA is of the one update
            export_peft(model, tmp_path, layout="diffusers")
        trained, again = outputs(pipe), pipeline()
        again.load_lora_weights(tmp_path)
        assert min(far(trained, before)) > 0.1
        assert max(far(outputs(again), trained)) < 1e-6
        assert {path.name for path in tmp_path.iterdir()} == {LORA_NAME, "README.md"}

    def test_a_part_that_is_exported_again_replaces_only_itself(self, tmp_path: Path) -> None:
        pipe = pipeline()
        for name, targets in PARTS.items():
            apply_reslora(getattr(pipe, name), ResLoRAConfig(r=3, target_modules=targets))
            export_peft(getattr(pipe, name), tmp_path, layout="diffusers")
        first = load_file(tmp_path / LORA_NAME)
        export_peft(randomize(pipe.unet), tmp_path, layout="diffusers")
        second = load_file(tmp_path / LORA_NAME)
        assert first.keys() == second.keys()
        changed = {key for key in first if not torch.equal(first[key], second[key])}
        assert changed == {key for key in first if key.startswith("unet.")}
        card = (tmp_path / "README.md").read_text()
        assert all(card.count(f"## Merge of {name}\n") == 1 for name in PARTS)

    def test_transformer_has_its_own_prefix(self, tmp_path: Path) -> None:
        from diffusers import SD3Transformer2DModel

        def make() -> Any:
            torch.manual_seed(0)
            sizes = dict(num_layers=2, attention_head_dim=8, num_attention_heads=2, patch_size=1, sample_size=4)
            widths = dict(caption_projection_dim=16, joint_attention_dim=16, pooled_projection_dim=16)
            return SD3Transformer2DModel(in_channels=4, out_channels=4, pos_embed_max_size=8, **sizes, **widths).eval()

        def run(model: Any) -> Tensor:
            generator = torch.Generator().manual_seed(0)
            shapes = ((1, 4, 4, 4), (1, 5, 16), (1, 16))
            with torch.no_grad():
                return model(*(torch.randn(shape, generator=generator) for shape in shapes), torch.tensor([3])).sample

        model, again = make(), make()
        apply_reslora(model, ResLoRAConfig(r=3, target_modules=["to_q", "to_v"], shortcut="none"))
        export_peft(randomize(model), tmp_path, layout="diffusers")
        again.load_lora_adapter(str(tmp_path), weight_name=LORA_NAME)
        assert float((run(again) - run(model)).abs().max()) < 1e-5 < float((run(make()) - run(model)).abs().max())

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"layout": "kohya"}, "layout must be .* got 'kohya'"),
            ({"layout": "diffusers", "pattern": True}, "pattern must be False"),
            ({"layout": "diffusers"}, "component must say .* LlamaForCausalLM"),
            ({"layout": "diffusers", "component": "my unet"}, "component must be .* got 'my unet'"),
            ({"component": "unet"}, "component is for layout='diffusers'"),
        ],
    )
    def test_arguments(self, arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=message):
            export_peft(apply_reslora(llama(), ResLoRAConfig(r=2)), tmp_path / "new", **arguments)
        assert not (tmp_path / "new").exists()

    def test_what_the_file_cannot_hold_is_refused(self, tmp_path: Path) -> None:
        model = apply_reslora(unet(), ResLoRAConfig(r=2, target_modules=["to_q"], bias="all"))
        with pytest.raises(ValueError, match=r"LoRA matrices only.*'conv_in\.bias'"):
            export_peft(model, tmp_path / "new", layout="diffusers")
        assert not (tmp_path / "new").exists()


class TestCard:
    def test_says_what_it_is_how_exact_and_how_to_serve(self, tmp_path: Path) -> None:
        from huggingface_hub import ModelCard

        model = llama()
        model.config._name_or_path = "some/base"
        randomize(apply_reslora(model, ResLoRAConfig(r=3, shortcut="input")))
        report = export_peft(model, tmp_path, "least_squares", calibration=[FAMILIES["llama"].batch(1)])
        card = ModelCard.load(tmp_path / "README.md")
        assert card.data.base_model == "some/base"
        assert card.data.library_name == "peft"
        assert {"lora", "reslora"} == set(card.data.tags)
        assert "shortcut `input`" in card.text and "least_squares" in card.text
        assert f"{report.relative_error:.2e}" in card.text
        assert all(f"| {name} |" in card.text for name in report.ranks)
        assert f"rank {report.max_lora_rank} " in card.text

    def test_a_base_in_a_folder_is_no_id_of_the_hub(self, tmp_path: Path) -> None:
        model = llama()
        model.config._name_or_path = str(tmp_path)
        export_peft(apply_reslora(model, ResLoRAConfig(r=3)), tmp_path)
        assert "base_model:" not in (tmp_path / "README.md").read_text()

    def test_of_ones_own_stays(self, tmp_path: Path) -> None:
        model = apply_reslora(roberta(), ResLoRAConfig(r=3))
        export_peft(model, tmp_path)
        export_peft(model, tmp_path)  # its own it replaces
        (tmp_path / "README.md").write_text("mine")
        export_peft(model, tmp_path)
        assert (tmp_path / "README.md").read_text() == "mine"

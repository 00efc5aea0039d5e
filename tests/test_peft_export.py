"""Exported adapters load with PEFT and with Transformers and give the merged model's logits, or are refused."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from reslora_kernels import ResLoRAConfig, apply_reslora, export_peft, load_peft_adapter, merge_reslora
from reslora_kernels.adapt.record import adapted_layers
from reslora_kernels.testing import relative_error

from .models import FAMILIES, Family, llama, needs_transformers_5, randomize, roberta, t5

SHORTCUTS = ("none", "input", "block", "middle")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ROUNDING = 2e-9  # float64; the same algebra in another order, through a whole model of random weights


def config(shortcut: str = "block", **changes: Any) -> ResLoRAConfig:
    return ResLoRAConfig(**({"r": 3, "lora_alpha": 7, "shortcut": shortcut, "pre_num": 2} | changes))


def adapted(make: Callable[[], nn.Module], shortcut: str = "block", **changes: Any) -> nn.Module:
    return randomize(apply_reslora(make().double(), config(shortcut, **changes)))


@torch.no_grad()
def outputs(model: nn.Module, family: Family = FAMILIES["llama"]) -> Tensor:
    batch = {key: value.double() if value.is_floating_point() else value for key, value in family.batch(5).items()}
    return family.outputs(model, batch)


def with_peft(base: nn.Module, path: Path) -> PeftModel:
    """Loaded by PEFT, which warns about keys that it does not find: an error here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        return PeftModel.from_pretrained(base, path)


def with_transformers(base: Any, path: Path) -> Any:
    base.load_adapter(str(path))
    return base


def settings_of(path: Path) -> dict[str, Any]:
    return json.loads((path / CONFIG).read_text())


def names_of(model: nn.Module) -> set[str]:
    """The modules that PEFT put adapters on."""
    return {
        name for name, module in model.named_modules() if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    }


@pytest.mark.parametrize("pattern", [False, True], ids=["uniform rank", "exact ranks"])
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_llama_gives_the_merged_models_logits(shortcut: str, pattern: bool, tmp_path: Path) -> None:
    model = adapted(llama, shortcut)
    calibration = [FAMILIES["llama"].batch(seed) for seed in (1, 2)]
    unmerged = outputs(model)
    report = export_peft(model, tmp_path / "before", calibration=calibration, pattern=pattern)
    assert torch.equal(outputs(model), unmerged)
    merge_reslora(model, calibration=calibration)
    merged = outputs(model)
    export_peft(model, tmp_path / "after", pattern=pattern)
    for path in (tmp_path / "before", tmp_path / "after"):
        loaded = with_peft(llama().double(), path)
        assert relative_error(outputs(loaded), merged) <= ROUNDING
        assert names_of(loaded) == {f"base_model.model.{name}" for name in adapted_layers(model)}
        assert relative_error(outputs(with_transformers(llama().double(), path)), merged) <= ROUNDING
    rank = 3 * (3 if shortcut == "block" else 1)
    assert report.max_lora_rank == rank
    assert f"max_lora_rank a server needs: {rank}" in str(report)
    assert (tmp_path / "before" / WEIGHTS).read_bytes() == (tmp_path / "after" / WEIGHTS).read_bytes()


def test_block_is_exact(tmp_path: Path) -> None:
    model = adapted(llama)
    report = export_peft(model, tmp_path)
    assert relative_error(outputs(with_peft(llama().double(), tmp_path)), outputs(model)) <= ROUNDING
    assert report.relative_error == 0
    assert sorted(set(report.ranks.values())) == [3, 6, 9]


def test_uniform_rank_has_one_shape_and_no_pattern(tmp_path: Path) -> None:
    export_peft(adapted(llama), tmp_path)
    about = settings_of(tmp_path)
    assert (about["r"], about["lora_alpha"], about["use_rslora"]) == (9, 9, False)
    assert about["rank_pattern"] == about["alpha_pattern"] == {}
    assert about["peft_type"] == "LORA"
    assert about["task_type"] == "CAUSAL_LM"
    tensors = load_file(tmp_path / WEIGHTS)
    assert {t.shape[0] for key, t in tensors.items() if "lora_A" in key} == {9}
    assert {t.shape[1] for key, t in tensors.items() if "lora_B" in key} == {9}


def test_pattern_keeps_exact_ranks(tmp_path: Path) -> None:
    report = export_peft(adapted(llama), tmp_path, pattern=True)
    tensors = load_file(tmp_path / WEIGHTS)
    for name, rank in report.ranks.items():
        assert tensors[f"base_model.model.{name}.lora_A.weight"].shape[0] == rank
    assert settings_of(tmp_path)["rank_pattern"] == {name: r for name, r in report.ranks.items() if r != 9}


def test_a_pattern_means_one_layer_though_other_names_end_like_it(tmp_path: Path) -> None:
    """Flux has ``proj_out`` in its blocks and after them."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.ModuleDict({"out": nn.Linear(8, 8)}) for _ in range(3))
            self.out = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + torch.tanh(block["out"](x))
            y: Tensor = self.out(x)
            return y

    torch.manual_seed(0)
    base, x = Model().double(), torch.randn(3, 8, dtype=torch.float64)
    model = randomize(apply_reslora(copy.deepcopy(base), ResLoRAConfig(r=2)))
    export_peft(model, tmp_path, pattern=True)
    assert settings_of(tmp_path)["rank_pattern"] == {"blocks.0.out": 2, "^out$": 2}
    for load in (PeftModel.from_pretrained, load_peft_adapter):
        assert relative_error(load(copy.deepcopy(base), tmp_path)(x), model(x)) < ROUNDING


@pytest.mark.parametrize("name", ["t5", "unet", "roberta", "vit"])
def test_other_families(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = adapted(family.make, "block")
    expected = outputs(model, family)
    export_peft(model, tmp_path, pattern=True)
    loaded = with_peft(family.make().double(), tmp_path)
    assert names_of(loaded) == {f"base_model.model.{name}" for name in adapted_layers(model)}
    assert relative_error(outputs(loaded, family), expected) <= ROUNDING


def test_unet_loads_through_its_own_peft_mixin(tmp_path: Path) -> None:
    family = FAMILIES["unet"]
    model = adapted(family.make, "middle", target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    merge_reslora(model, "least_squares", calibration=[
        {key: value.double() if value.is_floating_point() else value for key, value in family.batch(1).items()}
    ])  # fmt: skip
    export_peft(model, tmp_path)
    loaded = with_peft(family.make().double(), tmp_path)
    assert relative_error(outputs(loaded, family), outputs(model, family)) <= ROUNDING


class TestOtherTrainedParameters:
    @pytest.mark.parametrize("load", [with_peft, with_transformers])
    @pytest.mark.parametrize("bias", ["lora_only", "all"])
    def test_biases(self, bias: str, load: Callable[[Any, Path], Any], tmp_path: Path) -> None:
        family = FAMILIES["roberta"]
        model = adapted(roberta, bias=bias, target_modules=["query", "value"])
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.dim() == 1:
                    parameter.add_(0.3)
        export_peft(model, tmp_path)
        assert relative_error(outputs(load(roberta().double(), tmp_path), family), outputs(model, family)) <= ROUNDING

    @pytest.mark.parametrize("load", [with_peft, with_transformers])
    def test_head(self, load: Callable[[Any, Path], Any], tmp_path: Path) -> None:
        family = FAMILIES["roberta"]
        model = adapted(roberta, target_modules=["query", "value"])
        model.classifier.requires_grad_(True)
        with torch.no_grad():
            for parameter in model.classifier.parameters():
                parameter.mul_(1.5).add_(0.1)
        export_peft(model, tmp_path)
        assert settings_of(tmp_path)["modules_to_save"] == ["classifier.dense", "classifier.out_proj"]
        assert relative_error(outputs(load(roberta().double(), tmp_path), family), outputs(model, family)) <= ROUNDING

    def test_head_and_biases_together(self, tmp_path: Path) -> None:
        family = FAMILIES["roberta"]
        model = adapted(roberta, target_modules=["query", "value"], bias="all")
        model.classifier.requires_grad_(True)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1)
        export_peft(model, tmp_path)
        assert (
            relative_error(outputs(with_peft(roberta().double(), tmp_path), family), outputs(model, family)) <= ROUNDING
        )

    def test_half_a_module_is_refused(self, tmp_path: Path) -> None:
        model = adapted(llama)
        model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
        with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj"):
            export_peft(model, tmp_path / "new")
        assert not (tmp_path / "new").exists()


class TestTargets:
    def test_role_names_where_they_mean_adapted_modules_only(self, tmp_path: Path) -> None:
        export_peft(adapted(llama, target_modules=["q_proj", "down_proj"]), tmp_path)
        assert settings_of(tmp_path)["target_modules"] == ["down_proj", "q_proj"]

    def test_full_names_where_a_role_means_others_too(self, tmp_path: Path) -> None:
        model = adapted(
            llama,
            target_modules=["q_proj", "v_proj"],
            layers_to_transform=[0, 2],
            exclude_modules=["0.self_attn.v_proj"],
        )
        export_peft(model, tmp_path)
        expected = {
            "model.layers.0.self_attn.q_proj",
            "model.layers.2.self_attn.q_proj",
            "model.layers.2.self_attn.v_proj",
        }
        assert set(settings_of(tmp_path)["target_modules"]) == expected
        assert names_of(with_peft(llama().double(), tmp_path)) == {f"base_model.model.{name}" for name in expected}

    def test_full_name_that_is_the_ending_of_another(self, tmp_path: Path) -> None:
        class Nested(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.fc = nn.Linear(6, 6)
                self.inner = nn.ModuleDict({"fc": nn.Linear(6, 6)})

            def forward(self, x: Tensor) -> Tensor:
                return self.inner["fc"](self.fc(x))

        x = torch.linspace(-1, 1, 12).reshape(2, 6)
        model = randomize(apply_reslora(Nested(), config(exclude_modules=["inner.fc"]), example_inputs=x))
        export_peft(model, tmp_path)
        loaded = with_peft(Nested(), tmp_path)
        assert names_of(loaded) == {"base_model.model.fc"}
        assert relative_error(loaded(x), model(x)) <= 1e-5

    def test_encoder_of_t5_only(self, tmp_path: Path) -> None:
        family = FAMILIES["t5"]
        model = adapted(t5, target_modules=r"encoder.*\.(q|v)")
        export_peft(model, tmp_path)
        loaded = with_peft(t5().double(), tmp_path)
        assert names_of(loaded) == {f"base_model.model.{name}" for name in adapted_layers(model)}
        assert relative_error(outputs(loaded, family), outputs(model, family)) <= ROUNDING


class TestErrors:
    """A wrong argument is named, and nothing is written."""

    @pytest.mark.parametrize(
        ("shortcut", "arguments", "error", "message"),
        [
            ("block", {"method": "best"}, ValueError, "method.*'best'"),
            ("middle", {}, ValueError, "needs data.*calibration"),
            ("input", {"method": "input"}, ValueError, "needs data.*'weights'"),
            ("block", {"pattern": "yes"}, TypeError, "pattern.*'yes'"),
            ("input", {"statistics": 3}, TypeError, "statistics.*int"),
            ("input", {"calibration": 3}, TypeError, "calibration.*int"),
            ("input", {"calibration": []}, ValueError, "no batch"),
            ("input", {"regularization": -1.0}, ValueError, "regularization.*-1"),
            ("input", {"sequential": True}, ValueError, "sequential"),
        ],
        ids=lambda value: str(value)[:30],
    )
    def test_arguments(
        self, shortcut: str, arguments: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
    ) -> None:
        model = adapted(llama, shortcut)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(error, match=message):
            export_peft(model, tmp_path / "new", **arguments)
        assert not (tmp_path / "new").exists()
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def test_path(self, tmp_path: Path) -> None:
        model = adapted(llama)
        (tmp_path / "file").write_text("mine")
        with pytest.raises(NotADirectoryError, match=r"path .*file"):
            export_peft(model, tmp_path / "file")
        assert (tmp_path / "file").read_text() == "mine"
        with pytest.raises(TypeError, match=r"path .*int"):
            export_peft(model, 3)  # type: ignore[arg-type]

    def test_folder_of_a_whole_model(self, tmp_path: Path) -> None:
        """Transformers would add the adapter to the merged model."""
        model = adapted(llama)
        merge_reslora(model)
        model.save_pretrained(tmp_path)
        before = {path.name for path in tmp_path.iterdir()}
        with pytest.raises(ValueError, match=r"path .* holds a whole model"):
            export_peft(model, tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == before

    def test_model(self, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match=r"model .*str"):
            export_peft("llama", tmp_path / "new")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="apply_reslora"):
            export_peft(llama(), tmp_path / "new")
        assert not (tmp_path / "new").exists()

    def test_update_with_nan(self, tmp_path: Path) -> None:
        model = adapted(llama)
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.lora_B[0, 0] = float("nan")
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj.*NaN"):
            export_peft(model, tmp_path / "new")
        assert not (tmp_path / "new").exists()

    def test_merged_model_takes_no_merge_arguments(self, tmp_path: Path) -> None:
        model = adapted(llama, "input")
        merge_reslora(model, "weights")
        for arguments in ({"method": "weights"}, {"calibration": [FAMILIES["llama"].batch(1)]}, {"extra_rank": 2}):
            with pytest.raises(ValueError, match="merged already"):
                export_peft(model, tmp_path / "new", **arguments)
        assert not (tmp_path / "new").exists()

    def test_half_precision_adapter_of_a_half_precision_base(self, tmp_path: Path) -> None:
        model = randomize(apply_reslora(llama().to(torch.bfloat16), config()))
        twin = copy.deepcopy(model)
        export_peft(model, tmp_path)
        assert {t.dtype for t in load_file(tmp_path / WEIGHTS).values()} == {torch.float32}
        loaded = with_peft(llama().to(torch.bfloat16), tmp_path)
        truth = outputs(twin.double())
        assert relative_error(outputs(loaded), truth) <= 2 * relative_error(outputs(model), truth)


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


@needs_transformers_5
@pytest.mark.parametrize(
    "target_modules", ["all-linear", ["gate_proj"], r".*shared_experts\.up_proj", ["q_proj", "down_proj"]]
)
def test_layers_that_peft_takes_for_fused_experts_are_refused(target_modules: Any, tmp_path: Path) -> None:
    model = apply_reslora(glm4_moe(), ResLoRAConfig(r=4, shortcut="none", target_modules=target_modules))
    with pytest.raises(
        ValueError, match=r"PEFT puts .* of a Glm4MoeForCausalLM under another name, as it does with fused"
    ):
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

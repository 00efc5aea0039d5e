"""What others do to a model after it was adapted: it computes what it should, or its next use says what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from reslora_kernels import ResLoRAConfig, apply_reslora, inspect, merge_reslora, save_adapter
from reslora_kernels.testing import relative_error

from .models import denoised, llama, logits, randomize, unet

peft = pytest.importorskip("peft")

from reslora_kernels.peft import ResLoRAPeftConfig  # noqa: E402

TARGETS = ["q_proj", "v_proj"]
CHAINS = ["none", "input", "block", "middle"]


def native(shortcut: str) -> Any:
    return randomize(apply_reslora(llama(), ResLoRAConfig(r=4, target_modules=TARGETS, shortcut=shortcut)))


def held_by_peft(shortcut: str) -> Any:
    return randomize(peft.get_peft_model(llama(), ResLoRAPeftConfig(r=4, target_modules=TARGETS, shortcut=shortcut)))


def for_quantisation_aware_training(model: nn.Module) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    qat = pytest.importorskip("torchao.quantization.qat")
    weights = qat.IntxFakeQuantizeConfig(torch.int8, group_size=8)
    quantization.quantize_(model, qat.QATConfig(weight_config=weights, step="prepare"))


def to_float8(model: nn.Module) -> None:
    float8 = pytest.importorskip("torchao.float8")
    config = float8.Float8LinearConfig(emulate=True)
    float8.convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: "layers.1" in name)


class TestReplacedLayers:
    """Adapted layers are torch.nn.Linear, too, and conversions take all of these."""

    @pytest.mark.parametrize("shortcut", ["none", "input", "block"])
    @pytest.mark.parametrize("make", [native, held_by_peft])
    @pytest.mark.parametrize("convert", [for_quantisation_aware_training, to_float8])
    def test_the_next_use_says_so(self, convert: Any, make: Any, shortcut: str, tmp_path: Path) -> None:
        model = make(shortcut)
        convert(model)
        method: Any = "weights" if shortcut == "input" else None
        uses: list[Callable[[], Any]] = [
            lambda: logits(model), lambda: inspect(model), lambda: merge_reslora(model, method),
            lambda: save_adapter(model, tmp_path) if make is native else model.save_pretrained(tmp_path),
        ]  # fmt: skip
        for use in uses:
            with pytest.raises(ValueError, match=r"_proj' was adapted and is gone: a F\w+Linear is in its place"):
                use()
        assert not list(tmp_path.glob("*.safetensors"))

    def test_a_weight_that_is_quantised_then(self) -> None:
        quantization = pytest.importorskip("torchao.quantization")
        model = native("block")
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        with pytest.raises(ValueError, match=r"_proj' was adapted, then its weight was quantised \(Int8Tensor\)"):
            logits(model)

    def test_a_layer_in_a_wrapper_goes_on(self) -> None:
        model = native("block")
        expected = logits(model)
        attention = model.model.layers[1].self_attn
        attention.q_proj = checkpoint_wrapper(attention.q_proj)
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("shortcut", ["none", "middle"])
def test_lora_around_an_adapted_layer(shortcut: str, tmp_path: Path) -> None:
    """It computes their sum; a save of either alone would fit no model."""
    model = native(shortcut)
    expected = logits(model)
    both = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=TARGETS))
    assert torch.equal(logits(both), expected)
    with pytest.raises(ValueError, match=r"is inside a peft\.tuners\.lora\.layer\.Linear now"):
        save_adapter(model, tmp_path)
    save_adapter(both.unload(), tmp_path)
    assert any(tmp_path.iterdir())


class TestScale:
    """PEFT's and diffusers' factor on what an adapter adds: of s, so of every shortcut."""

    def scaled(self, shortcut: str, factor: float) -> Any:
        config = ResLoRAPeftConfig(r=3, lora_alpha=6 * factor, target_modules=["to_q", "to_v"], shortcut=shortcut)
        model = unet()
        model.add_adapter(config)
        return randomize(model)

    @pytest.mark.parametrize("shortcut", CHAINS)
    def test_of_a_forward_and_for_good(self, shortcut: str) -> None:
        model, whole = self.scaled(shortcut, 1), denoised(self.scaled(shortcut, 1))
        for factor, expected in ((0.5, denoised(self.scaled(shortcut, 0.5))), (0.0, denoised(unet()))):
            assert relative_error(denoised(model, cross_attention_kwargs={"scale": factor}), expected) < 1e-5
            assert torch.equal(denoised(model), whole)
            model.set_adapters("default", factor)
            assert relative_error(denoised(model), expected) < 1e-5
            model.set_adapters("default")
        assert torch.equal(denoised(model), whole)

    @pytest.mark.parametrize("weights", [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (0.5, 2.0)])
    def test_of_a_sum(self, weights: tuple[float, float]) -> None:
        """The parts of one adapter's chain do not see the other's, so the outputs of one linear layer add up."""
        torch.manual_seed(0)
        x, base = torch.randn(5, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

        def with_adapters(*names: str) -> Any:
            model: Any = None
            for name in names:
                config = ResLoRAPeftConfig(r=2, target_modules=["0"], shortcut="none")
                if model is None:
                    model = peft.get_peft_model(nn.Sequential(*base), config, adapter_name=name)
                else:
                    model.add_adapter(name, config)
            return randomize(model)

        model = with_adapters("one", "two")
        model.base_model.set_adapter(["one", "two"])
        layer = model.base_model.model[0]
        frozen, parts = layer.base_layer(x), []
        for name, weight in zip(("one", "two"), weights, strict=True):
            own = layer.reslora_adapter[name]
            parts.append(own.scaling * x @ own.lora_A.T @ own.lora_B.T)
            layer.set_scale(name, weight)
        expected = frozen + weights[0] * parts[0] + weights[1] * parts[1]
        assert relative_error(layer(x), expected) < 1e-5

    def test_merged_as_scaled(self) -> None:
        model = held_by_peft("block")
        for layer in model.modules():
            if hasattr(layer, "set_scale"):
                layer.set_scale("default", 0.25)
        expected = logits(model)
        assert relative_error(logits(model.merge_and_unload()), expected) < 1e-5


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("disable_lora", ()), ("unload_lora", ()), ("set_adapters", ("default", 0.5)), ("fuse_lora", (0.5,))],
)
def test_switches_of_diffusers_refuse_a_native_adapter(name: str, arguments: tuple[Any, ...]) -> None:
    """They would return and leave it in force."""
    model = randomize(apply_reslora(unet(), ResLoRAConfig(r=3, target_modules=["to_q", "to_v"])))
    expected = denoised(model)
    with pytest.raises(ValueError, match=f"{name} is for adapters that PEFT holds.*disable_adapter"):
        getattr(model, name)(*arguments)
    with pytest.raises(ValueError, match=r"cross_attention_kwargs: scale=0\.5 is for adapters that PEFT holds"):
        denoised(model, cross_attention_kwargs={"scale": 0.5})
    assert torch.equal(denoised(model, cross_attention_kwargs={"scale": 1.0}), expected)


def test_switches_of_diffusers_are_its_own_for_lora_beside() -> None:
    model = randomize(apply_reslora(unet(), ResLoRAConfig(r=3, target_modules=["to_q", "to_v"])))
    expected: Tensor = denoised(model)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False))
    assert not torch.equal(denoised(model), expected)
    model.disable_lora()
    assert torch.equal(denoised(model), expected)

"""Adapted convolutions: against the linear layer on patches, against PEFT, and in real models."""

from __future__ import annotations

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
    checkpoint_context,
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
from reslora_kernels.reference import chain_forward
from reslora_kernels.testing import relative_error

from .models import FAMILIES, randomize, unet, vit

SHORTCUTS = ("none", "input", "block", "middle")
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {  # of three equal layers, 6 channels each
    "1d": (nn.Conv1d, {"kernel_size": 3, "padding": 1}),
    "2d": (nn.Conv2d, {"kernel_size": (3, 1), "padding": "same"}),
    "3d": (nn.Conv3d, {"kernel_size": 3, "padding": 1, "bias": False}),
    "dilation": (nn.Conv2d, {"kernel_size": 3, "padding": 2, "dilation": 2, "padding_mode": "reflect"}),
    "by 1": (nn.Conv2d, {"kernel_size": 1}),
    "groups": (nn.Conv2d, {"kernel_size": 3, "padding": 1, "groups": 2}),
}


class Stack(nn.Module):
    """Three like convolutions in blocks."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        cls, arguments = KINDS[kind]
        self.dims = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[cls]
        self.blocks = nn.ModuleList(nn.ModuleDict({"conv": cls(6, 6, **arguments)}) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block["conv"](x).tanh()
        return x

    def inputs(self, batch: int = 2) -> Tensor:
        return torch.randn(batch, 6, *(8, 7, 5)[: self.dims], generator=torch.Generator().manual_seed(3))


def adapted(kind: str, shortcut: Any, **changes: Any) -> Any:
    config = ResLoRAConfig(**{"r": 4, "shortcut": shortcut, "pre_num": -1, "target_modules": ["conv"]} | changes)
    return randomize(apply_reslora(Stack(kind), config).double())


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(x)
    return found


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("kind", KINDS)
class TestAgainstTheEquations:
    def test_is_the_linear_layer_on_patches(self, kind: str, shortcut: Any) -> None:
        """The layers' inputs, as patches, through the reference's chain of linear layers: values and gradients."""
        model = adapted(kind, shortcut)
        layers = list(adapted_layers(model).values())
        calls: list[tuple[Tensor, Tensor]] = []
        for layer in layers:
            layer.register_forward_hook(lambda _, args, y: calls.append((args[0], y)))
        loss = model(model.inputs().double()).square().sum()
        found = torch.autograd.grad(loss, [p for layer in layers for p in (layer.lora_A, layer.lora_B)])
        patches = [layer.patches(x.detach()) for layer, (x, _) in zip(layers, calls, strict=True)]
        expected = chain_forward(
            shortcut, -1, layers[0].scaling,
            [x.flatten(0, -2) for x in patches],
            [layer.dense_weight(torch.float64) for layer in layers],
            [layer.bias for layer in layers],
            [layer.lora_A for layer in layers],
            [layer.b_parts[0] for layer in layers],
        )  # fmt: skip
        for (_, y), truth in zip(calls, expected, strict=True):
            assert relative_error(y.movedim(1, -1).flatten(0, -2), truth) < 1e-12
        assert all(gradient.abs().sum() > 0 for gradient in found)

    def test_gradients(self, kind: str, shortcut: Any) -> None:
        model = adapted(kind, shortcut)
        x = model.inputs(1)[..., :4].double().requires_grad_()
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

        def function(x: Tensor, *values: Tensor) -> Tensor:
            return torch.func.functional_call(model, dict(zip(parameters, values, strict=True)), (x,)).square().sum()

        assert torch.autograd.gradcheck(function, (x, *parameters.values()), fast_mode=True)

    def test_merges_and_travels(self, kind: str, shortcut: Any, tmp_path: Path) -> None:
        model = adapted(kind, shortcut)
        x = model.inputs().double()
        before, plain = run(model, x), run(Stack(kind).double(), x)
        save_adapter(model, tmp_path)
        assert torch.equal(run(load_adapter(Stack(kind).double(), tmp_path), x), before)
        data = {"calibration": [x]} if shortcut in ("input", "middle") else {}
        if kind == "groups":
            with pytest.raises(ValueError, match="has groups=2 and an A that sees all channels"):
                merge_reslora(model, **data)
        else:
            report = merge_reslora(model, **data)
            error = relative_error(run(model, x), before)
            assert error < (relative_error(plain, before) if data else 1e-9)
            assert not data or 0 < (report.worst() or 0) < 1
            unmerge_reslora(model)
        assert torch.equal(run(model, x), before)
        add_adapter(model, "second", ResLoRAConfig(r=2, target_modules=["blocks.0.conv"]))
        assert torch.equal(run(set_adapter(model, "second"), x), plain)
        unload(model)
        assert torch.equal(run(model, x), plain)
        assert type(model.blocks[0]["conv"]) is KINDS[kind][0]
        assert vars(model.blocks[0]["conv"]).keys() == vars(Stack(kind).blocks[0]["conv"]).keys()


def resnet() -> Any:
    from transformers import ResNetConfig, ResNetModel

    torch.manual_seed(0)
    return ResNetModel(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic", num_channels=3)
    ).eval()


def convnext() -> Any:
    from transformers import ConvNextConfig, ConvNextModel

    torch.manual_seed(0)
    config = ConvNextConfig(num_channels=3, hidden_sizes=[4, 8], depths=[2, 2], num_stages=2, drop_path_rate=0.0)
    return ConvNextModel(config).eval()


def wav2vec2() -> Any:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(8, 8, 8),
        conv_stride=(2, 2, 2), conv_kernel=(4, 3, 3), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        do_stable_layer_norm=True, feat_extract_norm="layer", num_feat_extract_layers=3,
    )  # fmt: skip
    return Wav2Vec2Model(config).eval()


PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
MODELS: dict[str, tuple[Any, Any, Any, set[str]]] = {  # how to make it, its batch, what to adapt, chains to expect
    "resnet": (
        resnet, {"pixel_values": PIXELS}, r".*\.convolution",
        {"embedder.embedder.convolution", "encoder.stages.*.layers.*.layer.1.convolution 72->8",
         "encoder.stages.*.layers.*.layer.1.convolution 144->16"},
    ),
    "convnext": (
        convnext, {"pixel_values": PIXELS}, ["patch_embeddings", "dwconv", "downsampling_layer.1"],
        {"encoder.stages.*.layers.*.dwconv 196->4", "encoder.stages.*.layers.*.dwconv 392->8",
         "embeddings.patch_embeddings"},
    ),
    "vit": (vit, FAMILIES["vit"].batch(1), ["projection", "query"], {"vit.embeddings.patch_embeddings.projection"}),
    "unet": (unet, FAMILIES["unet"].batch(1), ["conv_in", "conv1", "conv_shortcut", "to_q"], {"conv_in"}),
    "wav2vec2": (
        wav2vec2, {"input_values": torch.randn(2, 300, generator=torch.Generator().manual_seed(4))},
        r"feature_extractor.*\.conv|.*q_proj", {"feature_extractor.conv_layers.*.conv 24->8"},
    ),
}  # fmt: skip


def outputs(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    found: Any = model(**{name: value for name, value in batch.items() if name not in ("labels", "target", "noise")})
    return found[0]


def trained_by_peft(model: nn.Module, **config: Any) -> PeftModel:
    peft_model = get_peft_model(model, LoraConfig(**({"r": 8, "lora_alpha": 6} | config)))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return peft_model.eval()


def gradients(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    output = outputs(model, batch)
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return {name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight"): p.grad
            for name, p in model.named_parameters() if p.grad is not None}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
class TestRealModels:
    def test_equals_peft_and_travels_both_ways(self, name: str, tmp_path: Path) -> None:
        make, batch, targets, _ = MODELS[name]
        theirs = trained_by_peft(make(), target_modules=targets)
        theirs.save_pretrained(tmp_path / "theirs")
        ours = load_peft_adapter(make(), tmp_path / "theirs")
        assert relative_error(outputs(ours, batch), outputs(theirs, batch)) < 1e-5
        expected, found = gradients(theirs, batch), gradients(ours, batch)
        assert {key for key in found if "lora_" in key} == expected.keys()  # a head trains too, without being asked
        for key, value in expected.items():
            assert relative_error(found[key].view_as(value), value) < 1e-3, key
        export_peft(ours, tmp_path / "back")
        again = PeftModel.from_pretrained(make(), tmp_path / "back").eval()
        assert relative_error(outputs(again, batch), outputs(theirs, batch)) < 1e-5

    @pytest.mark.parametrize("shortcut", ["block", "middle", "input"])
    def test_shortcuts_run_along_the_blocks(self, name: str, shortcut: Any, tmp_path: Path) -> None:
        make, batch, targets, chains = MODELS[name]
        config = ResLoRAConfig(r=8, shortcut=shortcut, pre_num=-1, target_modules=targets)
        model = randomize(apply_reslora(make(), config)).eval()
        coverage = inspect(model)
        assert chains <= {row.chain for row in coverage.layers}
        reasons = {row.reason for row in coverage.layers if "conv" in row.name}
        assert reasons <= {"library calls: there is no fused kernel for this kind of layer"}
        before = run_model(model, batch)
        save_adapter(model, tmp_path)
        assert torch.equal(run_model(load_adapter(make(), tmp_path), batch), before)
        if shortcut == "block":
            export_peft(model, tmp_path / "exported")
            served = PeftModel.from_pretrained(make(), tmp_path / "exported").eval()
            assert relative_error(run_model(served, batch), before) < 1e-5

    def test_as_a_method_of_peft(self, name: str) -> None:
        make, batch, targets, _ = MODELS[name]
        native = randomize(apply_reslora(make(), ResLoRAConfig(r=8, target_modules=targets))).eval()
        model = get_peft_model(make(), ResLoRAPeftConfig(r=8, target_modules=targets)).eval()
        for layer, adapted_layer in adapted_layers(native).items():
            inner = model.base_model.model.get_submodule(layer).reslora_adapter["default"]
            inner.load_state_dict(adapted_layer.adapter_parameters())
        assert relative_error(run_model(model, batch), run_model(native, batch)) < 1e-6


def run_model(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return outputs(model, batch)


class TestRefusals:
    @pytest.mark.parametrize(
        ("module", "changes", "message"),
        [
            (nn.Conv2d(6, 6, 3), {"use_dora": True}, "use_dora is for linear layers"),
            (nn.Conv2d(6, 6, 3, groups=3), {}, r"groups=3 must divide the rank, which is 4: .*rank_pattern"),
            (nn.Conv2d(6, 6, 3), {"backend": "triton"}, "has no kernel for it|cannot run here"),
            (nn.utils.parametrizations.weight_norm(nn.Conv1d(6, 6, 3)), {}, "Remove weight_norm"),
            (nn.LazyConv1d(6, 3), {}, "not known before its first forward"),
            (nn.ConvTranspose1d(6, 6, 3), {}, "only linear layers, convolutions"),
            (type("Standardised", (nn.Conv2d,), {"forward": lambda self, x: x})(6, 6, 3), {}, "whose forward is not"),
        ],
        ids=["DoRA", "groups", "a kernel", "weight_norm", "lazy", "transposed", "another forward"],
    )
    def test_by_name_before_anything_changes(self, module: Any, changes: dict[str, Any], message: str) -> None:
        model = nn.Sequential(module, nn.Linear(3, 3))
        before = {name: (p.requires_grad, p) for name, p in model.named_parameters()}
        with pytest.raises((ValueError, RuntimeError), match=message):
            apply_reslora(model, ResLoRAConfig(**{"r": 4, "target_modules": ["0", "1"]} | changes))
        assert model[0] is module
        assert {name: (p.requires_grad, p) for name, p in model.named_parameters()}.keys() == before.keys()
        assert all(p.requires_grad for p in model.parameters())

    def test_export_of_what_peft_would_compute_otherwise(self, tmp_path: Path) -> None:
        model = adapted("dilation", "block")
        with pytest.raises(ValueError, match=r"blocks\.0\.conv.*padding_mode='reflect' and dilation=\(2, 2\)"):
            export_peft(model, tmp_path / "never")
        assert not (tmp_path / "never").exists()


@pytest.mark.slow
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_checkpointed_and_compiled(shortcut: Any) -> None:
    from torch.utils.checkpoint import checkpoint

    model = adapted("2d", shortcut)
    x = model.inputs().double()

    def recomputed(x: Tensor) -> Tensor:
        for block in model.blocks:
            x = checkpoint(block["conv"], x, use_reentrant=False, context_fn=checkpoint_context(model)).tanh()
        return x

    def gradient(run: Any) -> list[Tensor]:
        parameters = [p for p in model.parameters() if p.requires_grad]
        return list(torch.autograd.grad(run(x).square().sum(), parameters))

    expected, output = gradient(model), run(model, x)
    model.forward = recomputed
    for found, truth in zip(gradient(model), expected, strict=True):
        assert torch.equal(found, truth)
    del model.forward
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert relative_error(run(compiled, x), output) < 1e-12
    for found, truth in zip(gradient(compiled), expected, strict=True):
        assert relative_error(found, truth) < 1e-10


def test_dropout_is_that_of_the_patches_input() -> None:
    """A mask per element of x: kept ones are scaled, and the mean over many masks is what there is without."""
    model = adapted("by 1", "none", lora_dropout=0.5).train()
    layer, x = next(iter(adapted_layers(model).values())), torch.ones(400, 6, 4, 4, dtype=torch.float64)
    dropped = layer(x) - layer.frozen_forward(x)
    whole = layer.eval()(x) - layer.frozen_forward(x)
    assert relative_error(dropped.mean((0, 2, 3)), whole.mean((0, 2, 3))) < 0.1
    assert relative_error(dropped, whole) > 0.3


def test_a_rank_of_its_own_serves_groups_that_the_others_do_not_divide() -> None:
    config = ResLoRAConfig(r=4, shortcut="none", target_modules=["0"], rank_pattern={"0": 3})
    model = apply_reslora(nn.Sequential(nn.Conv2d(6, 6, 3, groups=3)), config)
    assert [row.r for row in inspect(model).layers] == [3]

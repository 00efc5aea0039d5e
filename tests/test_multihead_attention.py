"""Adapted nn.MultiheadAttention: against the sum of its weights, and against PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
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


def gradients(model: nn.Module) -> dict[str, Tensor]:
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
    expected, found = gradients(theirs), gradients(ours)
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
    found = gradients(model)
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

"""Which layers are taken for adapters: by what they compute and who runs them, not by their class or name alone."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from reslora_kernels import ResLoRAConfig, ResLoRALinear, apply_reslora, inspect, merge_reslora
from reslora_kernels.adapt.switching import add_adapter, set_adapter

from .models import randomize

X = torch.randn(2, 3, 8)


class Written(nn.Linear):
    """As FalconLinear: the linear map in other words."""

    def forward(self, input: Tensor) -> Tensor:
        y = input @ self.weight.T
        return y if self.bias is None else y + self.bias


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class DroppedOut(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(input), 0.5, self.training)


class Scaled(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("scale", torch.ones(1))


class Switched(nn.Linear):
    def forward(self, input: Tensor, task: int = 0) -> Tensor:
        return super().forward(input) * task


class Lifted(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).double()


OTHER_MAPS = {
    "doubled": lambda: Doubled(8, 8),
    "dropout": lambda: DroppedOut(8, 8),
    "buffer": lambda: Scaled(8, 8),
    "argument": lambda: Switched(8, 8),
    "dtype": lambda: Lifted(8, 8),
    "lazy": lambda: nn.LazyLinear(8),
    "weight_norm": lambda: weight_norm(nn.Linear(8, 8)),
    "spectral_norm": lambda: spectral_norm(nn.Linear(8, 8)),
    "parametrized": lambda: parametrizations.weight_norm(nn.Linear(8, 8)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(8, 8)),
    "pruned": lambda: prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5),
}


@pytest.mark.parametrize("kind", OTHER_MAPS)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_other_maps_are_refused_by_name_and_left_out_by_all_linear(kind: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), OTHER_MAPS[kind]())
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=f"matches '1', a {type(model[1]).__name__}"):
        apply_reslora(model, ResLoRAConfig(target_modules=["0", "1"]))
    assert before == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    apply_reslora(model, ResLoRAConfig(), example_inputs=(X,))
    assert isinstance(model[0], ResLoRALinear) and not isinstance(model[1], ResLoRALinear)
    assert [name for name, _ in inspect(model).unmatched] == ["1"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_linear_map_of_another_class_is_adapted_and_comes_back(dtype: torch.dtype, device: str) -> None:
    model = nn.Sequential(Written(8, 8), Written(8, 8, bias=False)).to(device, dtype)
    model[0].note = "kept"
    config = ResLoRAConfig(r=2, shortcut="none", target_modules=["0", "1"])
    apply_reslora(model, config, example_inputs=(X.to(device, dtype),))
    add_adapter(model, "second", ResLoRAConfig(r=2, target_modules=["1"]), example_inputs=(X.to(device, dtype),))
    assert isinstance(model[0], ResLoRALinear) and isinstance(model[1], ResLoRALinear)
    set_adapter(model, "second")
    assert type(model[0]) is Written and model[0].note == "kept" and isinstance(model[1], ResLoRALinear)
    assert device == "meta" or torch.equal(model[0](X.to(dtype)), X.to(dtype) @ model[0].weight.T + model[0].bias)


def test_merge_of_another_class_is_exact_and_copies_keep_it() -> None:
    model = nn.Sequential(Written(8, 8), nn.ReLU(inplace=True), Written(8, 8)).double()
    apply_reslora(model, ResLoRAConfig(r=2, shortcut="block"), example_inputs=(X.double(),))
    randomize(model)
    before = model(X.double())
    twin = copy.deepcopy(model)
    merge_reslora(twin)
    assert torch.allclose(twin(X.double()), before, rtol=0, atol=1e-12)
    assert type(twin[0].leave()) is Written


def test_names_that_only_look_like_lora_parameters() -> None:
    model = nn.ModuleDict({"flora_head": nn.Linear(8, 8), "lora_head": nn.Linear(8, 8)})
    apply_reslora(model, ResLoRAConfig())
    other = nn.Sequential(nn.Linear(8, 8))
    other[0].lora_A = nn.Parameter(torch.zeros(2, 8))
    with pytest.raises(ValueError, match="already holds LoRA parameters"):
        apply_reslora(other, ResLoRAConfig())


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(8, 8), "norm": nn.LayerNorm(8)}) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block["norm"](block["fc"](x))
        return x


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["fc", "fc_in"]}, r"target_modules: 'fc_in' matches no module"),
        ({"target_modules": ["fc"], "layers_to_transform": [1, 3]}, r"layers_to_transform: 3 is no layer"),
        ({"layers_to_transform": [0, 7]}, r"layers_to_transform: 7 is no layer"),
    ],
    ids=str,
)
def test_what_matches_nothing_beside_what_does_is_said(changes: dict[str, Any], message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        apply_reslora(Blocks(), ResLoRAConfig(**changes))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_reslora(Blocks(), ResLoRAConfig(target_modules=["fc"], layers_to_transform=[0, 2]))


class Reader(nn.Module):
    """Runs one layer, reads the weight of another, and asks a third for its dtype only."""

    def __init__(self) -> None:
        super().__init__()
        self.run, self.read, self.asked = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.asked(self._late(self.run(x)).to(self.asked.weight.dtype))

    def _late(self, x: Tensor) -> Tensor:
        return x @ self.read.weight


def test_layer_whose_weight_is_only_read() -> None:
    model = apply_reslora(nn.Sequential(Reader()), ResLoRAConfig(), example_inputs=(X,))
    assert inspect(model).unmatched == (("0.read", "Reader reads its weight and never runs it"),)
    with pytest.warns(
        UserWarning, match="'0.read', but an adapter there has no effect: Reader reads its weight"
    ) as caught:
        apply_reslora(nn.Sequential(Reader()), ResLoRAConfig(target_modules=["read"]), example_inputs=(X,))
    assert caught[0].filename == __file__


def test_attention_of_torch_reads_its_output_projection_and_encoder_layers_run_theirs() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = apply_reslora(nn.Sequential(layer), ResLoRAConfig(), example_inputs=(X,))
    reasons = inspect(model).unmatched
    assert reasons == (("0.self_attn.out_proj", "MultiheadAttention reads its weight and never runs it"),)
    assert [row.name for row in inspect(model).layers] == ["0.linear1", "0.linear2"]


@pytest.mark.parametrize("family", ["Mamba", "Mamba2", "FalconMamba", "NemotronH", "FalconH1", "Jamba"])
def test_output_projection_of_state_space_mixers(family: str) -> None:
    """PEFT refuses it where fused kernels read its weight; Jamba runs it always."""
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": 19, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "num_heads": 4, "head_dim": 8,
        "n_groups": 2, "mamba_num_heads": 4, "mamba_head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4,
        "mamba_d_head": 8, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32,
    }  # fmt: skip
    if family == "Jamba":
        sizes |= {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "expert_layer_period": 2}
    if family == "NemotronH":
        sizes |= {"layers_block_type": ["mamba", "attention"], "ssm_state_size": 4}
        sizes.pop("num_hidden_layers")
    config = getattr(transformers, family + "Config")(**sizes)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    mixers = [f"{name}.out_proj" for name, module in model.named_modules() if hasattr(module, "A_log")]
    name = mixers[0]
    everywhere = inspect(apply_reslora(copy.deepcopy(model), ResLoRAConfig()))
    assert not any(row.name.endswith("dt_proj") for row in everywhere.layers), "its weight is read past it"
    if family == "Jamba":
        assert isinstance(apply_reslora(model, ResLoRAConfig(target_modules=[name])).get_submodule(name), ResLoRALinear)
        return
    with pytest.raises(ValueError, match=r"out_proj', of which the fused training path of .* reads the weight"):
        apply_reslora(model, ResLoRAConfig(target_modules=["out_proj"]))
    apply_reslora(model, ResLoRAConfig())
    reasons = dict(inspect(model).unmatched)
    assert all("fused training path" in reasons[name] for name in mixers)


@pytest.mark.parametrize("shortcut", ["none", "block"])
def test_inspect_accounts_for_every_parameter(shortcut: str) -> None:
    """Fused experts, routers, embeddings and norms beside the linear layers: nothing is left unsaid."""
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, vocab_size=99, num_key_value_heads=2))
    apply_reslora(model, ResLoRAConfig(r=2, shortcut=shortcut))
    coverage = inspect(model)
    linear = [*(row.name for row in coverage.layers), *(name for name, _ in coverage.unmatched)]
    held = sum(parameter.numel() for name in linear for parameter in model.get_submodule(name).parameters())
    assert held + sum(row.parameters for row in coverage.others) == coverage.total_parameters
    found = {row.name: (row.modules, row.parameters) for row in coverage.others}
    assert found["model.layers.*.mlp.experts"] == (3, 3 * 8 * 3 * 32 * 48)
    assert found["model.layers.*.mlp.gate"] == (3, 3 * 8 * 32)
    assert found["model.embed_tokens"] == (1, 99 * 32) and found["(norms)"] == (7, 7 * 32)
    assert "model.layers.*.mlp.experts" in str(coverage) and coverage.to_dict()["others"][0]["parameters"] == 99 * 32

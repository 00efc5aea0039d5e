"""What a config asks for: every wrong value is named, every right one survives JSON; which layers are taken.

By what they compute and who runs them, not by their class or name alone.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from reslora_kernels import ResLoRAConfig, ResLoRALinear, apply_reslora, inspect, merge_reslora
from reslora_kernels.adapt.switching import add_adapter, set_adapter
from reslora_kernels.adapt.targets import find_targets
from reslora_kernels.config import PARAMETER_ADAPTER

from .models import needs_transformers_5, randomize

FIELDS = [field.name for field in dataclasses.fields(ResLoRAConfig)]


class TestConfig:
    @pytest.mark.parametrize(
        ("field", "value", "error", "allowed"),
        [
            ("r", 0, ValueError, "from 1 to 256"),
            ("r", 257, ValueError, "from 1 to 256"),
            ("r", 8.0, TypeError, "int"),
            ("r", True, TypeError, "int"),
            ("r", None, TypeError, "int"),
            ("lora_alpha", 0, ValueError, "above 0"),
            ("lora_alpha", math.nan, ValueError, "finite"),
            ("lora_alpha", 10**400, ValueError, "finite"),
            ("lora_alpha", "16", TypeError, "number"),
            ("lora_dropout", 1.0, ValueError, "0 <= lora_dropout < 1"),
            ("lora_dropout", -0.1, ValueError, "0 <= lora_dropout < 1"),
            ("target_modules", [], ValueError, "at least one"),
            ("target_modules", "", ValueError, "empty"),
            ("target_modules", [3], ValueError, "str"),
            ("target_modules", {3}, ValueError, "str"),
            ("target_modules", 3, TypeError, "list of names"),
            ("target_modules", b"q_proj", TypeError, "list of names"),
            ("target_modules", "(q", ValueError, "regular expression"),
            ("target_modules", "a{99999999999999999999}", ValueError, "regular expression"),
            ("exclude_modules", "[", ValueError, "regular expression"),
            ("exclude_modules", [""], ValueError, "non-empty"),
            ("layers_to_transform", -1, ValueError, "0 or more"),
            ("layers_to_transform", [], ValueError, "at least one"),
            ("layers_to_transform", [1.5], TypeError, "int"),
            ("layers_to_transform", "1", TypeError, "int"),
            ("use_rslora", 1, TypeError, "True or False"),
            ("bias", "some", ValueError, "'lora_only'"),
            ("bias", True, TypeError, "'lora_only'"),
            ("shortcut", "bs", ValueError, "'none', 'input', 'block', 'middle'"),
            ("pre_num", -2, ValueError, "at least -1"),
            ("pre_num", 1.0, TypeError, "int"),
            ("merge", "average", ValueError, "'least_squares'"),
            ("norm_window", 0, ValueError, "at least 1"),
            ("backend", "opencl", ValueError, "'auto', 'torch', 'triton', 'cuda'"),
        ],
        ids=lambda value: str(value)[:24] if not isinstance(value, type) else value.__name__,
    )
    def test_field(self, field: str, value: Any, error: type[Exception], allowed: str) -> None:
        for make in (
            lambda: ResLoRAConfig(**{field: value}),
            lambda: ResLoRAConfig().replace(**{field: value}),
            lambda: ResLoRAConfig.from_dict({field: value}),
        ):
            with pytest.raises(error, match=allowed) as caught:
                make()
            assert field in str(caught.value)

    @given(
        field=st.sampled_from(FIELDS),
        value=st.one_of(
            st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=4),
            st.lists(st.one_of(st.integers(), st.text(max_size=3), st.none()), max_size=3),
            st.sets(st.one_of(st.integers(), st.text(max_size=3)), max_size=3),
            st.dictionaries(st.text(max_size=3), st.integers(), max_size=2), st.builds(object),
        ),
    )  # fmt: skip
    @settings(max_examples=300, deadline=None)
    def test_any_value_is_accepted_or_named(self, field: str, value: Any) -> None:
        try:
            config = ResLoRAConfig(**{field: value})
        except (TypeError, ValueError) as error:
            assert type(error) in (TypeError, ValueError)
            assert str(error).startswith(field)
        else:
            assert ResLoRAConfig.from_json(config.to_json()) == config

    names = st.lists(st.text("abc_.0", min_size=1, max_size=6), min_size=1, max_size=3)

    @given(
        values=st.fixed_dictionaries(
            {},
            optional={
                "r": st.integers(1, 256),
                "lora_alpha": st.one_of(st.integers(1, 10**9), st.floats(1e-6, 1e9)),
                "lora_dropout": st.floats(0, 1, exclude_max=True),
                "target_modules": st.one_of(
                    names, names.map(tuple), st.sampled_from(["all-linear", r".*\.(q|v)_proj"])
                ),
                "exclude_modules": st.one_of(st.none(), names, st.just("lm_head")),
                "layers_to_transform": st.one_of(
                    st.none(), st.integers(0, 99), st.lists(st.integers(0, 99), min_size=1, max_size=4)
                ),
                "use_rslora": st.booleans(),
                "bias": st.sampled_from(["none", "all", "lora_only"]),
                "shortcut": st.sampled_from(["none", "input", "block", "middle"]),
                "pre_num": st.integers(-1, 50),
                "merge": st.sampled_from(["input", "weights", "least_squares"]),
                "norm_window": st.integers(1, 10**6),
                "backend": st.sampled_from(["auto", "torch", "triton", "cuda"]),
            },
        )
    )
    @settings(max_examples=150, deadline=None)
    def test_json_round_trip(self, values: dict[str, Any]) -> None:
        config = ResLoRAConfig(**values)
        again = ResLoRAConfig.from_json(config.to_json())
        assert again == config
        assert hash(again) == hash(config)
        assert ResLoRAConfig.from_dict(config.to_dict()) == config
        assert again.scaling == config.scaling > 0
        assert config.replace() == config

    @given(key=st.text())
    def test_unknown_field(self, key: str) -> None:
        assume(key not in FIELDS)
        with pytest.raises(ValueError, match="unknown ResLoRAConfig field"):
            ResLoRAConfig.from_dict({key: 1})

    @given(text=st.text(max_size=20))
    def test_text_that_is_no_config(self, text: str) -> None:
        assume(text.strip() != "{}")
        with pytest.raises(ValueError, match=r"."):
            ResLoRAConfig.from_json(text)

    def test_types_of_from_dict_and_from_json(self) -> None:
        with pytest.raises(TypeError, match=r"values .*list"):
            ResLoRAConfig.from_dict([1])  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"text .*bytes"):
            ResLoRAConfig.from_json(b"{}")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="rank"):
            ResLoRAConfig().replace(rank=3)

    def test_frozen(self) -> None:
        config = ResLoRAConfig()
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.r = 3  # type: ignore[misc]
        with pytest.raises(TypeError):
            ResLoRAConfig(4)  # type: ignore[misc]


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
        ({"exclude_modules": ["fc_out", "norm"]}, r"exclude_modules: 'fc_out' matches no module"),
        ({"exclude_modules": r"head\..*"}, r"exclude_modules: 'head.*' matches no module"),
        ({"layers_to_transform": [0, 7]}, r"layers_to_transform: 7 is no layer"),
    ],
    ids=str,
)
def test_what_matches_nothing_beside_what_does_is_said(changes: dict[str, Any], message: str) -> None:
    with pytest.warns(UserWarning, match=message) as caught:
        apply_reslora(Blocks(), ResLoRAConfig(**changes))
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for wanted in (["fc"], r"blocks\.\d\.fc"):
            apply_reslora(Blocks(), ResLoRAConfig(target_modules=wanted, layers_to_transform=[0, 2]))


def test_blocks_without_a_layer_to_adapt_are_named() -> None:
    """One that holds a norm alone, and one whose only layer is the output head."""
    model: Any = Blocks()
    del model.blocks[1]["fc"]
    model.get_output_embeddings = lambda: model.blocks[2]["fc"]
    with pytest.warns(UserWarning, match=r"layers_to_transform: 1, 2 is no layer"):
        find_targets(model, ResLoRAConfig(layers_to_transform=[0, 1, 2]))


class Reader(nn.Module):
    """Runs one layer, reads the weight of another, and asks a third for its dtype only."""

    def __init__(self) -> None:
        super().__init__()
        self.run, self.read, self.asked = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.asked(self._late(self.run(x)).to(self.asked.weight.dtype))

    def _late(self, x: Tensor) -> Tensor:
        return x @ self.read.weight


class Runner(Reader):
    """Runs all three, unless another library has put a forward of its own on the instance."""

    def forward(self, x: Tensor) -> Tensor:
        return self.asked(self.read(self.run(x)))


def patched() -> nn.Module:
    module: Any = Runner()
    module.forward = MethodType(Reader.forward, module)
    return module  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [Reader, patched])
def test_layer_whose_weight_is_only_read(make: Callable[[], nn.Module]) -> None:
    model = apply_reslora(nn.Sequential(make()), ResLoRAConfig(), example_inputs=(X,))
    kind = type(model[0]).__name__
    assert inspect(model).unmatched == (("0.read", f"{kind} reads its weight and never runs it"),)
    with pytest.warns(
        UserWarning, match=f"'0.read', but an adapter there has no effect: {kind} reads its weight"
    ) as caught:
        apply_reslora(nn.Sequential(make()), ResLoRAConfig(target_modules=["read"]), example_inputs=(X,))
    assert caught[0].filename == __file__


def test_attention_of_torch_reads_its_output_projection_and_encoder_layers_run_theirs() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = apply_reslora(nn.Sequential(layer), ResLoRAConfig(), example_inputs=(X,))
    reasons = inspect(model).unmatched
    assert reasons == (("0.self_attn.out_proj", "MultiheadAttention reads its weight and never runs it"),)
    assert [row.name for row in inspect(model).layers] == ["0.linear1", "0.linear2"]


@needs_transformers_5
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


@needs_transformers_5
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


def test_layers_after_one_that_is_adapted_in_parts_are_taken_too() -> None:
    model: Any = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "after": nn.Linear(8, 8)})
    found = inspect(apply_reslora(model, ResLoRAConfig(r=2, target_modules=["attention", "after"]))).layers
    assert [row.name for row in found][-1] == "after" and len(found) > 1


def test_a_parameter_of_the_model_itself_has_its_own_name() -> None:
    model: Any = nn.Module()
    model.table = nn.Parameter(torch.randn(3, 6, 4))
    model.proj = nn.Linear(4, 4)
    config = ResLoRAConfig(r=2, target_modules=["proj"], target_parameters=["table"])
    assert sorted(find_targets(model, config).matched) == ["proj", "table" + PARAMETER_ADAPTER]


@pytest.mark.parametrize(
    ("shape", "device", "backend", "offloaded", "message"),
    [
        ((3, 6, 4), "meta", "auto", False, "which has no values here"),
        ((3, 6, 4), "cpu", "auto", True, "which has no values here"),
        ((3, 6, 4), "cpu", "cuda", False, "experts, which backend='cuda' has no kernel for"),
        ((6, 4), "cpu", "cuda", False, ""),
    ],
)
def test_parameters_without_values_or_kernels_are_refused(
    shape: tuple[int, ...], device: str, backend: str, offloaded: bool, message: str
) -> None:
    model: Any = nn.ModuleDict({"holder": nn.Module(), "proj": nn.Linear(4, 4)})
    model.holder.table = nn.Parameter(torch.empty(shape, device=device))
    model.holder._hf_hook = SimpleNamespace(offload=offloaded)
    config = ResLoRAConfig(r=2, target_modules=["proj"], target_parameters=["table"], backend=backend)
    if not message:
        assert "holder.table" + PARAMETER_ADAPTER in find_targets(model, config).matched
        return
    with pytest.raises(ValueError, match="matches 'holder.table', " + message):
        find_targets(model, config)

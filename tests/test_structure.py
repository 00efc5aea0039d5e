"""Chains from names: the modules of real architectures as skeletons of linear layers, and chains given by hand."""

from __future__ import annotations

import itertools
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reslora_kernels import (
    ResLoRAConfig,
    ResLoRALinear,
    add_adapter,
    apply_reslora,
    inspect,
    load_adapter,
    save_adapter,
    set_adapter,
)
from reslora_kernels.adapt.linking import places, structural_chains
from reslora_kernels.adapt.record import adapted_layers
from reslora_kernels.config import PARAMETER_ADAPTER
from reslora_kernels.files.adapter_format import read

from .models import randomize
from .test_damaged_adapters import rewrite


def expanded(pattern: str) -> list[str]:
    """layers.{0..2}.{q,k} as six names, the first choice slowest."""
    parts = re.split(r"\{(.*?)\}", pattern)
    choices = [[part] for part in parts]
    for i in range(1, len(parts), 2):
        first, dots, last = parts[i].partition("..")
        choices[i] = [str(n) for n in range(int(first), int(last) + 1)] if dots else parts[i].split(",")
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def skeleton(*patterns: str, sequential: str = "") -> nn.Module:
    """A tree with a Linear(8, 8) for each name, a LayerNorm for names that end in "norm"; "name:NxK" is a Linear(K, N).

    Numbered children are in an nn.ModuleList, or in an nn.Sequential if the container's name matches ``sequential``;
    children of a container whose name ends in "_dict" are in an nn.ModuleDict.
    """
    tree: dict[str, Any] = {}
    for name in itertools.chain.from_iterable(map(expanded, patterns)):
        *parents, leaf = name.split(".")
        place = tree
        for part in parents:
            place = place.setdefault(part, {})
        leaf, _, shape = leaf.partition(":")
        out_features, in_features = map(int, shape.split("x")) if shape else (8, 8)
        place[leaf] = nn.LayerNorm(8) if leaf.endswith("norm") else nn.Linear(in_features, out_features)

    def build(content: Any, name: str) -> nn.Module:
        if isinstance(content, nn.Module):
            return content
        children = {part: build(child, f"{name}.{part}" if name else part) for part, child in content.items()}
        if all(part.isdecimal() for part in children):
            kind = nn.Sequential if sequential and re.fullmatch(sequential, name) else nn.ModuleList
            return kind(list(children.values())) if kind is nn.ModuleList else kind(*children.values())
        if name.endswith("_dict"):
            return nn.ModuleDict(children)
        module = nn.Module()
        for part, child in children.items():
            module.add_module(part, child)
        return module

    return build(tree, "")


def chains(model: nn.Module, r: int = 2, **changes: Any) -> dict[str, list[str]]:
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    plans = structural_chains(model, linear, ResLoRAConfig(r=r, **changes))
    return {plan.title + (" (experts)" if plan.experts else ""): plan.names for plan in plans}


# names of modules, the roles of their chains with the number of layers in each
TABLE: dict[str, tuple[list[str], dict[str, int]]] = {
    "llama": (
        ["model.layers.{0..3}.self_attn.{q_proj,o_proj}", "model.layers.{0..3}.mlp.down_proj", "lm_head"],
        {
            "model.layers.*.self_attn.q_proj": 4,
            "model.layers.*.self_attn.o_proj": 4,
            "model.layers.*.mlp.down_proj": 4,
            "lm_head": 1,
        },
    ),
    "bert": (
        ["encoder.layer.{0..2}.{attention.output.dense,output.dense}", "pooler.dense"],
        {"encoder.layer.*.attention.output.dense": 3, "encoder.layer.*.output.dense": 3, "pooler.dense": 1},
    ),
    "whisper": (
        ["encoder.layers.{0..1}.self_attn.k_proj", "decoder.layers.{0..2}.{self_attn,encoder_attn}.k_proj"],
        {
            "encoder.layers.*.self_attn.k_proj": 2,
            "decoder.layers.*.self_attn.k_proj": 3,
            "decoder.layers.*.encoder_attn.k_proj": 3,
        },
    ),
    "t5": (
        [
            f"decoder.block.{{0..2}}.layer.{part}"
            for part in ("0.SelfAttention.q", "1.EncDecAttention.q", "2.DenseReluDense.wi")
        ],
        {
            "decoder.block.*.layer.0.SelfAttention.q": 3,
            "decoder.block.*.layer.1.EncDecAttention.q": 3,
            "decoder.block.*.layer.2.DenseReluDense.wi": 3,
        },
    ),
    "rwkv": (
        ["rwkv.blocks.{0..2}.{attention,feed_forward}.receptance"],
        {"rwkv.blocks.*.attention.receptance": 3, "rwkv.blocks.*.feed_forward.receptance": 3},
    ),
    "bloom, mpt": (["transformer.h.{0..11}.mlp.up_proj"], {"transformer.h.*.mlp.up_proj": 12}),
    "mamba": (["backbone.layers.{0..2}.mixer.{in_proj,x_proj}"], {
        "backbone.layers.*.mixer.in_proj": 3, "backbone.layers.*.mixer.x_proj": 3,
    }),
    "jamba, attention in some layers": (
        ["model.layers.{0,1,3}.mamba.in_proj", "model.layers.2.self_attn.q_proj", "model.layers.{0..3}.norm"],
        {"model.layers.*.mamba.in_proj": 3, "model.layers.*.self_attn.q_proj": 1},
    ),
    "siglip": (
        ["{text_model,vision_model}.encoder.layers.{0..2}.self_attn.q_proj"],
        {"text_model.encoder.layers.*.self_attn.q_proj": 3, "vision_model.encoder.layers.*.self_attn.q_proj": 3},
    ),
    "dpr": (
        ["{query,passage}.encoder.layer.{0..2}.attention.self.query"],
        {f"{side}.encoder.layer.*.attention.self.query": 3 for side in ("query", "passage")},
    ),
    "qwen-vl": (
        ["model.visual.blocks.{0..2}.attn.qkv", "model.language_model.layers.{0..1}.self_attn.q_proj"],
        {"model.visual.blocks.*.attn.qkv": 3, "model.language_model.layers.*.self_attn.q_proj": 2},
    ),
    "swin": (
        ["encoder.layers.0.blocks.{0,1}.{attention.q,norm}", "encoder.layers.1.blocks.{0..5}.{attention.q,norm}"],
        {"encoder.layers.*.blocks.*.attention.q": 8},
    ),
    "segformer, list in list": (
        ["encoder.block.{0..1}.{0..2}.{attention.self.query,norm}"],
        {"encoder.block.*.*.attention.self.query": 6},
    ),
    "unet": (
        [
            *(
                f"{block}.transformer_blocks.0.{{attn1,attn2}}.to_q"
                for block in (
                    "down_blocks.{0..1}.attentions.{0..1}", "mid_block.attentions.0", "up_blocks.{0..1}.attentions.0",
                )
            ),
            "{time,add}_embedding.linear_2",
        ],
        {
            "*_block.attentions.*.transformer_blocks.*.attn1.to_q": 7,
            "*_block.attentions.*.transformer_blocks.*.attn2.to_q": 7,
            "time_embedding.linear_2": 1,
            "add_embedding.linear_2": 1,
        },
    ),
    "flux": (
        ["transformer_blocks.{0..1}.attn.to_q", "single_transformer_blocks.{0..2}.attn.to_q"],
        {"transformer_blocks.*.attn.to_q": 2, "single_transformer_blocks.*.attn.to_q": 3},
    ),
    "mixtral, a module for each expert": (
        ["model.layers.{0..2}.moe.experts.{0..3}.w1", "model.layers.{0..2}.moe.gate:4x8"],
        {
            **{f"model.layers.*.moe.experts.{n}.w1 (experts)": 3 for n in range(4)},
            "model.layers.*.moe.gate": 3,
        },
    ),
    "switch, keys of a dict": (
        ["block.{0..1}.mlp.experts_dict.expert_{0..1}.wi"],
        {f"block.*.mlp.experts_dict.expert_{n}.wi (experts)": 2 for n in range(2)},
    ),
    "shared experts see every token": (
        ["layers.{0..2}.mlp.shared_experts.up", "layers.{0..2}.mlp.up"],
        {"layers.*.mlp.shared_experts.up": 3, "layers.*.mlp.up": 3},
    ),
    "experts by their router": (
        ["blocks.{0..2}.nets.{0..3}.up", "blocks.{0..2}.router:4x8"],
        {**{f"blocks.*.nets.{n}.up (experts)": 3 for n in range(4)}, "blocks.*.router": 3},
    ),
    "like modules deep inside a block": (
        ["blocks.{0..2}.ff.parts.{0..3}.up"],
        {f"blocks.*.ff.parts.{n}.up (experts)": 3 for n in range(4)},
    ),
    "attributes with numbers": (["layer{1..3}.fc", "head"], {"layer*.fc": 3, "head": 1}),
    "attributes inside a block are roles": (
        ["layers.{0..2}.{linear1,linear2}"],
        {"layers.*.linear1": 3, "layers.*.linear2": 3},
    ),
    "list of lists of unlike parts": (
        ["layers.{0..2}.0.{to_q,to_k}", "layers.{0..2}.1.{to_q,to_k}", "layers.{0..2}.2.up"],
        {f"layers.*.{part}": 3 for part in ("0.to_q", "0.to_k", "1.to_q", "1.to_k", "2.up")},
    ),
    "models in a list": (
        ["towers.{0..1}.blocks.{0..2}.fc"],
        {"towers.0.blocks.*.fc": 3, "towers.1.blocks.*.fc": 3},
    ),
    "models in a list, by what is inside": (
        ["parts.{0..1}.bert.encoder.layer.{0..2}.{query,norm}"],
        {"parts.0.bert.encoder.layer.*.query": 3, "parts.1.bert.encoder.layer.*.query": 3},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_chains_of_real_names(name: str) -> None:
    patterns, expected = TABLE[name]
    found = chains(skeleton(*patterns))
    assert {title: len(names) for title, names in found.items()} == expected


def test_order_is_that_of_the_numbers_not_of_the_registration() -> None:
    model = skeleton(
        "up_blocks.{0..1}.attentions.{0..1}.q", "mid_block.attentions.0.q", "down_blocks.{0..1}.attentions.0.q"
    )
    (names,) = chains(model).values()
    assert names == [
        *(f"down_blocks.{i}.attentions.0.q" for i in range(2)),
        "mid_block.attentions.0.q",
        *(f"up_blocks.{i}.attentions.{j}.q" for i in range(2) for j in range(2)),
    ]
    (names,) = chains(skeleton("layers.{0..11}.fc")).values()
    assert names == [f"layers.{i}.fc" for i in range(12)]  # 2 before 10


def test_sequential_counts_depth_outside_a_block_and_roles_inside() -> None:
    mlp = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    assert chains(mlp) == {"* 8->8": ["0", "2"], "* 8->3": ["4"]}
    inside = skeleton("layers.{0..2}.mlp.{0..1}", sequential=r"layers\.\d+\.mlp")
    assert chains(inside) == {f"layers.*.mlp.{n}": [f"layers.{i}.mlp.{n}" for i in range(3)] for n in range(2)}
    stages = skeleton("layers.{0..1}.blocks.{0..1}.{attn.qkv,norm}", sequential=r"layers(\.\d+\.blocks)?")  # timm
    assert chains(stages) == {
        "layers.*.blocks.*.attn.qkv": [f"layers.{i}.blocks.{j}.attn.qkv" for i in range(2) for j in range(2)]
    }


def test_sizes_and_ranks_split_a_role() -> None:
    model = skeleton("layers.{0..1}.fc:8x8", "layers.{2..3}.fc:6x8")
    assert chains(model) == {
        "layers.*.fc 8->8": ["layers.0.fc", "layers.1.fc"],
        "layers.*.fc 8->6": ["layers.2.fc", "layers.3.fc"],
    }
    ranked = chains(skeleton("layers.{0..3}.fc"), rank_pattern={"layers.2.fc": 4})
    assert ranked == {
        "layers.*.fc r=2": ["layers.0.fc", "layers.1.fc", "layers.3.fc"],
        "layers.*.fc r=4": ["layers.2.fc"],
    }


def test_names_are_those_of_named_modules_where_modules_are_shared() -> None:
    model = skeleton("layers.{0..1}.fc")
    model.again = model.layers[0]
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = [name for name in places(model) if not name.endswith(PARAMETER_ADAPTER)]
    assert sorted(found) == sorted(linear)


class Crossed(nn.Module):
    """Runs its blocks in the order 0, 2, 1."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8, dtype=torch.float64) for _ in range(3))
        self.extra = nn.Linear(8, 8, dtype=torch.float64)
        self.small = nn.Linear(8, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        for n in (0, 2, 1):
            x = x + torch.tanh(self.blocks[n](x))
        return self.small(self.extra(x))


X = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
ORDER = [["blocks.0", "blocks.2", "blocks.1"]]


def of(model: nn.Module) -> dict[str, list[str]]:
    rows = inspect(model).layers
    return {row.chain: [other.name for other in rows if other.chain == row.chain] for row in rows}


class TestGivenChains:
    def test_another_order_is_said_and_given_chains_decide(self) -> None:
        with pytest.warns(UserWarning, match=r"'blocks\.\*' .*blocks\.0, blocks\.2, blocks\.1.*chains="):
            structural = apply_reslora(Crossed(), ResLoRAConfig(r=2, shortcut="input"), example_inputs=X)
        assert "not all chains are in the order" in inspect(structural).order
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            given = apply_reslora(Crossed(), ResLoRAConfig(r=2, shortcut="input"), example_inputs=X, chains=ORDER)
        assert of(given) == {"chains[0]": ORDER[0], "extra": ["extra"], "small": ["small"]}
        assert [row.predecessor for row in inspect(given).layers][:3] == ["", "blocks.0", "blocks.2"]
        assert inspect(given).order == "chains=, confirmed by a run"

    def test_titles_and_other_adapters_and_files(self, tmp_path: Any) -> None:
        config = ResLoRAConfig(r=2, shortcut="middle", pre_num=2)
        model = randomize(apply_reslora(Crossed(), config, chains={"all": [*ORDER[0], "extra"]}))
        assert of(model) == {"all": [*ORDER[0], "extra"], "small": ["small"]}
        add_adapter(model, "other", config, chains=ORDER)
        expected = model(X)
        set_adapter(model, "other")
        assert list(of(model)) == ["chains[0]", "extra", "small"]
        set_adapter(model, "default")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = load_adapter(Crossed(), save_adapter(model, tmp_path))
        again.load_state_dict(model.state_dict())
        assert of(again) == of(model)
        assert torch.equal(again(X), expected)
        save_adapter(again, tmp_path / "again")
        assert of(load_adapter(Crossed(), tmp_path / "again")) == of(model)

    @pytest.mark.parametrize(
        ("chains", "error", "message"),
        [
            ("blocks.0", TypeError, "chains must be a list of lists of names, or a dict of them, got str"),
            (["blocks.0"], TypeError, r"chains\[0\] must be a list of names, got 'blocks.0'"),
            ([[0]], TypeError, r"chains\[0\] must be a list of names"),
            ({1: ["blocks.0"]}, TypeError, "non-empty str as keys"),
            ([[]], ValueError, r"chains\[0\] must hold at least one name"),
            ([["blocks.9"]], ValueError, "'blocks.9' of chain 'chains\\[0\\]' is no adapted layer; they are blocks.0"),
            ([["blocks.0", "blocks.0"]], ValueError, "'blocks.0' is in chain 'chains\\[0\\]' and again"),
            ({"a": ["blocks.0"], "b": ["blocks.0"]}, ValueError, "'blocks.0' is in chain 'a' and again in chain 'b'"),
            ([["blocks.0", "small"]], ValueError, r"differ in \(in_features, out_features, r\)"),
        ],
    )
    def test_bad_chains_are_refused_and_nothing_is_changed(self, chains: Any, error: Any, message: str) -> None:
        model = Crossed()
        with pytest.raises(error, match=message):
            apply_reslora(model, ResLoRAConfig(r=2), chains=chains)
        assert not any(isinstance(module, ResLoRALinear) for module in model.modules())
        assert all(parameter.requires_grad for parameter in model.parameters()) and "_reslora" not in model.__dict__


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(8, 8, dtype=torch.float64) for _ in range(2))})
            for _ in range(3)
        )
        self.out = nn.Linear(8, 8, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            first = x[:, 0] > 0
            x = x + torch.stack(
                [torch.tanh(layer["experts"][int(not one)](row)) for one, row in zip(first, x, strict=True)]
            )
        return self.out(x)


class TestFilesOfEarlierVersions:
    """They lack "chains_from", and their chains were read off a run: by the last part of a name and token shapes."""

    def test_mixed_roles_are_used_as_stored_and_said(self, tmp_path: Any) -> None:
        config = ResLoRAConfig(r=2, shortcut="middle", pre_num=-1)
        model = randomize(apply_reslora(Crossed(), config, chains=[[*ORDER[0], "extra"]]))
        save_adapter(model, tmp_path)
        rewrite(tmp_path, earlier)
        base = Crossed()
        base.load_state_dict({k: v for k, v in model.state_dict().items() if "lora" not in k})
        with pytest.warns(UserWarning, match=r"other chains .*'chains\[0\]' \(blocks.0, .*used as stored; train a new"):
            again = load_adapter(base, tmp_path)
        assert torch.equal(again(X), model(X))
        save_adapter(again, tmp_path)
        assert read(tmp_path).chains_from == "given"

    def test_the_same_chains_load_without_a_word(self, tmp_path: Any) -> None:
        model = randomize(apply_reslora(Crossed(), ResLoRAConfig(r=2, shortcut="block")))
        save_adapter(model, tmp_path)
        rewrite(tmp_path, earlier)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert of(load_adapter(Crossed(), tmp_path)) == of(model)

    @pytest.mark.parametrize("shortcut", ["none", "block", "input", "middle"])
    def test_experts_that_handed_on_are_refused_by_name(self, shortcut: str, tmp_path: Any) -> None:
        model = apply_reslora(Experts(), ResLoRAConfig(r=2, shortcut=shortcut))
        save_adapter(model, tmp_path)
        rewrite(tmp_path, earlier)
        if shortcut in ("none", "block"):
            load_adapter(Experts(), tmp_path)
            return
        with pytest.raises(ValueError, match=r"'layers.0.experts.0' and 5 more.*exclude_modules"):
            load_adapter(Experts(), tmp_path)


def earlier(values: dict[str, Any]) -> None:
    del values["chains_from"]
    for chain in values["chains"]:
        del chain["experts"]


@pytest.mark.parametrize("shortcut", ["none", "block", "input", "middle"])
def test_inspect_says_what_hands_on(shortcut: str) -> None:
    model = apply_reslora(Experts(), ResLoRAConfig(r=2, shortcut=shortcut))
    rows = {row.name: row for row in inspect(model).layers}
    one = rows["layers.1.experts.0"]
    assert (one.chain, one.position, one.predecessor) == ("layers.*.experts.0", 1, "layers.0.experts.0")
    hands = shortcut in ("input", "middle")
    assert one.hands_on == ("no: an expert, plain LoRA" if hands else "no: an expert")
    assert rows["out"].hands_on == ("no: alone in its chain" if hands else f"no: shortcut {shortcut!r}")
    assert "layers.0.experts.0" in str(inspect(model)) and one.hands_on in str(inspect(model))
    layers = adapted_layers(model)
    assert layers["layers.1.experts.0"].config.shortcut == ("none" if hands else shortcut)

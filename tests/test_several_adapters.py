"""Several adapters in force at once, and one for each sample of a batch: against PEFT, and against the equations."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from reslora_kernels import (
    ResLoRAConfig,
    adapter_names,
    adapters_per_sample,
    add_adapter,
    apply_reslora,
    disable_adapter,
    inspect,
    merge_reslora,
    save_adapter,
    set_adapter,
    unmerge_reslora,
)
from reslora_kernels.adapt.record import adapted_layers
from reslora_kernels.peft import ResLoRAPeftConfig
from reslora_kernels.testing import relative_error

from .models import FAMILIES, llama, logits, needs_transformers_5, randomize, t5

KINDS = {"a": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]},
         "b": {"r": 3, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj"]}}  # fmt: skip
BATCH = FAMILIES["llama"].batch(3)
SHORTCUTS = ["none", "input", "block", "middle"]


def adapted(model: nn.Module, **configs: Mapping[str, Any]) -> nn.Module:
    """The model with an adapter of each name, the first in force."""
    names = list(configs)
    apply_reslora(model, ResLoRAConfig(**configs[names[0]]), adapter_name=names[0])
    randomize(model, 1)
    for seed, name in enumerate(names[1:], 2):
        add_adapter(model, name, ResLoRAConfig(**configs[name]))
        randomize(set_adapter(model, name), seed)
    return set_adapter(model, names[0])


def two(shortcut: str = "none", other: str | None = None) -> nn.Module:
    return adapted(
        llama().double(), a=KINDS["a"] | {"shortcut": shortcut}, b=KINDS["b"] | {"shortcut": other or shortcut}
    )


def peft_two(model: nn.Module) -> Any:
    """PEFT's model with the adapters of ``model``."""
    theirs = get_peft_model(llama().double(), LoraConfig(**KINDS["a"]), adapter_name="a")
    theirs.add_adapter("b", LoraConfig(**KINDS["b"]))
    for adapter in "ab":
        for name, layer in adapted_layers(set_adapter(model, adapter)).items():
            peft_layer = theirs.base_model.model.get_submodule(name)
            with torch.no_grad():
                peft_layer.lora_A[adapter].weight.data = layer.lora_A.detach().clone()
                peft_layer.lora_B[adapter].weight.data = layer.lora_B.detach().clone()
    set_adapter(model, "a")
    return theirs.eval()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    model(**BATCH).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_the_sum_and_its_gradients_are_those_of_peft() -> None:
    model = two()
    theirs = peft_two(model)
    theirs.base_model.set_adapter(["a", "b"])
    assert adapter_names(set_adapter(model, ["a", "b"])) == ["a", "b"]
    assert relative_error(logits(model), logits(theirs)) < 1e-12
    expected = {
        name.removeprefix("base_model.model.").replace(".weight", ""): gradient
        for name, gradient in gradients(theirs).items()
    }
    found = gradients(model)
    assert len(found) == len(expected) == 2 * 3 * 4
    for name, gradient in expected.items():
        place, kind, adapter = name.rsplit(".", 2)
        own = (
            f"{place}.{kind}" if f"{place}.beside_{adapter}.{kind}" not in found else f"{place}.beside_{adapter}.{kind}"
        )
        assert relative_error(found[own], gradient) < 1e-10


def test_a_state_without_the_adapters_loads_into_several() -> None:
    """A base checkpoint, and what a merged model itself saves: either leaves all adapters as they are."""
    model = set_adapter(two(), ["a", "b"])
    before = logits(model)
    model.load_state_dict(llama().double().state_dict())
    merge_reslora(model)
    model.load_state_dict(model.state_dict())
    assert torch.equal(logits(unmerge_reslora(model)), before)
    partial = {name: value for name, value in model.state_dict().items() if not name.endswith("beside_b.lora_A")}
    with pytest.raises(RuntimeError, match=r"beside_b\.lora_A"):
        model.load_state_dict(partial)


class Blocks(nn.Module):
    """x_{n+1} = tanh(y_n), with y_n what block n makes of x_n."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(6, 6)}) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block["proj"](x))
        return x


def update(shortcut: str, layers: list[Any], inputs: list[Tensor], n: int) -> Tensor:
    """The low-rank term of layer n by Eqs. 1 to 4."""

    def u(a: int, x: int) -> Tensor:
        return inputs[x] @ layers[a].lora_A.T

    if shortcut == "block" and n:
        terms = [u(n, n) @ layers[n].lora_B.T, u(n - 1, n) @ layers[n - 1].lora_B.T]
    elif shortcut == "input":
        terms = [(u(n, n) + u(n, max(n - 1, 0))) @ layers[n].lora_B.T]
    elif shortcut == "middle" and n:
        terms = [(u(n, n) + u(n - 1, n - 1)) @ layers[n].lora_B.T]
    else:
        terms = [u(n, n) @ layers[n].lora_B.T]
    return layers[n].scaling * torch.stack(terms).sum(0)


@pytest.mark.parametrize("pair", [("input", "middle"), ("middle", "block"), ("input", "input"), ("block", "none")])
def test_each_adapter_keeps_its_own_chain(pair: tuple[str, str]) -> None:
    torch.manual_seed(0)
    model = adapted(
        Blocks().double(),
        a={"r": 2, "lora_alpha": 3, "shortcut": pair[0]},
        b={"r": 3, "lora_alpha": 1, "shortcut": pair[1]},
    )
    layers = {name: list(adapted_layers(set_adapter(model, name)).values()) for name in "ab"}
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    inputs = [x]
    for n in range(4):
        updates = [update(shortcut, layers[name], inputs, n) for name, shortcut in zip("ab", pair, strict=True)]
        inputs.append(
            torch.tanh(nn.functional.linear(inputs[n], layers["a"][n].weight, layers["a"][n].bias) + sum(updates))
        )
    set_adapter(model, ["a", "b"])
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert len(parameters) == 4 * 4
    expected = torch.autograd.grad(inputs[-1].square().sum(), parameters)
    y = model(x)
    found = torch.autograd.grad(y.square().sum(), parameters)
    assert relative_error(y, inputs[-1]) < 1e-12
    assert all(relative_error(one, other) < 1e-9 for one, other in zip(found, expected, strict=True))


def test_checkpointing_changes_no_gradient_of_a_sum() -> None:
    plain, saving = (set_adapter(two("input", "middle"), ["a", "b"]) for _ in range(2))
    saving.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    expected, found = gradients(plain), gradients(saving)
    assert found.keys() == expected.keys()
    assert all(relative_error(found[name], expected[name]) < 1e-12 for name in expected)


def test_dropout_is_each_adapters_own() -> None:
    model = adapted(
        Blocks().double(), a={"r": 2, "lora_dropout": 0.5, "shortcut": "none"}, b={"r": 2, "shortcut": "none"}
    )
    set_adapter(model, ["a", "b"]).train()
    x = torch.ones(1, 6, dtype=torch.float64)
    layer = model.blocks[0]["proj"]  # type: ignore[index, union-attr]
    a, b = (layer.in_sum[i] for i in range(2))
    frozen = layer.frozen_forward(x)
    with torch.no_grad():
        a.lora_B.zero_()
        assert torch.allclose(layer(x) - frozen, b.scaling * x @ b.lora_A.T @ b.lora_B.T)
        b.lora_B.zero_()
        a.lora_B.fill_(1)
        drawn = torch.cat([layer(x) for _ in range(50)])
    assert len(drawn.unique(dim=0)) > 10


def test_switching_back_leaves_one_alone_as_it_was() -> None:
    model = two("input", "middle")
    alone = {name: (logits(set_adapter(model, name)), sorted(model.state_dict())) for name in "ab"}
    set_adapter(model, ["b", "a"])
    both = logits(model)
    assert torch.allclose(both, logits(copy.deepcopy(model)))
    with disable_adapter(model):
        assert torch.equal(logits(model), logits(llama().double()))
    add_adapter(model, "c", ResLoRAConfig(r=2))
    assert adapter_names(model) == ["b", "a", "c"]
    assert torch.equal(logits(model), both)
    for name in "ab":
        assert torch.equal(logits(set_adapter(model, name)), alone[name][0])
        assert sorted(model.state_dict()) == alone[name][1]


@pytest.mark.slow
@pytest.mark.parametrize("pair", [("input", "middle"), ("block", "none")])
def test_a_sum_is_compiled_pickled_and_autocast(pair: tuple[str, str]) -> None:
    torch.manual_seed(0)
    configs = [{"r": 2 + i, "lora_alpha": 3, "shortcut": shortcut} for i, shortcut in enumerate(pair)]
    model = set_adapter(adapted(Blocks(), a=configs[0], b=configs[1]), ["a", "b"])
    x = torch.randn(3, 5, 6)
    expected = model(x)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    assert relative_error(compiled(x), expected) < 1e-6
    assert counter.frame_count == 1
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(model(x), expected) < 0.05
    with torch.no_grad(), adapters_per_sample(model.eval(), ["b", "__base__", "a"]):
        mixed = model(x)
        assert relative_error(torch.compile(model, backend="eager")(x), mixed) < 1e-6


def convolutional() -> tuple[nn.Module, Tensor, list[str]]:
    return (
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2)),
        torch.randn(3, 3, 6, 6),
        ["0", "1"],
    )


def looked_up() -> tuple[nn.Module, Tensor, list[str]]:
    return nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4)), torch.arange(6).view(3, 2), ["0", "1"]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attn(x, x, x)[0]
        return y


def attending() -> tuple[nn.Module, Tensor, list[str]]:
    return Attention(), torch.randn(3, 5, 8), ["attn"]


def of_experts() -> tuple[nn.Module, Tensor, list[str]]:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=8, intermediate_size=6, num_local_experts=4)
    config._experts_implementation = "eager"
    block = nn.ModuleDict({"mlp": MixtralSparseMoeBlock(config)})
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    model = nn.Sequential()
    model.add_module("mlp", block["mlp"])
    return model, torch.randn(3, 5, 8), []


@pytest.mark.parametrize(
    "make", [convolutional, looked_up, attending, pytest.param(of_experts, marks=needs_transformers_5)]
)
def test_layers_of_other_kinds_sum_too(make: Any) -> None:
    torch.manual_seed(0)
    base, x, names = make()
    base = base.double().eval()
    x = x.double() if x.is_floating_point() else x
    more = {} if names else {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    config = {"target_modules": names, "shortcut": "block"} | more
    model = adapted(base, a={"r": 2, "lora_alpha": 3} | config, b={"r": 3, "lora_alpha": 1} | config)
    plain, deltas = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}, {}
    for name in "ab":
        merge_reslora(set_adapter(model, name))
        deltas[name] = {own: p.detach() - plain[own] for own, p in model.named_parameters() if own in plain}
        unmerge_reslora(model)
    expected = copy.deepcopy(set_adapter(model, "a"))
    with torch.no_grad(), disable_adapter(expected):
        for own, parameter in expected.named_parameters():
            if own in plain:
                parameter.add_(deltas["a"][own] + deltas["b"][own])
        wanted = expected(x)
    set_adapter(model, ["a", "b"])
    assert relative_error(model(x), wanted) < 1e-10
    merge_reslora(model)
    assert relative_error(model(x), wanted) < 1e-10
    unmerge_reslora(model)
    assert relative_error(model(x), wanted) < 1e-10
    if make in (attending, of_experts):
        with pytest.raises(ValueError, match="single samples"), adapters_per_sample(model, ["a", "b", "a"]):
            pass
        return
    alone = [set_adapter(model, name)(x) for name in "ab"]
    with adapters_per_sample(model, ["b", "__base__", "a"]):
        mixed = model(x)
    assert relative_error(mixed[0], alone[1][0]) < 1e-12
    assert relative_error(mixed[2], alone[0][2]) < 1e-12


def model_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(tokens).logits
    return found


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_each_sample_gets_what_it_would_get_alone(shortcut: str) -> None:
    model = two(shortcut, "middle" if shortcut == "block" else None)
    tokens = BATCH["input_ids"][:4]
    names = ["b", "__base__", "a", "b"]
    alone = [model_logits(set_adapter(model, name), tokens) for name in "ab"]
    with disable_adapter(model):
        base = model_logits(model, tokens)
    set_adapter(model, ["a", "b"])
    with torch.no_grad(), adapters_per_sample(model, names):
        mixed = model(tokens).logits
        again = model.generate(tokens[:, :5], max_new_tokens=3, do_sample=False)  # type: ignore[operator]
    assert adapter_names(model) == ["a", "b"]
    for i, (name, found) in enumerate(zip(names, mixed, strict=True)):
        expected = base if name == "__base__" else alone["ab".index(name)]
        assert relative_error(found, expected[i]) < 1e-12
        if name != "__base__":
            one = set_adapter(model, name).generate(tokens[i : i + 1, :5], max_new_tokens=3, do_sample=False)  # type: ignore[operator]
            assert torch.equal(again[i], one[0])


def test_mixed_batches_are_those_of_peft() -> None:
    model = two()
    theirs = peft_two(model)
    names = ["a", "b", "__base__", "a", "b", "b", "a", "__base__"]
    tokens = BATCH["input_ids"]
    with torch.no_grad(), adapters_per_sample(model, names[: len(tokens)]):
        found = model(tokens).logits
    with torch.no_grad():
        assert relative_error(found, theirs(tokens, adapter_names=names[: len(tokens)]).logits) < 1e-12


def of_peft(shortcut: str = "none") -> Any:
    """A PeftModel with both adapters, of this package's method."""
    model = get_peft_model(llama().double(), ResLoRAPeftConfig(**KINDS["a"], shortcut=shortcut), adapter_name="a")
    model.add_adapter("b", ResLoRAPeftConfig(**KINDS["b"], shortcut=shortcut))
    for seed, name in enumerate("ab", 1):
        model.set_adapter(name)
        randomize(model, seed)
    return model.eval()


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_a_peft_model_does_the_same(shortcut: str) -> None:
    native, model = two(shortcut), of_peft(shortcut)
    names = ["b", "__base__", "a", "b"]
    tokens = BATCH["input_ids"][:4]
    model.base_model.set_adapter(["a", "b"])
    assert relative_error(logits(model), logits(set_adapter(native, ["a", "b"]))) < 1e-12
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama().double()))
    with pytest.raises(ValueError, match="of the PeftModel"), disable_adapter(model):
        pass
    with torch.no_grad(), adapters_per_sample(native, names):
        expected = native(tokens).logits
    with torch.no_grad():
        assert relative_error(model(tokens, adapter_names=names).logits, expected) < 1e-12
        if shortcut == "none":
            settings: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "num_beams": 2, "adapter_names": names}
            theirs = peft_two(native).generate(tokens[:, :5], **settings)
            assert torch.equal(model.generate(tokens[:, :5], **settings), theirs)
    assert model.active_adapters == ["a", "b"]
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        model(tokens, adapter_names=names)
    with pytest.raises(ValueError, match="non-existing"):
        model.eval()(tokens, adapter_names=["a", "c", "a", "a"])
    model.set_adapter("b")
    assert relative_error(logits(model), logits(set_adapter(native, "b"))) < 1e-12


@pytest.mark.parametrize("through_peft", [False, True])
@pytest.mark.parametrize("beams", [1, 3])
def test_peft_2283_2921_an_encoder_sees_no_beams(beams: int, through_peft: bool) -> None:
    configs: dict[str, Any] = {
        "a": {"r": 2, "target_modules": ["q", "wi"], "shortcut": "input"},
        "b": {"r": 3, "target_modules": ["q", "v"], "shortcut": "none"},
    }
    tokens, names = FAMILIES["t5"].batch(1)["input_ids"][:3], ["b", "__base__", "a"]
    settings: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "num_beams": beams}
    native: Any = adapted(t5().double(), **configs)
    with disable_adapter(native):
        alone = [native.generate(tokens[1:2], **settings)]
    alone.insert(0, set_adapter(native, "b").generate(tokens[:1], **settings))  # type: ignore[operator]
    alone.append(set_adapter(native, "a").generate(tokens[2:], **settings))  # type: ignore[operator]
    if through_peft:
        model: Any = get_peft_model(t5().double(), ResLoRAPeftConfig(**configs["a"]), adapter_name="a")
        model.add_adapter("b", ResLoRAPeftConfig(**configs["b"]))
        for seed, name in enumerate("ab", 1):
            model.set_adapter(name)
            randomize(model, seed)
        found = model.eval().generate(input_ids=tokens, adapter_names=names, **settings)
    else:
        with adapters_per_sample(native, names, num_beams=beams):
            found = native.generate(tokens, **settings)
    for one, expected in zip(found, alone, strict=True):
        assert torch.equal(one, expected[0])


def test_peft_1374_2759_what_is_frozen_stays_so_in_a_sum() -> None:
    model = two()
    for layer in adapted_layers(set_adapter(model, "b")).values():
        layer.lora_A.requires_grad_(False)
        layer.lora_B.requires_grad_(False)
    set_adapter(model, ["a", "b"])
    assert len(gradients(model)) == 2 * 3 * 2
    set_adapter(model, ["b", "a"])
    assert len(gradients(model)) == 2 * 3 * 2
    assert not any(p.requires_grad for p in set_adapter(model, "b").parameters())


def test_what_cannot_be_right_is_refused(tmp_path: Any) -> None:
    model = two("input")
    with pytest.raises(ValueError, match="training mode"), adapters_per_sample(model.train(), ["a"]):
        pass
    model.eval()
    with pytest.raises(ValueError, match="adapter_name must be one of"), adapters_per_sample(model, ["a", "c"]):
        pass
    with pytest.raises(TypeError, match="list of names"), adapters_per_sample(model, "a"):
        pass
    with pytest.raises(ValueError, match="one for each sample"), adapters_per_sample(model, ["a", "b"]):
        model(**BATCH)
    assert adapter_names(model) == ["a", "b"]
    with pytest.raises(ValueError, match="names that differ"):
        set_adapter(model, ["a", "a"])
    set_adapter(model, ["a", "b"])
    for one in (inspect, lambda m: save_adapter(m, tmp_path / "x")):
        with pytest.raises(ValueError, match=r"set_adapter\(model, 'a'\)"):
            one(model)
    add_adapter(model, "dora", ResLoRAConfig(r=2, use_dora=True))
    with pytest.raises(ValueError, match="DoRA"):
        set_adapter(model, ["a", "dora"])
    assert adapter_names(model)[:2] == ["a", "b"]

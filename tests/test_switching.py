"""Several adapters on one base: each computes what it would alone, whatever was switched before; and sums of them."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
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
    add_weighted_adapter,
    apply_reslora,
    collect_statistics,
    delete_adapter,
    disable_adapter,
    export_peft,
    inspect,
    load_adapter,
    merge_reslora,
    save_adapter,
    set_adapter,
    unmerge_reslora,
)
from reslora_kernels.adapt.record import adapted_layers
from reslora_kernels.testing import relative_error

from .models import FAMILIES, Scrambled, llama, logits, randomize, roberta
from .test_damaged_adapters import X, assert_unchanged, state

CONFIGS = {
    "default": ResLoRAConfig(r=3, shortcut="middle", pre_num=2),
    "narrow": ResLoRAConfig(r=2, shortcut="input", target_modules=["q_proj", "v_proj"]),
    "third": ResLoRAConfig(r=5, lora_alpha=3, shortcut="block", pre_num=-1, init_lora_weights="pissa"),
}
BATCH = FAMILIES["llama"].batch(5)


def alone(name: str) -> nn.Module:
    return randomize(apply_reslora(llama(), CONFIGS[name]), seed=len(name))


def together() -> nn.Module:
    model = alone("default")
    for name in ("narrow", "third"):
        add_adapter(model, name, CONFIGS[name])
        randomize(set_adapter(model, name), seed=len(name))
        set_adapter(model, "default")
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    model(**BATCH).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_each_computes_what_it_does_alone() -> None:
    model = together()
    assert adapter_names(model) == ["default", "narrow", "third"]
    for name in ("third", "narrow", "default", "narrow", "third"):
        assert set_adapter(model, name) is model
        single = alone(name)
        assert torch.equal(logits(model), logits(single))
        assert {n: tuple(p.shape) for n, p in model.named_parameters()} == {
            n: tuple(p.shape) for n, p in single.named_parameters()
        }
        own, expected = gradients(model), gradients(single)
        assert own.keys() == expected.keys()
        assert all(torch.equal(own[key], expected[key]) for key in own)
        assert str(inspect(model)) == str(inspect(single))


@pytest.mark.parametrize("inside", ["set", "sum", "samples"])
def test_disabled_they_all_are(inside: str) -> None:
    """Whichever is put in force inside the block: the reference of a policy is the base."""
    model, base = together(), logits(llama())
    with disable_adapter(model):
        if inside == "samples":
            with adapters_per_sample(model, ["third"] * len(BATCH["input_ids"])):
                assert torch.equal(logits(model), base)
        else:
            set_adapter(model, "third" if inside == "set" else ["default", "narrow"])
            assert torch.equal(logits(model), base)
        with pytest.raises(ValueError, match="adapters are disabled"):
            add_adapter(model, "fourth", CONFIGS["default"])
        set_adapter(model, "default")
        with pytest.raises(ValueError, match="adapters are disabled"):
            merge_reslora(model, calibration=[BATCH])
    assert adapter_names(model) == ["default", "narrow", "third"]
    assert torch.equal(logits(model), logits(alone("default")))
    assert torch.equal(logits(set_adapter(model, "third")), logits(alone("third")))


def test_parameters_that_are_replaced_in_a_sum_are_those_it_reads() -> None:
    """``functional_call`` and ``load_state_dict(assign=True)`` give modules other tensors than they had."""
    model = set_adapter(together(), ["default", "narrow"])
    expected = logits(set_adapter(together(), "default"))
    others = {name: p.detach() for name, p in model.named_parameters()}
    others |= {name: p * 0 for name, p in others.items() if "beside_narrow.lora_B" in name}
    assert relative_error(torch.func.functional_call(model, others, (), BATCH).logits, expected) < 1e-5
    assert not torch.allclose(logits(model), expected, atol=1e-3)
    kept = model.state_dict()
    model.load_state_dict({name: others.get(name, value).clone() for name, value in kept.items()}, assign=True)
    assert relative_error(logits(model), expected) < 1e-5
    assert any("beside_narrow.lora_B" in name for name in gradients(model))
    for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(one), logits(model))
        assert one.state_dict().keys() == kept.keys()
    narrow = set_adapter(model, "narrow")
    assert all(layer.lora_B.count_nonzero() == 0 for layer in adapted_layers(narrow).values())
    assert torch.equal(logits(narrow), logits(llama()))


def test_a_state_dict_is_of_what_is_in_force() -> None:
    """Its keys do not name adapters: it says whose it is, and is loaded into no other."""
    model = set_adapter(together(), "narrow")
    with pytest.warns(UserWarning, match=r"adapter 'narrow', and nothing of 'default', 'third'"):
        state = model.state_dict()
    other = together()
    before = logits(other)
    with pytest.raises(ValueError, match=r"is of adapter 'narrow', and 'default' is in force: call set_adapter"):
        other.load_state_dict(state)
    assert torch.equal(logits(other), before)
    randomize(set_adapter(other, "narrow"), seed=9)
    other.load_state_dict(state)
    assert torch.equal(logits(other), logits(alone("narrow")))


def test_disable() -> None:
    model, base = together(), llama()
    set_adapter(model, "narrow")
    adapted = logits(model)
    with disable_adapter(model):
        assert torch.equal(logits(model), logits(base))
        with disable_adapter(model):
            pass
        assert torch.equal(logits(model), logits(base))
    assert torch.equal(logits(model), adapted)
    with pytest.raises(KeyError), disable_adapter(model):
        raise KeyError
    assert torch.equal(logits(model), adapted)


def test_copies_and_pickles_switch_too() -> None:
    model = together()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        set_adapter(other, "third")
        assert torch.equal(logits(other), logits(alone("third")))
        assert adapter_names(model)[0] == "default"
        randomize(set_adapter(other, "narrow"), seed=99)
    assert torch.equal(logits(set_adapter(model, "narrow")), logits(alone("narrow")))


def test_save_load_export_and_merge_each(tmp_path: Path) -> None:
    model = together()
    for name in adapter_names(model):
        save_adapter(set_adapter(model, name), tmp_path / name)
    other = load_adapter(llama(), tmp_path / "narrow", "narrow")
    assert adapter_names(other) == ["narrow"]
    load_adapter(other, tmp_path / "third", "third")  # added
    add_adapter(other, "default", CONFIGS["default"])
    load_adapter(other, tmp_path / "default", "default")  # filled, while another is in force
    assert adapter_names(other)[0] == "narrow"
    for name in CONFIGS:
        assert torch.equal(logits(set_adapter(other, name)), logits(alone(name)))
    single, calibration = alone("third"), [BATCH]
    export_peft(set_adapter(other, "third"), tmp_path / "a", calibration=calibration)
    export_peft(single, tmp_path / "b", calibration=calibration)
    a, b = ((tmp_path / folder / "adapter_model.safetensors").read_bytes() for folder in "ab")
    assert a == b
    merge_reslora(other)
    for change in (lambda: set_adapter(other, "narrow"), lambda: add_adapter(other, "new", CONFIGS["third"])):
        with pytest.raises(ValueError, match="merged"):
            change()
    with pytest.raises(ValueError, match="merged"), disable_adapter(other):
        pass
    unmerge_reslora(other)
    assert torch.equal(logits(set_adapter(other, "narrow")), logits(alone("narrow")))


def test_training_one_leaves_the_others_alone() -> None:
    model = together()
    set_adapter(model, "narrow")
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(**BATCH).loss.backward()
        optimizer.step()
    set_adapter(model, "third")
    model.eval()
    assert all(not module.training for module in model.modules())
    assert torch.equal(logits(model), logits(alone("third")))
    assert not torch.equal(logits(set_adapter(model, "narrow")), logits(alone("narrow")))


def test_order_read_off_the_first_forward() -> None:
    model = apply_reslora(Scrambled(), ResLoRAConfig(r=2, shortcut="input"))
    add_adapter(model, "b", ResLoRAConfig(r=3, shortcut="middle", pre_num=-1))
    for name in ("b", "default"):
        set_adapter(model, name)
        model(X)
        assert [row.chain_length for row in inspect(model).layers if row.name == "blocks.2.fc"] == [3]


def test_checkpointing_follows_the_adapter_in_force() -> None:
    model = together().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for name in ("default", "narrow", "default", "third"):
        own, expected = gradients(set_adapter(model, name)), gradients(alone(name).train())
        assert own.keys() == expected.keys()
        for key in own:
            torch.testing.assert_close(own[key], expected[key], rtol=1e-4, atol=1e-4)


def test_switching_leaves_nothing_behind() -> None:
    model = together()
    before = state(model)
    for name in ("third", "narrow", "default"):
        set_adapter(model, name)
    assert_unchanged(model, before)


@pytest.mark.slow
def test_compiled_model_recompiles_for_each_adapter_once() -> None:
    torch._dynamo.reset()
    compiles = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal compiles
        compiles += 1
        return graph.forward

    model = together()
    run = torch.compile(model, backend=backend)
    expected = {name: logits(set_adapter(model, name)) for name in CONFIGS}
    for name in CONFIGS:
        set_adapter(model, name)
        torch.testing.assert_close(logits(run), expected[name], rtol=1e-3, atol=1e-4)  # other orders of sums
    with disable_adapter(model):
        logits(run)
    first = compiles
    for name in (*reversed(CONFIGS), *CONFIGS):
        set_adapter(model, name)
        torch.testing.assert_close(logits(run), expected[name], rtol=1e-3, atol=1e-4)  # other orders of sums
    with disable_adapter(model):
        logits(run)
    assert compiles == first


def test_delete() -> None:
    model = together()
    delete_adapter(model, "third")
    assert adapter_names(model) == ["default", "narrow"]
    add_adapter(model, "third", CONFIGS["narrow"])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: set_adapter(m, "x"), ValueError, "one of .'default', 'narrow', 'third'., got 'x'"),
        (lambda m: set_adapter(m, 3), TypeError, "must be a str, got 3"),
        (lambda m: delete_adapter(m, "default"), ValueError, "in force"),
        (lambda m: delete_adapter(m, "x"), ValueError, "got 'x'"),
        (lambda m: add_adapter(m, "narrow", CONFIGS["third"]), ValueError, "must be a new one, got 'narrow'"),
        (lambda m: add_adapter(m, "a.b", CONFIGS["third"]), ValueError, "letters, digits"),
        (lambda m: add_adapter(m, "a", "block"), TypeError, "config must be a ResLoRAConfig"),
        (lambda m: add_adapter(m, "a", ResLoRAConfig(target_modules=["zz"])), ValueError, "candidates"),
        (lambda m: add_adapter(m, "a", ResLoRAConfig(bias="all")), ValueError, "bias='none'"),
        (lambda m: add_adapter(m, "a", ResLoRAConfig(modules_to_save=["lm_head"])), ValueError, "bias='none'"),
        (lambda m: add_adapter(m, "a", ResLoRAConfig(), example_inputs=3), ValueError, "example_inputs"),
    ],
)
def test_refused_and_left_as_it_was(call: Any, error: type[Exception], message: str) -> None:
    model = together()
    before = state(model)
    with pytest.raises(error, match=message):
        call(model)
    assert_unchanged(model, before)
    assert adapter_names(model) == ["default", "narrow", "third"]
    assert torch.equal(logits(set_adapter(model, "third")), logits(alone("third")))


def test_not_while_statistics_are_collected() -> None:
    model = together()
    with collect_statistics(model), pytest.raises(RuntimeError, match="statistics"):
        set_adapter(model, "third")
    set_adapter(model, "third")


def test_second_adapter_with_a_head_of_its_own_is_refused_by_name(tmp_path: Path) -> None:
    save_adapter(apply_reslora(roberta(), ResLoRAConfig(r=3)), tmp_path)
    model = load_adapter(roberta(), tmp_path)
    before = state(model)
    with pytest.raises(ValueError, match=r"adapter 'second' comes with parameters of the base model \('classifier"):
        load_adapter(model, tmp_path, "second")
    assert_unchanged(model, before)


KINDS = {"a": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]},
         "b": {"r": 4, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj"]}}  # fmt: skip
WEIGHTS = [0.7, -1.3]


def ours(**changes: Any) -> nn.Module:
    model = apply_reslora(llama(), ResLoRAConfig(**KINDS["a"] | {"shortcut": "none"} | changes), adapter_name="a")
    randomize(model, 1)
    add_adapter(model, "b", ResLoRAConfig(**KINDS["b"] | {"shortcut": "none"} | changes))
    randomize(set_adapter(model, "b"), 2)
    return set_adapter(model, "a")


@pytest.mark.parametrize(
    ("how", "rank"), [("svd", None), ("svd", 2), ("cat", None), ("linear", None)], ids=["svd", "svd 2", "cat", "linear"]
)
def test_equals_peft(how: Any, rank: int | None) -> None:
    model = ours()
    theirs = get_peft_model(llama(), LoraConfig(**KINDS["a"]), adapter_name="a")
    theirs.add_adapter("b", LoraConfig(**KINDS["b"]))
    for adapter in "ab":
        for name, layer in adapted_layers(set_adapter(model, adapter)).items():
            peft_layer = theirs.base_model.model.get_submodule(name)
            with torch.no_grad():
                peft_layer.lora_A[adapter].weight.copy_(layer.lora_A)
                peft_layer.lora_B[adapter].weight.copy_(layer.lora_B)
    set_adapter(model, "a")
    before = logits(model)
    theirs.add_weighted_adapter(["a", "b"], WEIGHTS, "sum", combination_type=how, svd_rank=rank)
    theirs.set_adapter("sum")
    add_weighted_adapter(model, ["a", "b"], WEIGHTS, "sum", how, rank)
    assert torch.equal(logits(model), before)
    assert adapter_names(model)[0] == "a"
    assert relative_error(logits(set_adapter(model, "sum")), logits(theirs.eval())) < 1e-4


@pytest.mark.parametrize("shortcut", ["block", "input", "middle"])
def test_sums_what_each_adapter_merges_to(shortcut: Any, tmp_path: Path) -> None:
    model = ours(shortcut=shortcut)
    calibration = [FAMILIES["llama"].batch(seed) for seed in range(2)]
    deltas: dict[str, Any] = {}
    for adapter, weight in zip("ab", WEIGHTS, strict=True):
        one = set_adapter(model, adapter)
        plain = {name: layer.weight.clone() for name, layer in adapted_layers(one).items()}
        merge_reslora(one, calibration=calibration)
        for name, layer in adapted_layers(one).items():
            deltas[name] = deltas.get(name, 0) + weight * (layer.weight - plain[name])
        unmerge_reslora(one)
    add_weighted_adapter(model, ["a", "b"], WEIGHTS, "sum", "cat", calibration=calibration)
    set_adapter(model, "sum")
    for name, layer in adapted_layers(model).items():
        assert relative_error(layer.lora_B @ layer.lora_A, deltas[name]) < 1e-4, name
    save_adapter(model, tmp_path / "saved")
    assert torch.equal(logits(load_adapter(llama(), tmp_path / "saved")), logits(model))
    export_peft(model, tmp_path / "exported")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((["a", "c"], [1, 1], "sum"), ValueError, "must be names of the model's adapters"),
        ((["a", "b"], [1], "sum"), ValueError, "a weight for each adapter"),
        ((["a", "b"], [1, 1], "a"), ValueError, "must be a new one"),
        ((["a", "b"], [1, float("nan")], "sum"), TypeError, "finite numbers"),
        ((["a", "b"], [1, 1], "sum", "ties"), ValueError, "combination_type must be one of"),
        ((["a", "b"], [1, 1], "sum", "cat", 3), ValueError, "svd_rank is for combination_type='svd'"),
    ],
)
def test_wrong_arguments_change_nothing(arguments: Any, error: Any, message: str) -> None:
    model = ours()
    before = logits(model)
    with pytest.raises(error, match=message):
        add_weighted_adapter(model, *arguments)
    assert adapter_names(model) == ["a", "b"]
    assert torch.equal(logits(model), before)


def test_shortcuts_need_data_and_leave_the_adapter_in_force() -> None:
    model = ours(shortcut="middle")
    with pytest.raises(ValueError, match="needs data"):
        add_weighted_adapter(model, ["b", "a"], [1, 1], "sum")
    assert adapter_names(model) == ["a", "b"]


@pytest.mark.parametrize("shortcut", ["block", "middle"])
@pytest.mark.slow
def test_a_hot_swap_keeps_compiled_code(shortcut: Any, tmp_path: Path) -> None:
    """``load_adapter`` into the adapter in force changes values only: nothing is compiled again."""
    for name, seed in (("one", 3), ("other", 4)):
        save_adapter(randomize(ours(shortcut=shortcut), seed), tmp_path / name)
    expected = logits(load_adapter(llama(), tmp_path / "other"))
    model = load_adapter(llama(), tmp_path / "one")
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    assert relative_error(logits(compiled), expected) > 1e-3
    frames = counter.frame_count
    load_adapter(model, tmp_path / "other")
    assert relative_error(logits(compiled), expected) < 1e-5
    assert counter.frame_count == frames > 0

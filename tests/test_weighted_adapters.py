"""Several adapters: weighted sums against PEFT's, and values that are swapped under compiled code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounter

from reslora_kernels import (
    ResLoRAConfig,
    adapter_names,
    add_adapter,
    add_weighted_adapter,
    apply_reslora,
    export_peft,
    load_adapter,
    merge_reslora,
    save_adapter,
    set_adapter,
    unmerge_reslora,
)
from reslora_kernels.adapt.record import adapted_layers
from reslora_kernels.testing import relative_error

from .models import FAMILIES, llama, logits, randomize

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

"""Hooks of accelerate and diffusers on a model's layers: carried over and working, or refused by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file as load
from torch import Tensor, nn

from reslora_kernels import (
    ResLoRAConfig,
    ResLoRALinear,
    add_adapter,
    apply_reslora,
    load_adapter,
    merge_reslora,
    save_adapter,
    set_adapter,
    unmerge_reslora,
)

from .models import llama, randomize

accelerate = pytest.importorskip("accelerate")
X = torch.arange(2, 11)[None]


def config(shortcut: str = "input") -> ResLoRAConfig:
    return ResLoRAConfig(r=2, shortcut=shortcut, target_modules=["q_proj", "v_proj", "down_proj"])


def kept_on_cpu(model: nn.Module, folder: Path) -> nn.Module:
    accelerate.cpu_offload(model, execution_device="cpu")
    return model


def kept_on_disk(model: nn.Module, folder: Path) -> nn.Module:
    accelerate.disk_offload(model, str(folder / "weights"), execution_device="cpu")
    return model


def kept_by_a_second_hook(model: nn.Module, folder: Path) -> nn.Module:
    hooks = accelerate.hooks
    for layer in [module for module in model.modules() if type(module) is nn.Linear]:
        hooks.add_hook_to_module(layer, hooks.ModelHook())
        hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="cpu", offload=True), append=True)
    return model


def adapted(model: nn.Module, shortcut: str = "input") -> nn.Module:
    model = apply_reslora(model, config(shortcut))
    torch.manual_seed(1)
    return randomize(model)


def gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=X, labels=X).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("shortcut", ["none", "input", "block", "middle"])
@pytest.mark.parametrize("offload", [kept_on_cpu, kept_on_disk, kept_by_a_second_hook])
def test_an_offloaded_base_trains_as_one_in_memory(offload: Any, shortcut: str, tmp_path: Path) -> None:
    plain, offloaded = adapted(llama(), shortcut), adapted(offload(llama(), tmp_path), shortcut)
    expected, found = gradients(plain), gradients(offloaded)
    assert expected.keys() == found.keys() and expected
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, msg=name)
    assert all(m.weight.is_meta for m in offloaded.modules() if isinstance(m, ResLoRALinear))  # away again


@pytest.mark.parametrize("offload", [kept_on_cpu, kept_on_disk])
def test_an_offloaded_base_merges_saves_and_switches(offload: Any, tmp_path: Path) -> None:
    plain, offloaded = adapted(llama()), adapted(offload(llama(), tmp_path))
    before = offloaded(input_ids=X).logits
    merge_reslora(plain, "weights"), merge_reslora(offloaded, "weights")
    torch.testing.assert_close(offloaded(input_ids=X).logits, plain(input_ids=X).logits, rtol=0, atol=0)
    assert not torch.equal(offloaded(input_ids=X).logits, before)
    unmerge_reslora(offloaded)
    assert torch.equal(offloaded(input_ids=X).logits, before)
    save_adapter(offloaded, tmp_path / "adapter")
    again = load_adapter(offload(llama(), tmp_path / "again"), tmp_path / "adapter")
    assert torch.equal(again(input_ids=X).logits, before)
    add_adapter(offloaded, "other", config("none"))
    set_adapter(offloaded, "other")
    assert torch.equal(offloaded(input_ids=X).logits, llama()(input_ids=X).logits)
    set_adapter(offloaded, "default")
    assert torch.equal(offloaded(input_ids=X).logits, before)


def test_a_dispatched_model_trains_and_saves_whole(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    llama().save_pretrained(tmp_path / "base")
    places = {"model.embed_tokens": "disk", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "disk", "model.layers.1": "cpu", "model.layers.2": "disk"}
    dispatched = adapted(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map=places, offload_folder=tmp_path / "away")
    )
    plain = adapted(llama())
    expected, found = gradients(plain), gradients(dispatched)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    dispatched.save_pretrained(tmp_path / "whole")
    state = {name: value for file in (tmp_path / "whole").glob("*.safetensors") for name, value in load(file).items()}
    for name, value in plain.state_dict().items():
        assert torch.equal(state[name], value), name


def test_weights_return_when_the_hooks_are_removed() -> None:
    model = adapted(kept_on_cpu(llama(), Path()))
    before = model(input_ids=X).logits
    accelerate.hooks.remove_hook_from_submodules(model)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(model(input_ids=X).logits, before)


def test_a_hook_of_any_kind_still_runs_and_a_copy_has_its_own() -> None:
    class Twice(accelerate.hooks.ModelHook):  # type: ignore[name-defined, misc]
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return 2 * output

    model = llama()
    accelerate.hooks.add_hook_to_module(model.model.layers[0].mlp.down_proj, Twice())
    before = model(input_ids=X).logits
    apply_reslora(model, config())
    assert torch.equal(model(input_ids=X).logits, before)
    other = copy.deepcopy(model)
    randomize(model)
    assert torch.equal(other(input_ids=X).logits, before)


def replaced(model: Any) -> str:
    layer = model.model.layers[1].self_attn.q_proj
    layer.forward = lambda x: torch.zeros_like(x)
    return r"'model.layers.1.self_attn.q_proj' is replaced on the instance by tests.test_offloading.replaced"


def cast_by_layer(model: Any) -> str:
    casting = pytest.importorskip("diffusers.hooks")
    casting.apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32, skip_modules_pattern=["norm"])
    return r"replaced on the instance by diffusers \(layerwise_casting\).*skip_modules_classes"


def offloaded_in_groups(model: Any) -> str:
    groups = pytest.importorskip("diffusers.hooks")
    groups.apply_group_offloading(model, torch.device("cpu"), offload_type="leaf_level")
    return "group offloading: call apply_reslora first"


def loaded_with_submodules(model: Any) -> str:
    accelerate.cpu_offload(model, execution_device="cpu", preload_module_classes=["LlamaAttention"])
    return r"accelerate loads 'model.layers.0.self_attn' with all its submodules"


@pytest.mark.parametrize("hang", [replaced, cast_by_layer, offloaded_in_groups, loaded_with_submodules])
def test_what_an_adapter_would_lose_is_refused_by_name(hang: Any) -> None:
    model = llama()
    message = hang(model)
    state = {name: (id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        apply_reslora(model, config())
    assert {name: (id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()} == state


def test_trained_weights_are_not_offloaded() -> None:
    model = kept_on_cpu(llama(), Path())
    with pytest.raises(ValueError, match=r"'lm_head' would be trained.*accelerate offloads it"):
        apply_reslora(model, config().replace(modules_to_save=["lm_head"]))


def test_diffusers_hooks_after_adapting() -> None:
    hooks = pytest.importorskip("diffusers.hooks")
    model = adapted(llama())
    before = model(input_ids=X).logits
    hooks.apply_group_offloading(model, torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(model(input_ids=X).logits, before)
    model = adapted(llama())
    cast = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32, "skip_modules_pattern": ["norm"]}
    with pytest.raises(ValueError, match=r"adapters are not held in 8 bits.*skip_modules_classes"):
        hooks.apply_layerwise_casting(model, **cast)
    model = adapted(llama())
    adapters = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    hooks.apply_layerwise_casting(model, **cast, skip_modules_classes=(ResLoRALinear,))
    assert torch.isfinite(model(input_ids=X).logits).all()
    assert all(torch.equal(p, adapters[name]) for name, p in model.named_parameters() if p.requires_grad)

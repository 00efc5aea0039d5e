"""ResLoRA as a method of PEFT: the native layers, values, gradients and files, in the hands of ``PeftModel``."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from reslora_kernels import (  # noqa: E402
    ResLoRAConfig,
    add_adapter,
    apply_reslora,
    export_peft,
    load_adapter,
    merge_reslora,
    restart_reslora,
    save_adapter,
)
from reslora_kernels.adapt.record import adapted_layers  # noqa: E402
from reslora_kernels.files.adapter_format import read  # noqa: E402
from reslora_kernels.merge.merging import merge_and_unload  # noqa: E402
from reslora_kernels.peft import ResLoRAPeftConfig, from_native, to_native  # noqa: E402

from . import processes  # noqa: E402
from .models import FAMILIES, llama, logits, randomize, roberta  # noqa: E402
from .test_damaged_adapters import rewrite  # noqa: E402
from .test_structure import Experts, earlier  # noqa: E402

SHORTCUTS = ("none", "input", "block", "middle")
LLAMA = FAMILIES["llama"]


def wanted(shortcut: str = "input", **changes: Any) -> dict[str, Any]:
    return {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "shortcut": shortcut,
    } | changes


def peft_llama(shortcut: str = "input", **changes: Any) -> Any:
    """A LLaMA with an adapter as after training."""
    return randomize(peft.get_peft_model(llama(), ResLoRAPeftConfig(**wanted(shortcut, **changes))))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    LLAMA.loss(model, LLAMA.batch(1)).backward()
    return {f"{name}.{own}": p.grad for name, layer in adapted_layers(model).items() for own, p in trained_of(layer)}


def trained_of(layer: Any) -> list[tuple[str, Tensor]]:
    return [(name, p) for name, p in layer.adapter_parameters().items() if p.requires_grad]


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}, {"pre_num": -1}], ids=str)
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_values_and_gradients_are_those_of_the_native_api(shortcut: str, changes: dict[str, Any]) -> None:
    native = randomize(apply_reslora(llama(), ResLoRAConfig(**wanted(shortcut, **changes))))
    model = peft_llama(shortcut, **changes)
    assert torch.equal(logits(model), logits(native))
    expected, found = gradients(native), gradients(model)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_gradient_checkpointing_changes_no_gradient(shortcut: str) -> None:
    model = peft_llama(shortcut, lora_dropout=0.1).train()
    torch.manual_seed(0)
    expected = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    torch.manual_seed(0)
    found = gradients(model)
    for name in expected:  # Transformers 4 computes in another order without a cache
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


def test_only_the_adapters_train_and_a_start_does_not() -> None:
    model = peft_llama(init_lora_weights="pissa")
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B"}
    assert model.get_nb_trainable_parameters()[0] == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"init_lora_weights": "olora"}], ids=str)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_loaded_it_computes_the_same(
    tmp_path: Path, changes: dict[str, Any], low_cpu_mem_usage: bool
) -> None:
    model = peft_llama(**changes)
    model.save_pretrained(tmp_path)
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (about["peft_type"], about["shortcut"]) == ("RESLORA", "input")
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), logits(model))
    assert not any(p.requires_grad for p in loaded.parameters())


def test_auto_class_loads_base_and_adapter(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    base = type(llama()).from_pretrained(tmp_path / "base")
    model = randomize(peft.get_peft_model(base, ResLoRAPeftConfig(**wanted(), task_type="CAUSAL_LM")))
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", is_trainable=True)
    assert torch.equal(logits(loaded.eval()), logits(model))
    assert any(p.requires_grad for p in loaded.parameters())


def test_a_strict_load_misses_an_adapter_that_is_not_there() -> None:
    model = peft_llama()
    state = {name: tensor for name, tensor in model.state_dict().items() if "reslora" not in name}
    with pytest.raises(RuntimeError, match="lora_A"):
        model.load_state_dict(state)


@pytest.mark.parametrize("changes", [{}, {"init_lora_weights": "pissa", "use_rslora": True}, {"bias": "all"}], ids=str)
def test_a_folder_goes_to_the_native_format_and_back(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = peft_llama(**changes)
    model.save_pretrained(tmp_path / "peft")
    native = load_adapter(llama(), to_native(tmp_path / "peft", tmp_path / "native"))
    assert torch.equal(logits(native), logits(model))
    save_adapter(native, tmp_path / "again")
    back = peft.PeftModel.from_pretrained(llama(), from_native(tmp_path / "again", tmp_path / "back"))
    assert torch.equal(logits(back), logits(model))


def test_a_trained_head_goes_along(tmp_path: Path) -> None:
    batch = FAMILIES["roberta"].batch(1)
    config = ResLoRAPeftConfig(r=4, target_modules=["query", "value"], shortcut="middle", task_type="SEQ_CLS")
    model = randomize(peft.get_peft_model(roberta(), config))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "peft")
    expected = logits(model.eval(), batch)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(roberta(), tmp_path / "peft").eval(), batch), expected)
    native = load_adapter(roberta(), to_native(tmp_path / "peft", tmp_path / "native"))
    assert torch.equal(logits(native.eval(), batch), expected)
    back = from_native(tmp_path / "native", tmp_path / "back", task_type="SEQ_CLS")
    assert torch.equal(logits(peft.PeftModel.from_pretrained(roberta(), back).eval(), batch), expected)


def test_chains_by_hand_travel(tmp_path: Path) -> None:
    names = [f"model.layers.{i}.self_attn.q_proj" for i in (2, 0, 1)]
    with pytest.warns(UserWarning, match="run in the order"):
        model = peft_llama(target_modules=["q_proj"], chains={"q": names})
    model.save_pretrained(tmp_path / "peft")
    saved = read(to_native(tmp_path / "peft", tmp_path / "native"))
    assert saved.chains is not None
    assert saved.chains[0].names == names
    back = json.loads((from_native(tmp_path / "native", tmp_path / "back") / "adapter_config.json").read_text())
    assert back["chains"] == {"q": names}


def test_experts_hand_nothing_on_beside_chains_by_hand(tmp_path: Path) -> None:
    config = ResLoRAConfig(r=2, shortcut="input")
    native = randomize(apply_reslora(of_experts(), config, chains=[["out"]]))
    back = from_native(save_adapter(native, tmp_path / "native"), tmp_path / "peft")
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(peft.PeftModel.from_pretrained(of_experts(), back)(x), native(x), rtol=1e-13, atol=1e-13)


def of_experts() -> nn.Module:
    torch.manual_seed(0)
    return Experts()


def test_a_file_whose_chains_need_the_model_is_refused(tmp_path: Path) -> None:
    save_adapter(apply_reslora(llama(), ResLoRAConfig(**wanted())), tmp_path / "native")
    rewrite(tmp_path / "native", earlier)
    with pytest.raises(ValueError, match=r"earlier version.*load_adapter"):
        from_native(tmp_path / "native", tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_embeddings_that_peft_saves_along_do_not_train(tmp_path: Path) -> None:
    peft_llama().save_pretrained(tmp_path / "peft", save_embedding_layers=True)
    native = load_adapter(llama(), to_native(tmp_path / "peft", tmp_path / "native"))
    assert {name.rpartition(".")[2] for name, p in native.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert "model.embed_tokens.weight" in read(tmp_path / "native").frozen


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chains": [["nowhere"]]}, "no adapted layer"),
        ({"rank_pattern": {"qproj": 2}}, "rank_pattern key 'qproj' matches no adapted layer"),
        (
            {"alpha_pattern": {"layers.9.self_attn.q_proj": 2}},
            "alpha_pattern key 'layers.9.self_attn.q_proj' matches no",
        ),
    ],
    ids=["chains", "rank_pattern", "alpha_pattern"],
)
def test_what_does_not_fit_leaves_the_model_as_it_was(changes: dict[str, Any], message: str) -> None:
    model = llama()
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(model, ResLoRAPeftConfig(**wanted(**changes)))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.state_dict().keys() == llama().state_dict().keys()


def test_a_parameter_that_peft_would_not_load_is_refused(tmp_path: Path) -> None:
    native = apply_reslora(llama(), ResLoRAConfig(**wanted()))
    native.model.norm.requires_grad_(True)
    save_adapter(native, tmp_path / "native")
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        from_native(tmp_path / "native", tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_merges_are_the_native_ones(shortcut: str) -> None:
    batches = [LLAMA.batch(seed) for seed in range(2, 6)]
    native, model = randomize(apply_reslora(llama(), ResLoRAConfig(**wanted(shortcut)))), peft_llama(shortcut)
    unmerged = logits(model)
    merge_reslora(native, calibration=batches)
    report = model.merge_adapter(calibration=batches)
    assert torch.equal(logits(model), logits(native))
    assert {row.method for row in report.rows} <= {"exact", "least_squares"}
    model.unmerge_adapter()
    assert torch.equal(logits(model), unmerged)
    plain = model.merge_and_unload(calibration=batches)
    assert torch.equal(logits(plain), logits(native))
    assert plain.state_dict().keys() == llama().state_dict().keys()
    assert type(plain.model.layers[0].self_attn.q_proj) is nn.Linear


def test_without_data_only_what_is_exact_or_asked_for_merges() -> None:
    for shortcut in ("input", "middle"):
        model = peft_llama(shortcut)
        before = logits(model)
        with pytest.raises(ValueError, match="needs data: pass calibration"):
            model.merge_and_unload()
        assert torch.equal(logits(model), before)
    peft_llama("block").merge_and_unload(safe_merge=True)
    peft_llama("input", merge="weights").merge_and_unload()


def test_unload_gives_the_base_back() -> None:
    model = peft_llama()
    base = model.unload()
    assert torch.equal(logits(base), logits(llama()))
    again = randomize(peft.get_peft_model(base, ResLoRAPeftConfig(**wanted())))
    assert torch.equal(logits(again), logits(peft_llama()))


def test_several_adapters_take_turns() -> None:
    alone = {"default": peft_llama("input"), "other": peft_llama("middle", r=2)}
    model = peft_llama("input")
    model.add_adapter("other", ResLoRAPeftConfig(**wanted("middle", r=2)))
    expected = {name: logits(one) for name, one in alone.items()}
    assert torch.equal(logits(model), expected["default"])
    model.set_adapter("other")
    assert torch.equal(logits(randomize(model)), expected["other"])
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"other"}
    twin = copy.deepcopy(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))
    model.delete_adapter("other")
    assert torch.equal(logits(model), expected["default"])
    assert torch.equal(logits(twin), expected["other"])


def test_injected_into_a_model_without_a_peft_model() -> None:
    model = peft.inject_adapter_in_model(ResLoRAPeftConfig(**wanted()), llama())
    randomize(model)
    assert torch.equal(logits(model), logits(peft_llama()))
    state = peft.get_peft_model_state_dict(model)
    other = peft.inject_adapter_in_model(ResLoRAPeftConfig(**wanted()), llama())
    assert not peft.set_peft_model_state_dict(other, state).unexpected_keys
    assert torch.equal(logits(other), logits(model))


def test_all_linear_is_that_of_the_native_api() -> None:
    for make, task in ((llama, "CAUSAL_LM"), (roberta, "SEQ_CLS")):
        native = apply_reslora(make(), ResLoRAConfig())
        model = peft.get_peft_model(make(), ResLoRAPeftConfig(target_modules="all-linear", task_type=task))
        assert adapted_layers(model).keys() == adapted_layers(native).keys()


@pytest.mark.parametrize("autocast", [True, False])
def test_dtype_of_adapters_in_a_half_precision_model(autocast: bool) -> None:
    model = peft.get_peft_model(llama().bfloat16(), ResLoRAPeftConfig(**wanted()), autocast_adapter_dtype=autocast)
    assert {layer.lora_A.dtype for layer in adapted_layers(model).values()} == {
        torch.float32 if autocast else torch.bfloat16
    }
    assert logits(model).dtype == torch.bfloat16


def test_exported_from_peft_it_is_a_plain_lora_adapter(tmp_path: Path) -> None:
    model = peft_llama("block")
    export_peft(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_right_is_refused_by_name() -> None:
    model = peft_llama()
    model.add_adapter("other", ResLoRAPeftConfig(**wanted()))
    before = logits(model)
    with pytest.raises(ValueError, match="adapter_names must be some of"):
        model.merge_adapter(["another"], calibration=[LLAMA.batch(1)])
    with pytest.raises(ValueError, match="modules_to_save"):
        model.add_adapter("third", ResLoRAPeftConfig(**wanted(target_modules=["k_proj"], modules_to_save=["q_proj"])))
    with pytest.raises(ValueError, match="LlamaRMSNorm"):
        model.add_adapter("fourth", ResLoRAPeftConfig(target_modules=["q_proj", "norm"]))
    with pytest.raises(ValueError, match="held by PEFT"):
        save_adapter(model, "never")
    with pytest.raises(ValueError, match="held by PEFT"):
        add_adapter(model, "third", ResLoRAConfig())
    with pytest.raises(ValueError, match="held by PEFT"):
        restart_reslora(model)
    with pytest.raises(NotImplementedError, match=r"set_adapter\(\[\.\.\.\]\) sums them"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both")
    with pytest.raises(ValueError, match="held by PEFT"):
        merge_and_unload(model, calibration=[LLAMA.batch(1)])
    assert torch.equal(logits(model), before)
    assert list(model.peft_config) == ["default", "other"]


def test_a_merged_adapter_blocks_what_would_change_the_weights_under_it() -> None:
    model = peft_llama("block")
    model.add_adapter("other", ResLoRAPeftConfig(**wanted("block")))
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged"):
        model.add_adapter("third", ResLoRAPeftConfig(**wanted("block")))
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("default")
    with pytest.warns(UserWarning, match="Unmerging"):
        model.set_adapter("other")
    assert torch.equal(logits(model), logits(llama()))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"r": 0}, "r must be"),
        ({"shortcut": "blok"}, "shortcut"),
        ({"merge": "svd"}, "merge"),
        ({"bias": "some"}, "bias"),
        ({"target_parameters": ["mlp.gate.weight"]}, r"apply_reslora\(model, ResLoRAConfig\(target_parameters="),
        ({"ensure_weight_tying": True}, r"apply_reslora\(model, ResLoRAConfig\(ensure_weight_tying="),
    ],
)
def test_a_wrong_value_is_refused_when_the_config_is_made(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ResLoRAPeftConfig(**changes)


def test_the_package_does_not_import_peft() -> None:
    code = "import sys, reslora_kernels; assert 'peft' not in sys.modules and 'reslora_kernels.peft' not in sys.modules"
    processes.run([sys.executable, "-c", code], check=True)

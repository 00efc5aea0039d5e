"""What a merge leaves: weights that come back bit for bit, models that are plain ones; no state dict taken silently."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from torch import nn

from reslora_kernels import (
    ResLoRAConfig,
    ResLoRALinear,
    adapter_names,
    add_adapter,
    add_weighted_adapter,
    apply_reslora,
    collect_statistics,
    disable_adapter,
    export_peft,
    load_adapter,
    merge_and_unload,
    merge_reslora,
    reference,
    save_adapter,
    set_adapter,
    unload,
    unmerge_reslora,
)
from reslora_kernels.adapt.record import layers_in_place
from reslora_kernels.testing import relative_error

from .models import FAMILIES, llama, logits, randomize
from .test_merging import WIDTH, batches, pieces
from .test_merging import adapted as residual
from .test_several_adapters import of_peft, peft_two, two

BATCH = FAMILIES["llama"].batch(1)


def adapted(shortcut: str = "block", **changes: Any) -> Any:
    return randomize(apply_reslora(llama(), ResLoRAConfig(r=3, shortcut=shortcut, **changes)))


def keys_of(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def assert_plain(model: nn.Module) -> None:
    """No trace of the package: not in modules, hooks, attributes, nor in what pickle writes."""
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in llama().named_parameters()}
    assert not any(isinstance(module, ResLoRALinear) for module in model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    file = io.BytesIO()
    torch.save(model, file)
    assert b"reslora" not in file.getvalue()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("shortcut", "pre_num"), [("none", 0), ("block", -1), ("input", 1), ("middle", 2)])
def test_unmerge_restores_every_bit(shortcut: str, pre_num: int, dtype: torch.dtype) -> None:
    model, data = residual(shortcut, pre_num, dtype), batches(5, dtype)
    before = [layer.weight.clone() for layer in model.layers]
    outputs = model(data[0])[1]
    merge_reslora(model, calibration=data)
    assert all(not torch.equal(layer.weight, w) for layer, w in zip(model.layers, before, strict=True))
    unmerge_reslora(model)
    assert all(torch.equal(layer.weight, w) for layer, w in zip(model.layers, before, strict=True))
    assert all(torch.equal(y, z) for y, z in zip(model(data[0])[1], outputs, strict=True))


def test_merging_rounds_once() -> None:
    """bfloat16 weights: the float32 sum, rounded to bfloat16, and nothing in between."""
    model = residual("block", 1, torch.bfloat16)
    weights, a, b = pieces(model)
    merge_reslora(model)
    for n, layer in enumerate(model.layers):
        update = reference.exact_update("block", 1, 1.0, n, [t.double() for t in a], [t.double() for t in b])
        exact = weights[n].double() + update
        step = torch.finfo(torch.bfloat16).eps
        assert ((layer.weight.double() - exact).abs() <= exact.abs() * step / 2 * 1.01 + 1e-7).all()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no data", "needs data: pass calibration"),
        ("nan", "holds NaN or Inf"),
        ("tied", "is shared with"),
        ("empty", "no batch"),
        ("generator", "re-iterable"),
        ("merged", "merged already"),
    ],
)
def test_a_refused_merge_changes_nothing(case: str, message: str) -> None:
    model, arguments = residual("input", 1), {"calibration": batches(9)}
    if case == "no data":
        arguments = {}
    elif case == "nan":
        model.layers[4].lora_B.data[0, 0] = float("nan")
        arguments["method"] = "input"
    elif case == "tied":
        model.tied = nn.Linear(WIDTH, WIDTH)
        model.tied.weight = model.layers[2].weight
    elif case == "empty":
        arguments = {"calibration": []}
    elif case == "generator":
        arguments = {"calibration": iter(batches(9)), "sequential": True}
    elif case == "merged":
        merge_reslora(model, **arguments)
    before = [layer.weight.clone() for layer in model.layers]
    with pytest.raises(ValueError, match=message):
        merge_reslora(model, **arguments)
    assert all(torch.equal(layer.weight, w) for layer, w in zip(model.layers, before, strict=True))
    assert all(layer.merged == (case == "merged") for layer in model.layers)


class TestMerged:
    @pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
    def test_save_pretrained_writes_a_plain_model(self, changes: dict[str, Any], tmp_path: Path) -> None:
        from transformers import AutoModelForCausalLM

        model = adapted(**changes)
        merge_reslora(model)
        model.save_pretrained(tmp_path)
        assert keys_of(tmp_path) == set(llama().state_dict())
        again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert torch.equal(logits(again), logits(model))
        unmerge_reslora(model)
        assert sum("lora_" in key for key in model.state_dict()) >= 2 * 21

    def test_tied_head_that_was_trained_is_tied_and_trained(self, tmp_path: Path) -> None:
        from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

        sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=48)
        model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **sizes)).eval()
        randomize(apply_reslora(model, ResLoRAConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"])))
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
        merge_and_unload(model).save_pretrained(tmp_path)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(model))

    def test_trainer_saves_a_plain_model(self, tmp_path: Path) -> None:
        from transformers import Trainer, TrainingArguments

        model = adapted()
        merge_reslora(model)
        Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")).save_model()
        assert keys_of(tmp_path) == set(llama().state_dict())

    def test_its_own_state_dict_loads(self) -> None:
        model = adapted()
        merge_reslora(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.load_state_dict(model.state_dict(), strict=True)


class TestSumOfAdapters:
    @pytest.mark.parametrize("pair", [("none", "none"), ("block", "none"), ("block", "block")])
    def test_is_merged_exactly_and_comes_apart_again(self, pair: tuple[str, str]) -> None:
        model = set_adapter(two(*pair), ["a", "b"])
        before, state = logits(model), {name: p.clone() for name, p in model.state_dict().items()}
        report = merge_reslora(model)
        rank = (
            4 + 3 if pair[0] == pair[1] == "none" else 7 + (4 if pair[0] == "block" else 0) + 3 * (pair[1] == "block")
        )
        assert {row.method for row in report.rows} == {"exact"} and max(row.rank for row in report.rows) == rank
        assert len(report.rows) == 3 * 3
        assert relative_error(logits(model), before) < 1e-12
        assert {name for name in model.state_dict() if "lora" in name} == set(), "a plain model to whoever saves it"
        for refused in (lambda: set_adapter(model, "a"), lambda: merge_reslora(model), lambda: disabled(model)):
            with pytest.raises(ValueError, match="merged"):
                refused()
        unmerge_reslora(model)
        after = model.state_dict()
        assert after.keys() == state.keys() and all(torch.equal(after[name], p) for name, p in state.items())
        assert torch.equal(logits(model), before)

    def test_has_the_weights_of_peft(self) -> None:
        model = two()
        theirs = peft_two(model)
        theirs.merge_adapter(adapter_names=["a", "b"])
        merge_reslora(set_adapter(model, ["a", "b"]))
        for name, layer in layers_in_place(model).items():
            assert relative_error(layer.weight, theirs.base_model.model.get_submodule(name).weight) < 1e-12

    @pytest.mark.parametrize("names", [["a", "b"], ["b", "a"], ["b"], None])
    @pytest.mark.parametrize("shortcut", ["none", "block"])
    def test_of_a_peft_model_too(self, shortcut: str, names: Any) -> None:
        """Whichever are in force, those named are merged, and those that were in force are so afterwards."""
        model, native = of_peft(shortcut), two(shortcut)
        wanted = logits(set_adapter(native, names or ["a"]))
        model.base_model.set_adapter("a")
        before, trained = logits(model), [p.requires_grad for p in model.parameters()]
        model.merge_adapter(adapter_names=names)
        assert relative_error(logits(model), wanted) < 1e-12
        merged = model.base_model.model.model.layers[0].self_attn.q_proj.merged_adapters
        assert sorted(merged) == sorted(names or ["a"])
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        for other in {"a", "b"} - {*merged} or ["a"] * (len(merged) > 1):
            with pytest.raises(ValueError, match="is merged into the weights"):
                layer.set_adapter(other)
        model.unmerge_adapter()
        assert model.active_adapters == ["a"] and torch.equal(logits(model), before)
        assert [p.requires_grad for p in model.parameters()] == trained
        plain = model.merge_and_unload(adapter_names=names)
        assert relative_error(logits(plain), wanted) < 1e-12
        assert plain.state_dict().keys() == llama().state_dict().keys()

    def test_each_is_saved_from_peft_as_peft_does(self, tmp_path: Path) -> None:
        model = of_peft("input")
        model.base_model.set_adapter(["a", "b"])
        model.save_pretrained(tmp_path / "all")
        model.save_pretrained(tmp_path / "some", selected_adapters=["b"])
        again = PeftModel.from_pretrained(llama().double(), tmp_path / "all" / "a", adapter_name="a")
        again.load_adapter(tmp_path / "some" / "b", "b")
        again.base_model.set_adapter(["a", "b"])
        assert torch.equal(logits(again.eval()), logits(model))
        assert sorted(path.name for path in (tmp_path / "some").iterdir() if path.is_dir()) == ["b"]

    def test_each_is_saved_and_exported_by_its_name(self, tmp_path: Path) -> None:
        model = set_adapter(two("block", "none"), ["b", "a"])
        before, trained = logits(model), [name for name, p in model.named_parameters() if p.requires_grad]
        for name in "ab":
            save_adapter(model, tmp_path / name, adapter_name=name)
            export_peft(model, tmp_path / f"peft_{name}", adapter_name=name)
        assert adapter_names(model) == ["b", "a"] and torch.equal(logits(model), before)
        assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
        for name in "ab":
            wanted = logits(set_adapter(model, name))
            assert torch.equal(logits(load_adapter(llama().double(), tmp_path / name)), wanted)
            assert relative_error(
                logits(PeftModel.from_pretrained(llama().double(), tmp_path / f"peft_{name}")), wanted
            ) < 1e-12  # fmt: skip
        with pytest.raises(ValueError, match="must be one of"):
            save_adapter(model, tmp_path / "c", adapter_name="c")
        set_adapter(model, ["a", "b"])
        for one in (save_adapter, export_peft):
            with pytest.raises(ValueError, match="where there is an adapter_name="):
                one(model, tmp_path / "x")

    @pytest.mark.parametrize("pair", [("none", "input"), ("middle", "none")])
    def test_what_is_fitted_is_refused_by_name(self, pair: tuple[str, str]) -> None:
        adapter, shortcut = ("b", "input") if pair[1] == "input" else ("a", "middle")
        model, peft = set_adapter(two(*pair), ["a", "b"]), of_peft(shortcut)
        before = logits(model)
        with pytest.raises(
            ValueError, match=rf"of adapter '{adapter}' has shortcut='{shortcut}'.*add_weighted_adapter"
        ):
            merge_reslora(model, calibration=[BATCH])
        assert torch.equal(logits(model), before)
        peft.base_model.set_adapter("b")
        with pytest.raises(ValueError, match=f"has shortcut='{shortcut}'"):
            peft.merge_adapter(["a", "b"])
        assert (
            peft.active_adapters == ["b"]
            and relative_error(logits(peft), logits(set_adapter(two(shortcut), "b"))) < 1e-12
        )

    def test_a_weighted_sum_leaves_all_in_force(self) -> None:
        model = set_adapter(two(), ["a", "b"])
        wanted = logits(model)
        add_weighted_adapter(model, ["a", "b"], [1, 1], "sum", "cat")
        assert adapter_names(model)[:2] == ["a", "b"] and torch.equal(logits(model), wanted)
        assert relative_error(logits(set_adapter(model, "sum")), wanted) < 1e-12


def disabled(model: nn.Module) -> None:
    with disable_adapter(model):
        pass


class TestUnload:
    @pytest.mark.parametrize("shortcut", ["none", "input", "block", "middle"])
    def test_merged_is_plain_and_the_same(self, shortcut: str) -> None:
        model, twin = adapted(shortcut), adapted(shortcut)
        data = {} if shortcut in ("none", "block") else {"calibration": [BATCH]}
        merge_reslora(twin, **data)
        assert merge_and_unload(model, **data) is model
        assert_plain(model)
        assert torch.equal(logits(model), logits(twin))
        assert_plain(merge_and_unload(twin))

    def test_without_a_merge_the_base_is_back(self) -> None:
        model = unload(adapted("middle"))
        assert_plain(model)
        assert torch.equal(logits(model), logits(llama()))

    def test_can_be_adapted_again(self) -> None:
        model = apply_reslora(unload(adapted()), ResLoRAConfig(r=2, shortcut="input"))
        assert torch.equal(logits(model), logits(llama()))

    def test_adapters_set_aside_go_too(self) -> None:
        model = adapted()
        add_adapter(model, "other", ResLoRAConfig(r=2, shortcut="input"))
        assert len(adapter_names(model)) == 2
        assert_plain(unload(model))

    @pytest.mark.parametrize("merged", [False, True])
    def test_several_in_force_go_too(self, merged: bool) -> None:
        model = set_adapter(two("block"), ["b", "a"])
        before = logits(model) if merged else logits(llama().double())
        assert_plain(merge_and_unload(model) if merged else unload(model))
        assert relative_error(logits(model), before) < 1e-12

    def test_nan_is_refused_and_nothing_merged(self) -> None:
        model = adapted()
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.lora_B[0, 0] = float("nan")
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj"):
            merge_and_unload(model)
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name].nan_to_num(), value.nan_to_num()) for name, value in before.items())

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match="no ResLoRA adapters"):
            unload(llama())
        with pytest.raises(TypeError, match=r"nn\.Module"):
            unload("model")  # type: ignore[arg-type]
        model = adapted()
        with collect_statistics(model), pytest.raises(RuntimeError, match="statistics"):
            unload(model)
        with collect_statistics(model), pytest.raises(RuntimeError, match="statistics"):
            merge_and_unload(model)
        assert not any(layer.merged for layer in model.modules() if isinstance(layer, ResLoRALinear))
        merge_reslora(model)
        with pytest.raises(ValueError, match=r"merged already.*method"):
            merge_and_unload(model, method="weights")

    @pytest.mark.parametrize("kind", ["load_in_4bit", "load_in_8bit"])
    def test_dequantised_weights_stay_and_load_again(self, kind: str, tmp_path: Path) -> None:
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

        sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=48)
        LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "base")
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=BitsAndBytesConfig(**{kind: True}), device_map="cpu"
        )
        randomize(apply_reslora(model, ResLoRAConfig(r=3, shortcut="none", target_modules=["q_proj", "up_proj"])))
        with pytest.raises(ValueError, match=r"q_proj.*quantised"):
            merge_and_unload(model)
        trained = logits(model)
        name, calls = "model.layers.1.self_attn.q_proj", []
        hook = model.get_submodule(name).register_forward_hook(lambda *_: calls.append(name))
        merge_and_unload(model, dequantize=True)
        assert type(model.get_submodule(name)) is nn.Linear
        assert relative_error(logits(model), trained) < 0.05
        assert calls == [name]
        hook.remove()
        model.save_pretrained(tmp_path / "merged")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", device_map="cpu")
        assert torch.equal(again.get_submodule(name).weight, model.get_submodule(name).weight)
        assert type(again.model.layers[1].self_attn.k_proj) is type(model.model.layers[1].self_attn.k_proj)
        assert relative_error(logits(again), trained) < 0.05


class TestStateDictWithoutAdapters:
    """How SentenceTransformerTrainer resumes: it loads the checkpoint's weights, which a plain model has read."""

    @pytest.mark.parametrize("strict", [True, False])
    def test_is_loaded_with_a_warning(self, strict: bool, tmp_path: Path) -> None:
        from transformers import AutoModelForCausalLM

        adapted().save_pretrained(tmp_path)
        checkpoint = AutoModelForCausalLM.from_pretrained(tmp_path)  # leaves the adapters' keys out
        fresh = apply_reslora(llama(), ResLoRAConfig(r=3))
        with pytest.warns(UserWarning, match="holds no adapters.*load_adapter"):
            fresh.load_state_dict(checkpoint.state_dict(), strict=strict)

    def test_inside_a_wrapper(self) -> None:
        model = nn.ModuleDict({"body": adapted()})
        with pytest.warns(UserWarning, match="holds no adapters"):
            model.load_state_dict({f"body.{key}": value for key, value in llama().state_dict().items()})

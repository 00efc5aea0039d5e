"""What others do to a model after it was adapted: it computes what it should, or its next use says what is wrong."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, prune

from reslora_kernels import (
    ResLoRAConfig,
    add_adapter,
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
    unload,
)
from reslora_kernels.adapt.record import adapted_layers
from reslora_kernels.files.adapter_format import WEIGHTS_NAME
from reslora_kernels.testing import relative_error
from reslora_kernels.training import ResLoRACallback

from .models import FAMILIES, denoised, llama, logits, randomize, unet

peft = pytest.importorskip("peft")

from reslora_kernels.peft import ResLoRAPeftConfig  # noqa: E402

TARGETS = ["q_proj", "v_proj"]
CHAINS = ["none", "input", "block", "middle"]


def native(shortcut: str) -> Any:
    return randomize(apply_reslora(llama(), ResLoRAConfig(r=4, target_modules=TARGETS, shortcut=shortcut)))


def held_by_peft(shortcut: str) -> Any:
    return randomize(peft.get_peft_model(llama(), ResLoRAPeftConfig(r=4, target_modules=TARGETS, shortcut=shortcut)))


def for_quantisation_aware_training(model: nn.Module) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    qat = pytest.importorskip("torchao.quantization.qat")
    weights = qat.IntxFakeQuantizeConfig(torch.int8, group_size=8)
    quantization.quantize_(model, qat.QATConfig(weight_config=weights, step="prepare"))


def to_float8(model: nn.Module) -> None:
    float8 = pytest.importorskip("torchao.float8")
    config = float8.Float8LinearConfig(emulate=True)
    float8.convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: "layers.1" in name)


class TestReplacedLayers:
    """Adapted layers are torch.nn.Linear, too, and conversions take all of these."""

    @pytest.mark.parametrize("shortcut", ["none", "input", "block"])
    @pytest.mark.parametrize("make", [native, held_by_peft])
    @pytest.mark.parametrize("convert", [for_quantisation_aware_training, to_float8])
    def test_the_next_use_says_so(self, convert: Any, make: Any, shortcut: str, tmp_path: Path) -> None:
        model = make(shortcut)
        convert(model)
        method: Any = "weights" if shortcut == "input" else None
        uses: list[Callable[[], Any]] = [
            lambda: logits(model), lambda: inspect(model), lambda: merge_reslora(model, method),
            lambda: save_adapter(model, tmp_path) if make is native else model.save_pretrained(tmp_path),
        ]  # fmt: skip
        for use in uses:
            with pytest.raises(ValueError, match=r"_proj' was adapted and is gone: a F\w+Linear is in its place"):
                use()
        assert not list(tmp_path.glob("*.safetensors"))

    def test_a_weight_that_is_quantised_then(self) -> None:
        quantization = pytest.importorskip("torchao.quantization")
        model = native("block")
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        with pytest.raises(ValueError, match=r"_proj' was adapted, then its weight was quantised \(Int8Tensor\)"):
            logits(model)

    def test_a_layer_in_a_wrapper_goes_on(self) -> None:
        model = native("block")
        expected = logits(model)
        attention = model.model.layers[1].self_attn
        attention.q_proj = checkpoint_wrapper(attention.q_proj)
        assert torch.equal(logits(model), expected)

    @pytest.mark.parametrize(
        "change",
        [lambda layer: prune.l1_unstructured(layer, "weight", 0.5), parametrizations.weight_norm],
        ids=["pruned", "weight norm"],
    )
    def test_a_weight_that_is_computed_then(self, change: Any, tmp_path: Path) -> None:
        """What a merge writes there would be gone at the next forward."""
        model = native("block")
        change(model.model.layers[1].self_attn.v_proj)
        for use in (lambda: merge_reslora(model), lambda: save_adapter(model, tmp_path)):
            with pytest.raises(ValueError, match=r"'weight' of layer '.*v_proj' is computed in each forward"):
                use()


class TestBlocks:
    """Depth pruned, blocks repeated or put in another order after adapting."""

    def changed(self, model: Any, order: list[int] | None) -> Any:
        inner = model.base_model.model.model if isinstance(model, peft.PeftModel) else model.model
        blocks = list(inner.layers)
        kept = [*blocks, copy.deepcopy(blocks[-1])] if order is None else [blocks[i] for i in order]
        inner.layers = nn.ModuleList(kept)
        inner.config.num_hidden_layers = len(kept)
        return model

    @pytest.mark.parametrize("make", [native, held_by_peft])
    @pytest.mark.parametrize("shortcut", CHAINS)
    def test_a_copy_is_refused(self, make: Any, shortcut: str, tmp_path: Path) -> None:
        model = self.changed(make(shortcut), None)
        with pytest.raises(ValueError, match=r"layers\.3.*is a copy of an adapted one"):
            logits(model)
        if make is native:
            with pytest.raises(ValueError, match=r"layers\.3.*is a copy of an adapted one"):
                merge_reslora(model, calibration=[])

    @pytest.mark.parametrize("make", [native, held_by_peft])
    @pytest.mark.parametrize("order", [[0, 2], [0, 2, 1], [1, 2], [0, 1]])
    def test_others_are_right_or_refused(self, make: Any, order: list[int], tmp_path: Path) -> None:
        """Where layers read others, whatever is written says so; PEFT's files hold no chains."""
        batch = FAMILIES["llama"].batch(5) | {"use_cache": False}  # its blocks know their numbers in the cache
        for shortcut in ("none", "block", "input"):
            model = self.changed(make(shortcut), order)
            if shortcut != "none" and (len(order) < 3 or make is held_by_peft):
                with pytest.raises(ValueError, match=r"is no longer in the model|was adapted and is"):
                    logits(model)
                continue
            expected = logits(model, batch)
            folder = tmp_path / shortcut
            if make is held_by_peft:
                model.save_pretrained(folder)
                again = peft.PeftModel.from_pretrained(self.changed(llama(), order), folder)
            elif len(order) == 3:
                save_adapter(model, folder)
                again = load_adapter(self.changed(llama(), order), folder)
            else:
                with pytest.raises(ValueError, match="was adapted and is gone"):
                    save_adapter(model, folder)
                continue
            torch.testing.assert_close(logits(again, batch), expected)


@pytest.mark.parametrize("changes", [{}, {"gates": "rank"}, {"use_dora": True}])
def test_memory_that_to_empty_gives_is_no_adapter(changes: dict[str, Any]) -> None:
    """A model adapted on the meta device, then given memory and its base's weights: it begins as that base."""
    with torch.device("meta"):
        model = llama()
    apply_reslora(model, ResLoRAConfig(r=4, target_modules=TARGETS, **changes)).to_empty(device="cpu")
    base = llama()
    model.load_state_dict(base.state_dict())
    for name, buffer in base.named_buffers():
        model.get_buffer(name).copy_(buffer)
    if "use_dora" in changes:  # whose start is made of the weight
        assert logits(model).isnan().all()
    else:
        assert torch.equal(logits(model), logits(base))


class TestWhatTrainsBeside:
    """It is in no base checkpoint, whether it still trains when it is saved or not."""

    @pytest.mark.parametrize(
        "changes",
        [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 5]}, {}],
        ids=["a module", "tokens", "by hand"],
    )
    def test_is_saved_when_it_is_frozen(self, changes: dict[str, Any], tmp_path: Path) -> None:
        base = llama()
        model = apply_reslora(base, ResLoRAConfig(r=4, target_modules=TARGETS, **changes)).train()
        model.model.norm.requires_grad_(not changes)
        model(**FAMILIES["llama"].batch(5)).logits.square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.rand_like(parameter))
        model.requires_grad_(False)
        save_adapter(model, tmp_path)
        loaded = load_adapter(llama(), tmp_path)
        assert torch.equal(logits(loaded.eval()), logits(model.eval()))

    def test_is_saved_though_unfrozen_for_some_steps_only(self, tmp_path: Path) -> None:
        model = apply_reslora(llama(), ResLoRAConfig(r=4, target_modules=TARGETS)).train()
        for module in (None, model.lm_head, model.model.norm):
            if module is not None:
                module.requires_grad_(True)
            model(**FAMILIES["llama"].batch(5)).loss.backward()
            if module is model.lm_head:
                with torch.no_grad():
                    module.weight.mul_(-1)
            model.requires_grad_(False)
            for layer in adapted_layers(model).values():
                layer.lora_A.requires_grad_(True)
        save_adapter(model, tmp_path)
        assert torch.equal(logits(load_adapter(llama(), tmp_path).eval()), logits(model.eval()))
        names = {name for name in load_file(tmp_path / WEIGHTS_NAME) if "lora_" not in name}
        assert names == {"lm_head.weight"}  # the norm was tried, and is as it was

    @pytest.mark.parametrize("how", ["fused", "data", "evaluation", "copy", "average"])
    def test_is_saved_however_it_changed(self, how: str, tmp_path: Path) -> None:
        """Fused optimizers and writes to ``data`` leave a version as it was; averages never train."""
        model = apply_reslora(llama(), ResLoRAConfig(r=4, target_modules=TARGETS)).train(how != "evaluation")
        average = torch.optim.swa_utils.AveragedModel(model)
        norm = model.model.norm.requires_grad_(True)
        optimizer = torch.optim.AdamW([*norm.parameters()], lr=0.5, fused=how == "fused")
        model(**FAMILIES["llama"].batch(5)).loss.backward()
        if how == "data":
            norm.weight.data.sub_(norm.weight.grad)
        else:
            optimizer.step()
        average.update_parameters(model)
        norm.requires_grad_(False)
        trained = {"copy": copy.deepcopy(model), "average": average}.get(how, model).eval()
        save_adapter(trained, tmp_path)
        assert not torch.equal(logits(trained), logits(llama()))
        assert torch.equal(logits(load_adapter(llama(), tmp_path).eval()), logits(trained))

    def test_is_exported_whole_or_refused(self, tmp_path: Path) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.token, self.linear = nn.Parameter(torch.zeros(8)), nn.Linear(8, 8)

            def forward(self, x: Tensor) -> Tensor:
                y: Tensor = self.linear(x + self.token)
                return y

        model = apply_reslora(Model(), ResLoRAConfig(target_modules=["linear"]))
        model.token.requires_grad_(True)
        with pytest.raises(ValueError, match=r"saves whole modules, but of trained '' \['linear"):
            export_peft(model, tmp_path)

    def test_is_refused_where_it_is_outside_of_the_adapted_part(self, tmp_path: Path) -> None:
        model = nn.ModuleDict({"model": native("input"), "head": nn.Linear(4, 1)})
        with pytest.raises(ValueError, match=r"'head\.weight' trains beside the LlamaForCausalLM that was adapted"):
            save_adapter(model, tmp_path)
        save_adapter(model.requires_grad_(False), tmp_path)
        with pytest.raises(ValueError, match=r"holds 2 adapted models.* model\.model or model\.other"):
            save_adapter(nn.ModuleDict({"model": model["model"], "other": native("none")}), tmp_path)
        both = apply_reslora(llama(), ResLoRAConfig(target_modules=["layers.0.self_attn.q_proj"]))
        apply_reslora(both.model.layers[1], ResLoRAConfig(target_modules=["q_proj"]))
        with pytest.raises(ValueError, match=r"merge_and_unload\(model\.get_submodule\('model\.layers\.1'\)\)"):
            save_adapter(both, tmp_path)

    @pytest.mark.parametrize("trains", [True, False], ids=["trains", "inference"])
    def test_is_exported_from_peft(self, trains: bool, tmp_path: Path) -> None:
        config = ResLoRAPeftConfig(r=4, target_modules=TARGETS, shortcut="block", modules_to_save=["lm_head"])
        model = randomize(peft.get_peft_model(llama(), config))
        with torch.no_grad():
            model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(-2)
        expected = logits(model)
        model.save_pretrained(tmp_path / "own")
        model = peft.PeftModel.from_pretrained(llama(), tmp_path / "own", is_trainable=trains)
        export_peft(model, tmp_path / "lora")
        assert relative_error(logits(peft.PeftModel.from_pretrained(llama(), tmp_path / "lora")), expected) < 1e-5

    def test_adapters_among_the_weights_are_said(self, tmp_path: Path) -> None:
        model = native("block")
        with pytest.warns(UserWarning, match="save_pretrained writes the adapters among the weights"):
            model.save_pretrained(tmp_path)
        with pytest.raises(FileNotFoundError, match="It holds a whole model"):
            load_adapter(llama(), tmp_path)
        merge_reslora(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model.save_pretrained(tmp_path)


def replica(module: nn.Module) -> nn.Module:
    """What nn.DataParallel makes of a module, but for its parameters on another device."""
    copied = module._replicate_for_data_parallel()
    copied._modules = {name: child if child is None else replica(child) for name, child in module._modules.items()}
    return copied


@pytest.mark.parametrize("shortcut", ["input", "block"])
def test_data_parallel_copies_are_refused(shortcut: str) -> None:
    with pytest.raises(ValueError, match=r"nn\.DataParallel makes copies .*torchrun"):
        logits(replica(native(shortcut)))


@pytest.mark.parametrize("make", [native, held_by_peft])
@pytest.mark.parametrize("shortcut", ["none", "block", "middle"])
def test_recomputed_layers_run_with_the_adapter_that_they_ran_with(shortcut: str, make: Any) -> None:
    model = make(shortcut).train()
    if make is native:
        add_adapter(model, "other", ResLoRAConfig(r=2, target_modules=TARGETS, shortcut=shortcut))
    else:
        model.add_adapter("other", ResLoRAPeftConfig(r=2, target_modules=TARGETS, shortcut=shortcut))
    switch: Any = (lambda name: set_adapter(model, name)) if make is native else model.set_adapter
    model.gradient_checkpointing_enable({"use_reentrant": False})
    switch("default")
    loss = model(**FAMILIES["llama"].batch(5)).logits.square().mean()
    switch("other")
    with pytest.raises(RuntimeError, match="another adapter in force: call backward before set_adapter"):
        loss.backward(retain_graph=True)
    switch("default")
    loss.backward()


def test_statistics_are_free_after_a_step_that_was_cut_off(tmp_path: Path) -> None:
    """As ``auto_find_batch_size`` does when memory is short, and whoever interrupts a notebook's cell."""
    transformers = pytest.importorskip("transformers")
    model, callback = native("input"), ResLoRACallback()
    args, state = transformers.TrainingArguments(str(tmp_path), use_cpu=True), transformers.TrainerState()
    for _ in range(2):
        callback.on_train_begin(args, state, None, model=model)
        callback.on_step_begin(args, state, None, model=model)
    callback.detach()
    with collect_statistics(model):
        logits(model)


@pytest.mark.parametrize("shortcut", ["none", "block"])
def test_lora_around_an_adapted_layer(shortcut: str, tmp_path: Path) -> None:
    """It computes their sum; a save of either alone would fit no model."""
    model = native(shortcut)
    expected = logits(model)
    both = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    with both.disable_adapter():
        assert torch.equal(logits(both), expected)
    assert not torch.equal(logits(both), expected)
    layer = both.base_model.model.model.layers[0].self_attn.v_proj
    x = torch.randn(1, 3, 32)
    assert (
        relative_error(layer(x) - layer.base_layer(x), 4 * layer.lora_B["default"](layer.lora_A["default"](x))) < 1e-5
    )
    with pytest.raises(ValueError, match=r"is inside a peft\.tuners\.lora\.layer\.Linear now"):
        save_adapter(model, tmp_path)
    save_adapter(both.unload(), tmp_path)
    assert any(tmp_path.iterdir())


class TestScale:
    """PEFT's and diffusers' factor on what an adapter adds: of s, so of every shortcut."""

    def scaled(self, shortcut: str, factor: float) -> Any:
        config = ResLoRAPeftConfig(r=3, lora_alpha=6 * factor, target_modules=["to_q", "to_v"], shortcut=shortcut)
        model = unet()
        model.add_adapter(config)
        return randomize(model)

    @pytest.mark.parametrize("shortcut", CHAINS)
    def test_of_a_forward_and_for_good(self, shortcut: str) -> None:
        model, whole = self.scaled(shortcut, 1), denoised(self.scaled(shortcut, 1))
        for factor, expected in ((0.5, denoised(self.scaled(shortcut, 0.5))), (0.0, denoised(unet()))):
            assert relative_error(denoised(model, cross_attention_kwargs={"scale": factor}), expected) < 1e-5
            assert torch.equal(denoised(model), whole)
            model.set_adapters("default", factor)
            assert relative_error(denoised(model), expected) < 1e-5
            model.set_adapters("default")
        assert torch.equal(denoised(model), whole)

    @pytest.mark.parametrize("weights", [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (0.5, 2.0)])
    def test_of_a_sum(self, weights: tuple[float, float]) -> None:
        """The parts of one adapter's chain do not see the other's, so the outputs of one linear layer add up."""
        torch.manual_seed(0)
        x, base = torch.randn(5, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

        def with_adapters(*names: str) -> Any:
            model: Any = None
            for name in names:
                config = ResLoRAPeftConfig(r=2, target_modules=["0"], shortcut="none")
                if model is None:
                    model = peft.get_peft_model(nn.Sequential(*base), config, adapter_name=name)
                else:
                    model.add_adapter(name, config)
            return randomize(model)

        model = with_adapters("one", "two")
        model.base_model.set_adapter(["one", "two"])
        layer = model.base_model.model[0]
        frozen, parts = layer.base_layer(x), []
        for name, weight in zip(("one", "two"), weights, strict=True):
            own = layer.reslora_adapter[name]
            parts.append(own.scaling * x @ own.lora_A.T @ own.lora_B.T)
            layer.set_scale(name, weight)
        expected = frozen + weights[0] * parts[0] + weights[1] * parts[1]
        assert relative_error(layer(x), expected) < 1e-5

    def test_merged_as_scaled(self) -> None:
        model = held_by_peft("block")
        for layer in model.modules():
            if hasattr(layer, "set_scale"):
                layer.set_scale("default", 0.25)
        expected = logits(model)
        assert relative_error(logits(model.merge_and_unload()), expected) < 1e-5


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("disable_lora", ()), ("set_adapters", ("default", 0.5)), ("fuse_lora", (0.5,))],
)
def test_switches_of_diffusers_refuse_a_native_adapter(name: str, arguments: tuple[Any, ...]) -> None:
    """They would return and leave it in force."""
    model = randomize(apply_reslora(unet(), ResLoRAConfig(r=3, target_modules=["to_q", "to_v"])))
    expected = denoised(model)
    with pytest.warns(UserWarning, match="unload_lora is for adapters that PEFT holds"):
        model.unload_lora()  # a pipeline calls it on all its parts
    add_adapter(model, "other", ResLoRAConfig(r=3, target_modules=["to_q"]))
    delete_adapter(model, "other")  # and its own is still watched
    with pytest.raises(ValueError, match=f"{name} is for adapters that PEFT holds.*disable_adapter"):
        getattr(model, name)(*arguments)
    with pytest.raises(ValueError, match=r"cross_attention_kwargs: scale=0\.5 is for adapters that PEFT holds"):
        denoised(model, cross_attention_kwargs={"scale": 0.5})
    assert torch.equal(denoised(model, cross_attention_kwargs={"scale": 1.0}), expected)
    with disable_adapter(model):
        assert torch.equal(denoised(model, cross_attention_kwargs={"scale": 0.0}), denoised(unet()))
    own = unload(model)
    assert "disable_lora" not in vars(own)


def test_switches_of_diffusers_are_its_own_for_lora_beside() -> None:
    model = randomize(apply_reslora(unet(), ResLoRAConfig(r=3, target_modules=["to_q", "to_v"])))
    expected: Tensor = denoised(model)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False))
    assert not torch.equal(denoised(model), expected)
    model.disable_lora()
    assert torch.equal(denoised(model), expected)

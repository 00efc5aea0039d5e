"""Bases that are quantised, or offloaded and cast by hooks: what ResLoRA does on plain ones, or refused by name."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file as load
from torch import Tensor, nn
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup
from transformers.integrations.finegrained_fp8 import FP8Linear, _dequantize_fp8_weight

from reslora_kernels import (
    ResLoRAConfig,
    ResLoRALinear,
    add_adapter,
    apply_reslora,
    export_peft,
    inspect,
    load_adapter,
    merge_reslora,
    save_adapter,
    set_adapter,
    shard_reslora,
    unmerge_reslora,
)
from reslora_kernels.adapt.record import adapted_layers
from reslora_kernels.layers.quantized_linear import QuantizedResLoRALinear
from reslora_kernels.quantizers import BitsAndBytes, QuantizedWeight
from reslora_kernels.testing import relative_error

from .models import FAMILIES, llama, logits, randomize

accelerate = pytest.importorskip("accelerate")
ROUNDING = 1e-5  # float32; the same sums in another order
SHORTCUTS = ("none", "input", "block", "middle")
BATCH = FAMILIES["llama"].batch(5)
TARGETS = ("q_proj", "v_proj", "up_proj", "down_proj")


def _replaced(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """The model with other layers in the place of those that the tests adapt."""
    for name, linear in list(model.named_modules()):
        if type(linear) is nn.Linear and name.endswith(TARGETS):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, make(linear))
    return model.requires_grad_(False)


def _with_bitsandbytes(model: nn.Module, make: Callable[[nn.Linear], nn.Linear]) -> nn.Module:
    def quantized(linear: nn.Linear) -> nn.Module:
        layer = make(linear)
        layer.load_state_dict(linear.state_dict())
        return layer.to("cpu")

    return _replaced(model, quantized)


def four_bits(kind: str) -> Callable[[nn.Module], nn.Module]:
    def make(linear: nn.Linear) -> nn.Linear:
        n, k = linear.weight.shape
        return bitsandbytes.nn.Linear4bit(k, n, bias=False, compute_dtype=torch.float32, quant_type=kind)

    return lambda model: _with_bitsandbytes(model, make)


def with_hqq(model: nn.Module) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    how = BaseQuantizeConfig(nbits=4, group_size=8)
    return _replaced(model, lambda linear: HQQLinear(linear, how, compute_dtype=torch.float32, device="cpu"))


def with_quanto(model: nn.Module) -> nn.Module:
    from optimum.quanto import freeze, qint8, quantize

    quantize(model, weights=qint8, include=[f"*{name}" for name in TARGETS])
    freeze(model)
    return model.requires_grad_(False)


def with_gptq(model: nn.Module) -> nn.Module:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    def quantized(linear: nn.Linear) -> nn.Module:
        n, k = linear.weight.shape
        layer = TorchLinear(
            bits=4, group_size=16, sym=True, desc_act=False, in_features=k, out_features=n, bias=False,
            pack_dtype=torch.int32, register_buffers=True,
        )  # fmt: skip
        layer.qweight.random_(-(2**31), 2**31 - 1)
        layer.qzeros.fill_(0x77777777)
        layer.scales.fill_(0.02)
        layer.post_init()
        return layer

    return _replaced(model, quantized)


LIBRARIES = {"hqq": "hqq", "quanto": "optimum", "gptq": "gptqmodel", "awq": "gptqmodel"}


def with_awq(model: nn.Module) -> nn.Module:
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    def quantized(linear: nn.Linear) -> nn.Module:
        n, k = linear.weight.shape
        layer = AwqTorchLinear(
            bits=4, group_size=16, sym=True, desc_act=False, in_features=k, out_features=n, bias=False,
            register_buffers=True,
        )  # fmt: skip
        layer.qweight.random_(-(2**31), 2**31 - 1)
        layer.qzeros.fill_(0x77777777)
        layer.scales.fill_(0.02)
        layer.post_init()
        return layer

    return _replaced(model, quantized)


def missing(kind: str) -> Any:
    """A mark for what is quantised by a library that is not here."""
    library = LIBRARIES.get(kind, "torch")
    return pytest.mark.skipif(importlib.util.find_spec(library) is None, reason=f"{library} is not installed")


def eight_bits(model: nn.Module) -> nn.Module:
    def make(linear: nn.Linear) -> nn.Linear:
        n, k = linear.weight.shape
        return bitsandbytes.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False)

    return _with_bitsandbytes(model, make)


def with_torchao(config: Any) -> Callable[[nn.Module], nn.Module]:
    def quantize(model: nn.Module) -> nn.Module:
        quantize_(model, config, filter_fn=lambda module, name: name.endswith(TARGETS))
        return model

    return quantize


def float8(block: tuple[int, int] | None) -> Callable[[nn.Module], nn.Module]:
    """Transformers' layer, with a scale for each block of a weight or one for all of it."""

    def quantized(linear: nn.Linear) -> nn.Module:
        (n, k), weight = linear.weight.shape, linear.weight.detach()
        rows, columns = block or (n, k)
        layer = FP8Linear(k, n, block_size=block)
        scales = torch.nn.functional.max_pool2d(weight.abs()[None], (rows, columns), ceil_mode=True)[0] / 448
        whole = scales.repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k]
        layer.weight = nn.Parameter((weight / whole).to(torch.float8_e4m3fn), requires_grad=False)
        layer.weight_scale_inv = nn.Parameter(scales if block else scales[0, 0])
        return layer

    return lambda model: _replaced(model, quantized)


KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "nf4": four_bits("nf4"),
    "fp4": four_bits("fp4"),
    "llm.int8": eight_bits,
    "torchao int8": with_torchao(Int8WeightOnlyConfig()),
    "torchao int4": with_torchao(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16))),
    "torchao float8": with_torchao(Float8WeightOnlyConfig()),
    "fp8 in blocks": float8((12, 20)),
    "hqq": with_hqq,
    "quanto": with_quanto,
    "gptq": with_gptq,
    "awq": with_awq,
}
each_kind = pytest.mark.parametrize("kind", [pytest.param(kind, marks=missing(kind)) for kind in KINDS])


@pytest.fixture(autouse=True)
def same_on_every_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """With AVX-512 bfloat16 bitsandbytes repacks 4-bit weights to one that layers this small do not have."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


def config(shortcut: str = "block", **changes: Any) -> ResLoRAConfig:
    return ResLoRAConfig(**({"r": 4, "shortcut": shortcut, "pre_num": 2, "target_modules": TARGETS} | changes))


def adapted(kind: str, shortcut: str = "block", **changes: Any) -> nn.Module:
    return randomize(apply_reslora(KINDS[kind](llama()), config(shortcut, **changes)))


def dense_base(kind: str) -> nn.Module:
    """The same base model with the values that the quantised one stands for."""
    model, quantized = llama(), KINDS[kind](llama())
    for name, linear in quantized.named_modules():
        if name.endswith(TARGETS):
            model.get_submodule(name).weight.data.copy_(QuantizedWeight(linear).unpacked(torch.float32))
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model(**BATCH).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@each_kind
def test_computes_what_it_does_on_the_dequantised_weights(kind: str, shortcut: str) -> None:
    model, dense = adapted(kind, shortcut), randomize(apply_reslora(dense_base(kind), config(shortcut)))
    assert all(isinstance(layer, QuantizedResLoRALinear) for layer in adapted_layers(model).values())
    assert relative_error(logits(model), logits(dense)) < ROUNDING
    own, expected = gradients(model), gradients(dense)
    assert own.keys() == expected.keys() and len(own) == 2 * len(adapted_layers(model))
    assert all(relative_error(own[name], expected[name]) < ROUNDING for name in own)


@each_kind
def test_at_the_start_it_is_the_base_model(kind: str) -> None:
    """LLM.int8 rounds activations, ResLoRA does not; torchao may multiply in another order."""
    model = apply_reslora(KINDS[kind](llama()), config())
    base = dense_base(kind) if kind == "fp8 in blocks" else KINDS[kind](llama())  # whose own kernels are a GPU's
    assert relative_error(logits(model), logits(base)) < (
        0.1 if kind in ("llm.int8", "torchao float8", "awq") else 1e-5
    )


@each_kind
def test_no_dequantised_weight_outlives_its_pass(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One at a time in forward and in backward, twice per layer in all, and none among what autograd saves."""
    import weakref

    model = adapted(kind, "middle")
    alive: list[weakref.ref[Tensor]] = []
    unpacked = QuantizedWeight.unpacked

    def watched(self: QuantizedWeight, dtype: torch.dtype) -> Tensor:
        assert not any(earlier() is not None for earlier in alive)
        weight = unpacked(self, dtype)
        alive.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(QuantizedWeight, "unpacked", watched)
    loss = model(**BATCH).loss
    assert not any(weight() is not None for weight in alive)
    loss.backward()
    assert not any(weight() is not None for weight in alive)
    assert len(alive) == 2 * len(adapted_layers(model))


def test_memory_of_a_layer() -> None:
    """NF4: 4 bits for each weight and 32 for each block of 64; the adapter in float32; nothing of W's own size."""
    linear = bitsandbytes.nn.Linear4bit(512, 256, bias=False, compress_statistics=False, quant_type="nf4").to("cpu")
    layer = QuantizedResLoRALinear.from_linear(linear, ResLoRAConfig(r=8))
    held = sum(p.numel() * p.element_size() for p in layer.parameters())
    state = linear.weight.quant_state
    held += state.absmax.numel() * state.absmax.element_size()
    assert held == 256 * 512 // 2 + 256 * 512 // 64 * 4 + 8 * (512 + 256) * 4


@each_kind
def test_merging_keeps_the_adapter_apart_or_dequantises(kind: str) -> None:
    model = adapted(kind, "block")
    expected = logits(model)
    with pytest.raises(ValueError, match=r"layer 'model\.layers\.0\.\w+\.\w+' has a quantised weight"):
        merge_reslora(model)
    assert torch.equal(logits(model), expected)
    report = merge_reslora(model, dequantize=True)
    assert {row.rank for row in report.rows} == {4, 8, 12}
    merged = logits(model)
    assert relative_error(merged, expected) < (
        5e-3 if kind in ("llm.int8", "gptq", "awq") else 1e-5
    )  # they merge in float16
    unmerge_reslora(model)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("kind", ["nf4", "torchao int8"])
def test_saved_copied_exported_and_switched(kind: str, tmp_path: Path) -> None:
    model = adapted(kind, "block")
    expected = logits(model)
    save_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(load_adapter(KINDS[kind](llama()), tmp_path / "adapter")), expected)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert "block" in str(inspect(model))
    export_peft(model, tmp_path / "peft")
    served = PeftModel.from_pretrained(KINDS[kind](llama()), tmp_path / "peft")
    assert relative_error(logits(served), expected) < 1e-5
    add_adapter(model, "other", config("middle", init_lora_weights="pissa"))
    assert relative_error(logits(set_adapter(model, "other")), logits(KINDS[kind](llama()))) < 1e-5
    assert torch.equal(logits(set_adapter(model, "default")), expected)


def test_autocast_and_half_precision_inputs() -> None:
    model = adapted("nf4", "middle").train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**BATCH).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    layer = next(iter(adapted_layers(adapted("nf4", "none")).values()))
    assert layer(torch.randn(3, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_plain_checkpoint_of_the_adapters_loads(tmp_path: Path) -> None:
    model, other = adapted("nf4"), apply_reslora(KINDS["nf4"](llama()), config())
    other.load_state_dict({key: value for key, value in model.state_dict().items() if "lora_" in key}, strict=False)
    assert torch.equal(logits(other), logits(model))


def test_refused() -> None:
    with pytest.raises(TypeError, match="must hold a quantised weight, got Linear"):
        QuantizedResLoRALinear.from_linear(nn.Linear(8, 8), ResLoRAConfig())
    with pytest.raises(TypeError, match=r"must be an nn\.Linear with a plain weight, got Linear4bit"):
        ResLoRALinear.from_linear(bitsandbytes.nn.Linear4bit(64, 64), ResLoRAConfig())
    with pytest.raises(ValueError, match="is quantised by bitsandbytes and cannot be cut"):
        shard_reslora(adapted("llm.int8"), [])
    with pytest.raises(RuntimeError, match="not quantised yet: move the model to its device"):
        BitsAndBytes().dequantize(bitsandbytes.nn.Linear4bit(64, 64))


def test_weights_that_an_evaluation_on_the_cpu_has_packed_are_read_right() -> None:
    """On a CPU with AVX512-BF16 bitsandbytes reorders a 4-bit weight at its first evaluation, rounding its scales."""
    torch.manual_seed(0)
    linear = bitsandbytes.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    linear.load_state_dict(nn.Linear(128, 64, bias=False).state_dict())
    linear.to("cpu").eval()
    before = QuantizedWeight(linear).unpacked(torch.float32)
    with torch.no_grad():
        linear(torch.randn(3, 128))
    if linear.support_avx512bf16_for_cpu:
        assert linear.weight.quant_state.packing_format_for_cpu
    assert relative_error(QuantizedWeight(linear).unpacked(torch.float32), before) < 2**-7


@pytest.mark.parametrize("block", [None, (12, 20)], ids=["one scale", "blocks"])
def test_float8_is_read_as_transformers_reads_it(block: Any) -> None:
    layer: Any = float8(block)(llama()).get_submodule("model.layers.0.mlp.down_proj")
    found = QuantizedWeight(layer).unpacked(torch.float32)
    expected = _dequantize_fp8_weight(layer.weight, layer.weight_scale_inv, block, torch.float32)
    assert torch.equal(found, expected)
    assert relative_error(found, llama().get_submodule("model.layers.0.mlp.down_proj").weight) < 0.05


def test_float8_with_a_scale_for_each_row() -> None:
    from transformers.integrations.fbgemm_fp8 import FbgemmFp8Linear

    layer = FbgemmFp8Linear(6, 4, bias=False)
    layer.weight = nn.Parameter(torch.randn(4, 6).to(torch.float8_e4m3fn), requires_grad=False)
    layer.weight_scale = nn.Parameter(torch.rand(4, 1))
    model = randomize(apply_reslora(nn.Sequential(layer), ResLoRAConfig(r=2, shortcut="none")))
    adapter, x = next(iter(adapted_layers(model).values())), torch.randn(3, 6)
    expected = layer.weight.float() * layer.weight_scale + adapter.scaling * adapter.lora_B @ adapter.lora_A
    assert relative_error(model(x), x @ expected.T) < ROUNDING


def test_weights_of_4_bits_in_float8s_layer_are_refused() -> None:
    layer = FP8Linear(8, 8)
    layer.weight = nn.Parameter(torch.zeros(8, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="dequantize=True"):
        apply_reslora(nn.Sequential(layer), ResLoRAConfig(target_modules=["0"]))


def of_library(path: str, **attributes: Any) -> type[nn.Module]:
    """A linear layer of a class as a library has it, which is not installed here."""
    return type(path.rpartition(".")[2], (nn.Linear,), {"__module__": path.rpartition(".")[0], **attributes})


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gptqmodel.nn_modules.qlinear.marlin.MarlinLinear", r"backend=BACKEND.TORCH \(AWQ_TORCH\), which is read"),
        ("awq.modules.linear.gemm.WQLinear_GEMM", "whose weight awq holds quantised"),
        ("aqlm.inference.QuantizedLinear", "whose weight aqlm holds quantised, in a form that is not read"),
        ("eetq.modules.qlinear.W8A16Linear", "or in 8 bits by bitsandbytes"),
        ("optimum.quanto.nn.qlinear.QLinear", "quantise the weights alone"),
    ],
)
def test_what_is_not_read_is_refused_with_the_way_out(path: str, message: str) -> None:
    layer = of_library(path, activation_qtype="qint8")(8, 8)
    with pytest.raises(ValueError, match=message):
        apply_reslora(nn.Sequential(layer), ResLoRAConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match=r"matches (nothing|no linear layer)"):  # "all-linear" leaves it out
        apply_reslora(nn.Sequential(layer), ResLoRAConfig())


def test_a_bias_that_cannot_train_is_refused() -> None:
    layer: Any = of_library("hqq.core.quantize.HQQLinear")(8, 8)
    layer.W_q = layer._parameters.pop("weight")
    layer.bias = layer._parameters.pop("bias").detach()
    with pytest.raises(ValueError, match="bias='lora_only' would not train it"):
        apply_reslora(nn.Sequential(layer), ResLoRAConfig(target_modules=["0"], bias="lora_only"))


def test_compressed_tensors_are_refused_with_the_way_out() -> None:
    layer = nn.Linear(8, 8)
    layer.quantization_scheme = type("QuantizationScheme", (), {"__module__": "compressed_tensors.quantization"})()
    with pytest.raises(ValueError, match=r"CompressedTensorsConfig\(dequantize=True\)"):
        apply_reslora(nn.Sequential(layer), ResLoRAConfig(target_modules=["0"]))


X = torch.arange(2, 11)[None]


def offloadable(shortcut: str = "input") -> ResLoRAConfig:
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


def adapted_in_place(model: nn.Module, shortcut: str = "input") -> nn.Module:
    model = apply_reslora(model, offloadable(shortcut))
    torch.manual_seed(1)
    return randomize(model)


def gradients_of_tokens(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=X, labels=X).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("shortcut", ["none", "input", "block", "middle"])
@pytest.mark.parametrize("offload", [kept_on_cpu, kept_on_disk, kept_by_a_second_hook])
def test_an_offloaded_base_trains_as_one_in_memory(offload: Any, shortcut: str, tmp_path: Path) -> None:
    plain, offloaded = adapted_in_place(llama(), shortcut), adapted_in_place(offload(llama(), tmp_path), shortcut)
    expected, found = gradients_of_tokens(plain), gradients_of_tokens(offloaded)
    assert expected.keys() == found.keys() and expected
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, msg=name)
    assert all(m.weight.is_meta for m in offloaded.modules() if isinstance(m, ResLoRALinear))  # away again


@pytest.mark.parametrize("offload", [kept_on_cpu, kept_on_disk])
def test_an_offloaded_base_merges_saves_and_switches(offload: Any, tmp_path: Path) -> None:
    plain, offloaded = adapted_in_place(llama()), adapted_in_place(offload(llama(), tmp_path))
    before = offloaded(input_ids=X).logits
    merge_reslora(plain, "weights"), merge_reslora(offloaded, "weights")
    torch.testing.assert_close(offloaded(input_ids=X).logits, plain(input_ids=X).logits, rtol=0, atol=0)
    assert not torch.equal(offloaded(input_ids=X).logits, before)
    unmerge_reslora(offloaded)
    assert torch.equal(offloaded(input_ids=X).logits, before)
    save_adapter(offloaded, tmp_path / "adapter")
    again = load_adapter(offload(llama(), tmp_path / "again"), tmp_path / "adapter")
    assert torch.equal(again(input_ids=X).logits, before)
    add_adapter(offloaded, "other", offloadable("none"))
    set_adapter(offloaded, "other")
    assert torch.equal(offloaded(input_ids=X).logits, llama()(input_ids=X).logits)
    set_adapter(offloaded, "default")
    assert torch.equal(offloaded(input_ids=X).logits, before)


def test_a_dispatched_model_trains_and_saves_whole(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    llama().save_pretrained(tmp_path / "base")
    places = {"model.embed_tokens": "disk", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "disk", "model.layers.1": "cpu", "model.layers.2": "disk"}
    dispatched = adapted_in_place(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map=places, offload_folder=tmp_path / "away")
    )
    plain = adapted_in_place(llama())
    expected, found = gradients_of_tokens(plain), gradients_of_tokens(dispatched)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    dispatched.save_pretrained(tmp_path / "whole")
    state = {name: value for file in (tmp_path / "whole").glob("*.safetensors") for name, value in load(file).items()}
    for name, value in plain.state_dict().items():
        assert torch.equal(state[name], value), name


def test_weights_return_when_the_hooks_are_removed() -> None:
    model = adapted_in_place(kept_on_cpu(llama(), Path()))
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
    apply_reslora(model, offloadable())
    assert torch.equal(model(input_ids=X).logits, before)
    other = copy.deepcopy(model)
    randomize(model)
    assert torch.equal(other(input_ids=X).logits, before)


def replaced(model: Any) -> str:
    layer = model.model.layers[1].self_attn.q_proj
    layer.forward = lambda x: torch.zeros_like(x)
    return r"'model.layers.1.self_attn.q_proj' is replaced on the instance by tests.test_bases.replaced"


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
        apply_reslora(model, offloadable())
    assert {name: (id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()} == state


def test_trained_weights_are_not_offloaded() -> None:
    model = kept_on_cpu(llama(), Path())
    with pytest.raises(ValueError, match=r"'lm_head' would be trained.*accelerate offloads it"):
        apply_reslora(model, offloadable().replace(modules_to_save=["lm_head"]))


def test_diffusers_hooks_after_adapting() -> None:
    hooks = pytest.importorskip("diffusers.hooks")
    model = adapted_in_place(llama())
    before = model(input_ids=X).logits
    hooks.apply_group_offloading(model, torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(model(input_ids=X).logits, before)
    model = adapted_in_place(llama())
    cast = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32, "skip_modules_pattern": ["norm"]}
    with pytest.raises(ValueError, match=r"adapters are not held in 8 bits.*skip_modules_classes"):
        hooks.apply_layerwise_casting(model, **cast)
    model = adapted_in_place(llama())
    adapters = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    hooks.apply_layerwise_casting(model, **cast, skip_modules_classes=(ResLoRALinear,))
    assert torch.isfinite(model(input_ids=X).logits).all()
    assert all(torch.equal(p, adapters[name]) for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("shortcut", ["none", "input", "block", "middle"])
def test_adapters_that_go_away_with_the_weights_are_refused_where_they_would_not_train(shortcut: str) -> None:
    """huggingface/accelerate#3770, huggingface/accelerate#3785: training ran, and changed nothing."""
    model = kept_on_cpu(adapted_in_place(llama(), shortcut), Path())
    with pytest.raises(ValueError, match=r"cpu_offload.*first, then apply_reslora"):
        model(input_ids=X, labels=X)

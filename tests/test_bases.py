"""Bases that are quantised: what ResLoRA does on plain ones, or refused by name."""

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
from torch import Tensor, nn
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup
from transformers.integrations import finegrained_fp8
from transformers.integrations.finegrained_fp8 import FP8Linear

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
from reslora_kernels.adapt.targets import find_targets
from reslora_kernels.layers.quantized_linear import QuantizedResLoRALinear
from reslora_kernels.quantizers import BitsAndBytes, QuantizedWeight
from reslora_kernels.testing import relative_error

from .models import FAMILIES, llama, logits, randomize

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
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False, raising=False)  # 0.48 never does


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
    if getattr(linear, "support_avx512bf16_for_cpu", False):
        assert linear.weight.quant_state.packing_format_for_cpu
    assert relative_error(QuantizedWeight(linear).unpacked(torch.float32), before) < 2**-7


@pytest.mark.parametrize("block", [None, (12, 20)], ids=["one scale", "blocks"])
def test_float8_is_read_as_transformers_reads_it(block: Any) -> None:
    if not hasattr(finegrained_fp8, "_dequantize_fp8_weight"):
        pytest.skip("this version of Transformers dequantises elsewhere")
    layer: Any = float8(block)(llama()).get_submodule("model.layers.0.mlp.down_proj")
    found = QuantizedWeight(layer).unpacked(torch.float32)
    expected = finegrained_fp8._dequantize_fp8_weight(layer.weight, layer.weight_scale_inv, block, torch.float32)
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
    layer = FP8Linear(8, 8, block_size=(8, 8))
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


class Mixer(nn.Module):
    """As FalconMamba's: reads the weight of its projection, and runs it where that is quantised."""

    def __init__(self) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.zeros(64))
        self.dt_proj = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        if type(self.dt_proj.weight) is not nn.Parameter:
            return self.dt_proj(x)
        return x @ self.dt_proj.weight.T


def test_a_mixers_projection_is_adapted_where_it_is_quantised_only() -> None:
    model = nn.Sequential(Mixer(), Mixer())
    quantize_(model[1], Int8WeightOnlyConfig())
    assert list(find_targets(model, ResLoRAConfig(r=2)).matched) == ["1.dt_proj"]


def test_a_quantised_matrix_is_no_parameter_to_adapt() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    quantize_(model[0], Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match=r"matches '0\.weight', which is quantised"):
        find_targets(model, ResLoRAConfig(r=2, target_modules=["1"], target_parameters=["0.weight"]))

"""On a quantised base ResLoRA computes what it does on the dequantised weights, and keeps none of them."""

from __future__ import annotations

import copy
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

ROUNDING = 1e-5  # float32; the same sums in another order
SHORTCUTS = ("none", "input", "block", "middle")
BATCH = FAMILIES["llama"].batch(5)
TARGETS = ("q_proj", "v_proj", "up_proj", "down_proj")


def _with_bitsandbytes(model: nn.Module, make: Callable[[nn.Linear], nn.Linear]) -> nn.Module:
    for name, linear in list(model.named_modules()):
        if type(linear) is nn.Linear and name.endswith(TARGETS):
            quantized = make(linear)
            quantized.load_state_dict(linear.state_dict())
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, quantized.to("cpu"))
    return model.requires_grad_(False)


def four_bits(kind: str) -> Callable[[nn.Module], nn.Module]:
    def make(linear: nn.Linear) -> nn.Linear:
        n, k = linear.weight.shape
        return bitsandbytes.nn.Linear4bit(k, n, bias=False, compute_dtype=torch.float32, quant_type=kind)

    return lambda model: _with_bitsandbytes(model, make)


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


KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "nf4": four_bits("nf4"),
    "fp4": four_bits("fp4"),
    "llm.int8": eight_bits,
    "torchao int8": with_torchao(Int8WeightOnlyConfig()),
    "torchao int4": with_torchao(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16))),
    "torchao float8": with_torchao(Float8WeightOnlyConfig()),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


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
    base, model = KINDS[kind](llama()), apply_reslora(KINDS[kind](llama()), config())
    assert relative_error(logits(model), logits(base)) < (0.1 if kind in ("llm.int8", "torchao float8") else 1e-5)


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
    assert relative_error(merged, expected) < (5e-3 if kind == "llm.int8" else 1e-5)  # LLM.int8 merges in float16
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

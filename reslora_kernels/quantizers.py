"""Frozen weights that another library holds quantised: how to know them, and how to read them.

Each library is a ``Quantizer`` in ``QUANTIZERS``. It is imported when a weight is read.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor, nn


class Quantizer:
    """A library that holds weights quantised; ``library`` is what it is called in messages."""

    library: str

    def recognises(self, linear: nn.Module) -> bool:
        """Whether it is a linear layer whose weight is held by the library; asked of every module, without importing
        the library."""
        raise NotImplementedError

    def dtype(self, linear: Any) -> torch.dtype:
        """The floating dtype that the weight was quantised from, or is computed in."""
        raise NotImplementedError

    def dequantize(self, linear: Any) -> Tensor:
        """The weight [N, K] in floating point, a new tensor on the weight's device."""
        raise NotImplementedError

    def why_not(self, linear: Any) -> str | None:
        """What keeps such a layer from being adapted, and what to do instead; None where nothing does."""
        return None

    def shards(self, linear: Any) -> bool:
        """Whether FSDP2 can cut the weight as it is held, and ``dequantize`` read it put together."""
        return False

    def held(self, linear: Any) -> Tensor:
        """What the weight is held in."""
        return cast(Tensor, linear.weight)

    def runs(self, linear: Any) -> bool:
        """Whether the layer's own forward runs where it is."""
        return True


class BitsAndBytes(Quantizer):
    """NF4, FP4 and LLM.int8 weights (Transformers' ``BitsAndBytesConfig``)."""

    library = "bitsandbytes"

    def recognises(self, linear: nn.Module) -> bool:
        return isinstance(linear, nn.Linear) and type(linear).__module__.startswith("bitsandbytes.")

    def shards(self, linear: nn.Linear) -> bool:
        """4 bits are cut as packed; the scales, an eighth of them, stay whole. LLM.int8's scales hang on the weight."""
        return _four_bit_state(linear) is not None

    def dtype(self, linear: nn.Linear) -> torch.dtype:
        state = _four_bit_state(linear)
        return torch.float16 if state is None else state.dtype  # LLM.int8 computes in float16

    def dequantize(self, linear: nn.Linear) -> Tensor:
        """RuntimeError while the weight is not quantised yet: bitsandbytes does that when it moves to its device."""
        from bitsandbytes import functional

        weight: Any = linear.weight
        state = _four_bit_state(linear)
        if getattr(state, "packing_format_for_cpu", False):  # reordered in an evaluation on a CPU with AVX512-BF16
            return _read_by_multiplying(weight.data, state)
        if state is not None:
            return functional.dequantize_4bit(weight.data, state)
        scales = getattr(weight, "SCB", None)
        if scales is None:  # after the first forward of the layer by itself, bitsandbytes keeps them elsewhere
            scales = getattr(getattr(linear, "state", None), "SCB", None)
        if weight.dtype != torch.int8 or scales is None:
            kind = type(linear).__name__
            raise RuntimeError(f"a {kind}'s weight is not quantised yet: move the model to its device first")
        return cast(Tensor, functional.int8_vectorwise_dequant(weight.data, scales))


class TorchAO(Quantizer):
    """int8, int4 and float8 weight-only tensors (``quantize_``, Transformers' ``TorchAoConfig``)."""

    library = "torchao"

    def recognises(self, linear: nn.Module) -> bool:
        return type(linear) is nn.Linear and type(linear.weight).__module__.startswith("torchao.")

    def dtype(self, linear: nn.Linear) -> torch.dtype:
        return linear.weight.dtype

    def dequantize(self, linear: nn.Linear) -> Tensor:
        weight: Any = linear.weight
        return cast(Tensor, weight.dequantize())


class Float8(Quantizer):
    """Weights in 8-bit floating point with scales beside them, as Transformers holds them: ``FineGrainedFP8Config``
    (DeepSeek-V3's checkpoints), ``FbgemmFp8Config``, and compressed-tensors' under ``use_optimized_inference``.

    The layers' own forward rounds x to 8 bits too, which is not repeated, and needs a GPU's kernels.
    """

    library = "Transformers' FP8"

    def recognises(self, linear: nn.Module) -> bool:
        kind = type(linear)
        if not isinstance(linear, nn.Linear) or kind.__name__ not in _FLOAT8:
            return False
        return kind.__module__.startswith("transformers.") and linear.weight.dtype.itemsize == 1

    def why_not(self, linear: Any) -> str | None:
        if linear.weight.is_floating_point():
            return None
        return (
            "an FP8Linear with weights of 4 bits, which no backward reads: load the model with "
            "FineGrainedFP8Config(dequantize=True)"
        )

    def runs(self, linear: Any) -> bool:
        return not linear.weight.is_cpu

    def dtype(self, linear: Any) -> torch.dtype:
        return torch.float32  # that of the scales

    def dequantize(self, linear: Any) -> Tensor:
        weight: Tensor = linear.weight.detach().float()
        scales: Tensor = linear.weight_scale_inv if hasattr(linear, "weight_scale_inv") else linear.weight_scale
        scales, block = scales.detach().float(), getattr(linear, "block_size", None)
        if block is None:  # one for the weight, or one for each row
            return weight * (scales if scales.numel() == 1 else scales.view(-1, 1))
        rows = scales.repeat_interleave(block[0], 0)[: len(weight)]
        return weight * rows.repeat_interleave(block[1], 1)[:, : weight.shape[1]]


class HQQ(Quantizer):
    """``HQQLinear`` (Transformers' ``HqqConfig``), which is no ``nn.Linear``."""

    library = "hqq"

    def recognises(self, linear: nn.Module) -> bool:
        return type(linear).__name__ == "HQQLinear" and type(linear).__module__.startswith("hqq.")

    def held(self, linear: Any) -> Tensor:
        return cast(Tensor, linear.W_q)

    def dtype(self, linear: Any) -> torch.dtype:
        return cast(torch.dtype, linear.compute_dtype)

    def dequantize(self, linear: Any) -> Tensor:
        return cast(Tensor, linear.dequantize())


class Quanto(Quantizer):
    """``QLinear`` of optimum-quanto (Transformers' ``QuantoConfig``, diffusers)."""

    library = "optimum.quanto"

    def recognises(self, linear: nn.Module) -> bool:
        return isinstance(linear, nn.Linear) and type(linear).__module__.startswith("optimum.quanto.")

    def why_not(self, linear: Any) -> str | None:
        if linear.activation_qtype is None:
            return None
        return "a QLinear that quantises its input and output too: quantise the weights alone (activations=None)"

    def dtype(self, linear: Any) -> torch.dtype:
        return cast(torch.dtype, linear.weight.dtype)

    def dequantize(self, linear: Any) -> Tensor:
        weight = linear.qweight  # of weights that are not frozen, worked out now
        return cast(Tensor, weight.dequantize() if hasattr(weight, "dequantize") else weight)


class GPTQModel(Quantizer):
    """GPTQ and AWQ checkpoints as GPTQModel loads them for PyTorch's own operations, on a CPU too (``BACKEND.TORCH``
    and ``BACKEND.AWQ_TORCH``). Its other layers pack the weight anew for a kernel of theirs.
    """

    library = "gptqmodel"

    def recognises(self, linear: nn.Module) -> bool:
        return f"{type(linear).__module__}.{type(linear).__name__}" in (_GPTQ, _AWQ)

    def held(self, linear: Any) -> Tensor:
        return cast(Tensor, linear.qweight)

    def dtype(self, linear: Any) -> torch.dtype:
        return cast(torch.dtype, linear.scales.dtype)

    def dequantize(self, linear: Any) -> Tensor:
        if _GPTQ.endswith(f".{type(linear).__name__}"):
            return cast(Tensor, linear.dequantize_weight()).T.contiguous()
        reader = import_module("gptqmodel.quantization.awq.utils.packing_utils")
        held = linear.qweight, linear.qzeros, linear.scales
        return cast(Tensor, reader.dequantize_gemm(*held, linear.bits, linear.group_size)).T.contiguous()


class Unread(Quantizer):
    """Layers that hold their weight as nothing here reads it: known, to be refused by name."""

    library = "another library"

    def recognises(self, linear: nn.Module) -> bool:
        return _library_of(linear) is not None

    def why_not(self, linear: Any) -> str:
        library = _library_of(linear)
        assert library is not None
        return (
            f"a {type(linear).__name__} whose weight {library} holds quantised, in a form that is not read: "
            f"{_INSTEAD[library]}"
        )

    def dtype(self, linear: Any) -> torch.dtype:
        return torch.float32

    def dequantize(self, linear: Any) -> Tensor:
        raise TypeError(self.why_not(linear))


_GPTQ = "gptqmodel.nn_modules.qlinear.torch.TorchLinear"
_AWQ = "gptqmodel.nn_modules.qlinear.torch_awq.AwqTorchLinear"
_FLOAT8 = ("FP8Linear", "FbgemmFp8Linear", "CompressedTensorsFP8Linear")
_INSTEAD = {
    "gptqmodel": "load it with GPTQModel's backend=BACKEND.TORCH (AWQ_TORCH), which is read, or with plain weights",
    "awq": "load it with GPTQModel's backend=BACKEND.AWQ_TORCH, or with plain weights",
    "auto_gptq": "load it with GPTQModel's backend=BACKEND.TORCH, or with plain weights",
    "compressed_tensors": "load it with CompressedTensorsConfig(dequantize=True), as its first forward does anyway",
    "aqlm": "load it with plain weights",
    "eetq": "load it with plain weights, or in 8 bits by bitsandbytes",
    "vptq": "load it with plain weights",
    "quark": "load it with plain weights",
}


def _library_of(linear: nn.Module) -> str | None:
    """The library of a layer with sizes of its own, or of a plain one that it has attached itself to."""
    scheme = getattr(linear, "quantization_scheme", None)
    if isinstance(linear, nn.Linear) and type(scheme).__module__.startswith("compressed_tensors."):
        return "compressed_tensors"
    library = type(linear).__module__.partition(".")[0]
    return library if library in _INSTEAD and hasattr(linear, "in_features") else None


QUANTIZERS: tuple[Quantizer, ...] = (BitsAndBytes(), TorchAO(), Float8(), HQQ(), Quanto(), GPTQModel(), Unread())


def quantizer_of(module: nn.Module) -> Quantizer | None:
    """The quantiser that holds the module's weight; None for a plain weight and for what is no linear layer."""
    return next((quantizer for quantizer in QUANTIZERS if quantizer.recognises(module)), None)


def held_in(module: Any) -> Any:
    """The tensor that a quantised layer holds its weight in, or the weight of the plain layer in its place."""
    quantizer = quantizer_of(module)
    return module.weight if quantizer is None else quantizer.held(module)


class QuantizedWeight:
    """The weight [N, K] of a quantised linear layer for ``ops.lora_linear``, which unpacks it for each pass."""

    def __init__(self, linear: Any) -> None:
        quantizer = quantizer_of(linear)
        assert quantizer is not None
        self.linear, self._quantizer = linear, quantizer
        self.shape = torch.Size((linear.out_features, linear.in_features))

    @property
    def device(self) -> torch.device:
        return self._quantizer.held(self.linear).device

    @property
    def runs(self) -> bool:
        """Whether the layer's own forward runs where it is."""
        return self._quantizer.runs(self.linear)

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype that the weight was quantised from, or is computed in."""
        return self._quantizer.dtype(self.linear)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """W in ``dtype``, a new tensor."""
        with torch.no_grad():
            return self._quantizer.dequantize(self.linear).to(dtype)


def keep_order(model: nn.Module) -> None:
    """Switch off bitsandbytes' reordering of 4-bit weights in an evaluation: no gradient would pass them after it."""
    for layer in model.modules():
        if "support_avx512bf16_for_cpu" in vars(layer):
            vars(layer)["support_avx512bf16_for_cpu"] = False


def _four_bit_state(linear: nn.Linear) -> Any:
    """What 4 bits are read with. FSDP2 takes another parameter for the weight, without it; the module has it too."""
    return getattr(linear.weight, "quant_state", None) or getattr(linear, "quant_state", None)


def _read_by_multiplying(packed: Tensor, state: Any) -> Tensor:
    """W as the identity times Wᵀ, which is how the library reads this order of its own."""
    from bitsandbytes import functional

    identity = torch.eye(state.shape[1], dtype=torch.bfloat16)
    return cast(Tensor, functional.gemv_4bit(identity, packed, state=state)).T.contiguous()

"""Models to train a step of: real shapes, random weights, from Transformers' and diffusers' own classes.

The language models run without their output head, which no adapter touches: what is timed is the stack of layers.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from reslora_kernels.bench.cases import Method
from reslora_kernels.config import Shortcut

LLAMA_3_8B = (4096, 14336, 32, 8)  # hidden and intermediate size, heads, key-value heads
LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ROBERTA_TARGETS = ("query", "key", "value", "dense")
UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class ModelCase:
    """A model, its batch and its adapter. ``tiny``: the same architecture at a size for a CPU.

    Args:
        swept: which field grows in the series that this case belongs to; empty for a case of its own.
        sequence: tokens per sample, or the side of a latent image.
    """

    family: str
    layers: int
    batch: int
    sequence: int
    r: int = 16
    shortcut: Shortcut = "block"
    pre_num: int = 1
    swept: str = ""
    tiny: bool = False

    @property
    def name(self) -> str:
        """Shape and size; what is swept is left to ``value``."""
        title = FAMILIES[self.family].title if not self.tiny else f"tiny {self.family}"
        fields = {"layers": self.layers, "batch": self.batch, "sequence": self.sequence, "r": self.r}
        fields["pre_num"] = self.pre_num
        shown = [f"{key}={value}" for key, value in fields.items() if key != self.swept and value]
        return " ".join([title, *shown])

    def __str__(self) -> str:
        return f"{self.name} {self.swept}={self.value}" if self.swept else self.name

    @property
    def value(self) -> int:
        return int(getattr(self, self.swept)) if self.swept else 0

    @property
    def method(self) -> Method:
        return Method(self.shortcut, self.pre_num)

    @property
    def samples(self) -> int:
        """Tokens of a batch, or images of it."""
        return self.batch * (1 if FAMILIES[self.family].unit == "samples" else self.sequence)

    def replace(self, **changes: Any) -> ModelCase:
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class Family:
    """``make`` builds the model; ``batch`` is (the tensor whose gradient is wanted, its name, further arguments)."""

    title: str
    library: str
    targets: tuple[str, ...]
    unit: str
    make: Callable[[ModelCase], nn.Module]
    batch: Callable[[ModelCase, nn.Module, torch.dtype, torch.device], tuple[str, Tensor, dict[str, Any]]]


def _llama(case: ModelCase) -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    sizes = (128, 352, 4, 2) if case.tiny else LLAMA_3_8B
    hidden, intermediate, heads, key_value_heads = sizes
    config = LlamaConfig(
        vocab_size=64,  # inputs are embeddings
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=case.layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=8192,
        use_cache=False,
    )
    return LlamaModel(config)


def _roberta(case: ModelCase) -> nn.Module:
    from transformers import RobertaConfig, RobertaModel

    hidden, intermediate, heads = (128, 512, 4) if case.tiny else (1024, 4096, 16)
    config = RobertaConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=case.layers,
        num_attention_heads=heads,
        max_position_embeddings=1026,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return RobertaModel(config, add_pooling_layer=False)


def _unet(case: ModelCase) -> nn.Module:
    from diffusers import UNet2DConditionModel

    if not case.tiny:  # its defaults are those of Stable Diffusion 1.x, but for the text's width
        settings: dict[str, Any] = {"cross_attention_dim": 768}
    else:
        settings = {
            "sample_size": case.sequence,
            "block_out_channels": (32, 64),
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "cross_attention_dim": 32,
            "attention_head_dim": 4,
            "norm_num_groups": 8,
        }
    model: nn.Module = cast(Any, UNet2DConditionModel)(**settings)
    return model


def _embeddings(
    case: ModelCase, model: Any, dtype: torch.dtype, device: torch.device
) -> tuple[str, Tensor, dict[str, Any]]:
    shape = (case.batch, case.sequence, model.config.hidden_size)
    return "inputs_embeds", torch.randn(shape, device=device, dtype=dtype), {}


def _latents(
    case: ModelCase, model: Any, dtype: torch.dtype, device: torch.device
) -> tuple[str, Tensor, dict[str, Any]]:
    sample = torch.randn(case.batch, 4, case.sequence, case.sequence, device=device, dtype=dtype)
    text = torch.randn(case.batch, 77, model.config.cross_attention_dim, device=device, dtype=dtype)
    return "sample", sample, {"timestep": torch.tensor(10, device=device), "encoder_hidden_states": text}


FAMILIES = {
    "llama": Family("Llama-3-8B layers", "transformers", LLAMA_TARGETS, "tokens", _llama, _embeddings),
    "roberta": Family("RoBERTa-large layers", "transformers", ROBERTA_TARGETS, "tokens", _roberta, _embeddings),
    "unet": Family("SD-1.x UNet", "diffusers", UNET_TARGETS, "samples", _unet, _latents),
}


# What others publish for one GPU, by family. Their operations are by their own count.
PUBLISHED = {
    "llama": "to beat, on one H100: 12,473 tokens/s, 402 TFLOP/s, LoRA of all 32 layers and the head at 4096 tokens"
    " (NVIDIA NeMo AutoModel, performance summary of 2025-10-02)"
}


def frozen_products(settings: dict[str, Any]) -> float | None:
    """FLOP a token in the adapted linears alone, forward and dx, of a case as a dict; None for another than the Llama.

    Four for each weight; attention is not counted.
    """
    if settings.get("family") != "llama" or settings["tiny"]:
        return None
    hidden, intermediate, heads, key_value_heads = LLAMA_3_8B
    attention = 2 * hidden * hidden * (1 + key_value_heads / heads)
    return 4.0 * int(settings["layers"]) * (attention + 3 * hidden * intermediate)


def missing(case: ModelCase) -> str | None:
    """Why the model cannot be built here; None where it can."""
    library = FAMILIES[case.family].library
    return None if importlib.util.find_spec(library) else f"{library} is not installed"


def models(gpu: bool, quick: bool) -> list[ModelCase]:
    """A Llama-3-8B-shaped decoder of a few layers, RoBERTa-large and an SD UNet; small ones of each on a CPU."""
    if not gpu:
        return [
            _llama_case(gpu),
            ModelCase("roberta", 4, 4, 64, 8, tiny=True),
            ModelCase("unet", 0, 1, 16, 8, tiny=True),
        ]
    every = [_llama_case(gpu), ModelCase("roberta", 24, 32, 512), ModelCase("unet", 0, 8, 64)]
    return every[:1] if quick else every


def growth(gpu: bool, quick: bool) -> list[ModelCase]:
    """How a step of the decoder grows with pre_num, sequence length, batch and rank."""
    series = _SERIES_GPU if gpu else _SERIES_CPU
    if quick:
        series = {} if gpu else {"pre_num": (1, 3)}
    llama = _llama_case(gpu)
    return [llama.replace(swept=field, **{field: value}) for field, values in series.items() for value in values]


def _llama_case(gpu: bool) -> ModelCase:
    return ModelCase("llama", 4, 4, 2048) if gpu else ModelCase("llama", 4, 2, 128, 8, tiny=True)


MODEL_SETS: dict[str, Callable[[bool, bool], list[ModelCase]]] = {"models": models, "growth": growth}
_SERIES_CPU: dict[str, tuple[int, ...]] = {
    "pre_num": (1, 2, 3),
    "sequence": (64, 128, 256),
    "batch": (1, 2, 4),
    "r": (4, 16, 64),
}
_SERIES_GPU: dict[str, tuple[int, ...]] = {
    "pre_num": (1, 2, 3),
    "sequence": (512, 1024, 4096),
    "batch": (1, 2, 8),
    "r": (8, 32, 64),
}

"""Tiny real models from a config, seeded, with batches to train on. Libraries are imported when asked for."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from reslora_kernels.adapt.record import adapted_layers

VOCABULARY = 48
needs_transformers_5 = pytest.mark.skipif(
    int(version("transformers").split(".")[0]) < 5,
    reason="asks for what came with Transformers 5",
)


class Family(NamedTuple):
    """A kind of model: how to make one, a batch of keyword arguments for it, its loss and its outputs."""

    make: Callable[[], nn.Module]
    batch: Callable[[int], dict[str, Any]]
    loss: Callable[[nn.Module, dict[str, Any]], Tensor]
    outputs: Callable[[nn.Module, dict[str, Any]], Tensor]


def llama(layers: int = 3) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def roberta(head: str = "SequenceClassification", **changes: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=66,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
        initializer_range=0.2,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        **changes,
    )
    return getattr(transformers, f"RobertaFor{head}")(config).eval()


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=3,
        num_decoder_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=None,
        initializer_factor=2.0,
    )
    return T5ForConditionalGeneration(config).eval()


def vit() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
    )
    return ViTForImageClassification(config).eval()


def unet() -> Any:
    """The examples' denoiser: attention at both levels and in the middle, which runs before the upward blocks that are
    registered before it.
    """
    from stand_ins import denoiser

    return denoiser().eval()


@torch.no_grad()
def denoised(model: Any, **settings: Any) -> Tensor:
    """What a diffusers model in its dtype makes of a noisy image or film and a text."""
    generator = torch.Generator().manual_seed(0)
    sizes = (1, 8, 8) if "Wan" in type(model).__name__ else (8, 8)
    width = model.config.get("cross_attention_dim", 16)
    image = torch.randn(1, model.config.in_channels, *sizes, generator=generator, dtype=model.dtype)
    text = torch.randn(1, 5, width, generator=generator, dtype=model.dtype)
    sample: Tensor = model(image, timestep=torch.tensor([3]), encoder_hidden_states=text, **settings).sample
    return sample


def _tokens(seed: int, rows: int, length: int) -> Tensor:
    """Sequences in which the next token follows from the last by a fixed rule, half of the time."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    follows = torch.rand((rows, length), generator=generator) < 0.5
    for i in range(1, length):
        tokens[:, i] = torch.where(follows[:, i], (tokens[:, i - 1] * 5 + 1) % (VOCABULARY - 3) + 3, tokens[:, i])
    return tokens


def _causal_batch(seed: int) -> dict[str, Any]:
    tokens = _tokens(seed, 8, 16)
    return {"input_ids": tokens, "labels": tokens}


def _classes_batch(seed: int) -> dict[str, Any]:
    tokens = _tokens(seed, 16, 8)
    return {"input_ids": tokens, "labels": tokens[:, 0] * 3 // VOCABULARY}


def _pairs_batch(seed: int) -> dict[str, Any]:
    tokens = _tokens(seed, 8, 12)
    return {"input_ids": tokens, "labels": tokens[:, 2:9].contiguous()}


def _images_batch(seed: int) -> dict[str, Any]:
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return {"pixel_values": images, "labels": images[:, :, :4].mean((2, 3)).argmax(1)}


def _noise_batch(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(3, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([1, 30, 500]),
        "encoder_hidden_states": torch.randn(3, 5, 24, generator=generator),
    }


def _denoising_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return nn.functional.mse_loss(model(**batch).sample, batch["sample"].tanh())


FAMILIES = {
    "llama": Family(llama, _causal_batch, lambda m, b: m(**b).loss, lambda m, b: m(**b).logits),
    "roberta": Family(roberta, _classes_batch, lambda m, b: m(**b).loss, lambda m, b: m(**b).logits),
    "t5": Family(t5, _pairs_batch, lambda m, b: m(**b).loss, lambda m, b: m(**b).logits),
    "vit": Family(vit, _images_batch, lambda m, b: m(**b).loss, lambda m, b: m(**b).logits),
    "unet": Family(unet, _noise_batch, _denoising_loss, lambda m, b: m(**b).sample),
}


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 1) -> nn.Module:
    """Adapters as after training: B, which starts at zero, gets values, so that every term of a shortcut counts.

    Some of DoRA's magnitudes change their sign, as nothing keeps them from it.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in adapted_layers(model).values():
        for parameter in (layer.lora_A, layer.lora_B):
            values = torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5
            parameter.copy_(values)
    for layer in adapted_layers(model).values():
        if layer.lora_gates is not None:
            layer.lora_gates.copy_(1 + 0.5 * torch.randn(layer.lora_gates.shape, generator=generator))
        if layer.lora_magnitude_vector is not None:
            layer.lora_magnitude_vector.mul_(1 + torch.randn(layer.lora_magnitude_vector.shape, generator=generator))
    return model


def train(model: nn.Module, family: Family, steps: int, lr: float = 5e-3, seed: int = 100) -> list[float]:
    """AdamW steps on four batches in turn; the loss on the first of them before and after."""
    fixed = family.batch(seed)
    model.train()
    losses = [float(family.loss(model, fixed).detach())]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        optimizer.zero_grad()
        family.loss(model, family.batch(seed + step % 4)).backward()
        optimizer.step()
    losses.append(float(family.loss(model, fixed).detach()))
    model.eval()
    return losses


class Scrambled(nn.Module):
    """Registers its layers in another order than that of their numbers, in which it runs them."""

    def __init__(self, width: int = 12, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.out = nn.Linear(width, 5, dtype=dtype)
        self.blocks = nn.ModuleDict(
            {number: nn.ModuleDict({"fc": nn.Linear(width, width, dtype=dtype)}) for number in ("2", "0", "1")}
        )

    def forward(self, x: Tensor) -> Tensor:
        for number in ("0", "1", "2"):
            x = x + torch.tanh(self.blocks[number]["fc"](x))
        return self.out(x)


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, Any] | None = None) -> Tensor:
    """What a Transformers model says to a batch, by default one for ``llama``."""
    return model(**(FAMILIES["llama"].batch(5) if batch is None else batch)).logits

"""Tiny models from a configuration, and data made on the spot, so that each example runs offline and in seconds.

Yours take their place: ``from_pretrained`` with a folder or an id, and a data set.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LENGTH = 32


def language_model() -> Any:
    """A byte-level LLaMA of four layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=2 * LENGTH,
        bos_token_id=None,
        eos_token_id=257,
        pad_token_id=256,
    )
    return LlamaForCausalLM(config)


def tokenizer() -> Any:
    """A token for each byte, one for padding, one for the end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<pad>", "<eos>"]
    byte_level = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=byte_level, pad_token="<pad>", eos_token="<eos>")


def questions(count: int = 64) -> list[dict[str, str]]:
    """Sums, as prompts and completions."""
    return [{"prompt": f"{a} + {b} = ", "completion": str(a + b)} for a in range(8) for b in range(count // 8)]


def tokens(documents: int = 64) -> Tensor:
    """Sums written out, a byte for a token: int64 [documents, LENGTH]."""
    text = "".join(f"{row['prompt']}{row['completion']}\n" for row in questions(256)).encode()
    starts = torch.arange(documents)[:, None] * 7
    return torch.tensor(list(text))[(starts + torch.arange(LENGTH)) % len(text)]


def image_classifier() -> Any:
    """A ViT of four layers for images of 16 x 16 pixels and three classes."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_labels=3,
    )
    return ViTForImageClassification(config)


def images(count: int = 64) -> list[dict[str, Any]]:
    """Noise with one colour a little stronger, which is the class: ``pixel_values`` [3, 16, 16] and ``labels``."""
    noise = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    rows: list[dict[str, Any]] = []
    for i, image in enumerate(noise):
        image[i % 3] += 0.5
        rows.append({"pixel_values": image, "labels": i % 3})
    return rows


def denoiser() -> Any:
    """A text-conditioned UNet for latents of 8 x 8, with attention on both of its levels."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def latents(count: int = 32) -> list[tuple[Tensor, Tensor]]:
    """Pairs of a latent [4, 8, 8] and what a text encoder says of its caption [5, 24]."""
    generator = torch.Generator().manual_seed(0)
    captions = torch.randn(count, 5, 24, generator=generator)
    return [(caption[:4, :1, None].expand(4, 8, 8).tanh(), caption) for caption in captions]

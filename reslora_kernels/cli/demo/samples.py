"""A few generated lines of the models, before and after fine-tuning."""

from __future__ import annotations

import torch
from torch import Tensor, nn

PROMPTS = (b"import s", b"def get_", b"class Re")  # of one length: they are one batch


def generate(model: nn.Module, count: int, temperature: float, seed: int) -> list[str]:
    """Each prompt continued by ``count`` sampled bytes, as text. The same seed draws the same random numbers."""
    prompts = torch.tensor([list(prompt) for prompt in PROMPTS])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sequences: Tensor = model.generate(  # type: ignore[operator]
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            temperature=temperature,
            top_k=0,
            min_new_tokens=count,
            max_new_tokens=count,
        )
    return [bytes(sequence.tolist()).decode("utf-8", errors="replace") for sequence in sequences]

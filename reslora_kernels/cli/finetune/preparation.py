"""Training data made ready for a model whose weights are not loaded yet."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from reslora_kernels.adapt.targets import find_targets
from reslora_kernels.cli.examples import Chat, read_examples
from reslora_kernels.cli.loading import load_model_config, load_tokenizer, model_without_weights
from reslora_kernels.cli.tokenization import PLAIN_CHAT_TEMPLATE, Encoded, Row, encode, max_length_for
from reslora_kernels.config import ResLoRAConfig


@dataclass(frozen=True)
class Prepared:
    """Rows to train and to evaluate on, and what they were made with."""

    model_config: Any
    tokenizer: Any
    train: list[Row]
    evaluation: list[Row]
    max_length: int
    examples: int
    dropped: int
    plain_template: bool


def prepare(
    model: str,
    data: str,
    adapter: ResLoRAConfig,
    *,
    tokenizer: str | None,
    split: str,
    eval_data: str | None,
    eval_fraction: float,
    max_length: int | None,
    seed: int,
    trust_remote_code: bool,
) -> Prepared:
    """Read and encode the data, and see that ``adapter`` matches layers of the model.

    Raises:
        OSError, ValueError: data, tokenizer or the model's configuration is missing, malformed, or does not fit.
    """
    from transformers import AutoModelForCausalLM

    examples = read_examples("--data", data, split)
    eval_examples = [] if eval_data is None else read_examples("--eval-data", eval_data, split)
    config = load_model_config("--model", model, trust_remote_code)
    find_targets(model_without_weights(config, AutoModelForCausalLM, trust_remote_code), adapter)
    length = max_length_for(max_length, config)
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    option, source = ("--model", model) if tokenizer is None else ("--tokenizer", tokenizer)
    words = load_tokenizer(option, source, trust_remote_code)
    plain = words.chat_template is None and any(isinstance(example, Chat) for example in (*examples, *eval_examples))
    if plain:
        words.chat_template = PLAIN_CHAT_TEMPLATE
    encoded = encode(examples, words, length, vocabulary)
    train, evaluation = split_rows(encoded, eval_fraction, seed)
    if eval_examples:
        evaluation = encode(eval_examples, words, length, vocabulary).rows
    return Prepared(config, words, train, evaluation, length, len(examples), encoded.dropped, plain)


def split_rows(encoded: Encoded, fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Training and evaluation rows. Examples are drawn at random and stay whole; of a single text, the end is held out.

    Raises:
        ValueError: nothing is left to train on.
    """
    rows = encoded.rows
    if not fraction:
        return rows, []
    if len(encoded.groups) == 1:
        held_out = math.ceil(fraction * len(rows))
        train, evaluation = rows[:-held_out], rows[-held_out:]
    else:
        order = torch.randperm(len(encoded.groups), generator=torch.Generator().manual_seed(seed)).tolist()
        chosen = set(order[: math.ceil(fraction * len(order))])
        train = [row for i, group in enumerate(encoded.groups) if i not in chosen for row in group]
        evaluation = [row for i, group in enumerate(encoded.groups) if i in chosen for row in group]
    if not train:
        raise ValueError(f"--eval-fraction {fraction} of {len(rows)} sequences leaves none to train on")
    return train, evaluation

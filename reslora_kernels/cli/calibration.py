"""Calibration batches for the merges that need data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reslora_kernels.cli.examples import read_examples
from reslora_kernels.cli.loading import load_tokenizer
from reslora_kernels.cli.tokenization import Row, encode, max_length_for
from reslora_kernels.config import MergeMethod, ResLoRAConfig
from reslora_kernels.layers.shortcuts import hands_on


def needs_data(config: ResLoRAConfig, method: MergeMethod | None) -> bool:
    """Whether this merge is fitted to data; the others are exact, or use the weights alone."""
    if not hands_on(config.shortcut, config.pre_num):
        return False
    return not (config.shortcut == "input" and (method or config.merge) == "weights")


def check_data(
    config: ResLoRAConfig, method: MergeMethod | None, data: str | None, sequential: bool, joint_steps: int,
    extra_rank: int,
) -> bool:  # fmt: skip
    """Whether data is needed.

    Raises:
        ValueError: it is and ``--data`` is not given; or as for ``check_fits``.
    """
    chosen = method or config.merge
    check_fits(config, chosen, "--method", sequential, joint_steps, extra_rank)
    needed = needs_data(config, method)
    if needed and data is None:
        alternative = ", or --method weights, which needs none" if config.shortcut == "input" else ""
        raise ValueError(
            f"merging shortcut {config.shortcut!r} with method {chosen!r} needs calibration data: "
            f"give --data with some of the training data{alternative}"
        )
    return needed


def check_fits(
    config: ResLoRAConfig, chosen: str, name: str, sequential: bool, joint_steps: int, extra_rank: int
) -> None:
    """ValueError if ``--sequential`` or ``--joint-steps`` goes with a method, of the option ``name``, without a fit.

    And if ``--extra-rank`` goes without ``--joint-steps``.
    """
    if extra_rank and not joint_steps:
        raise ValueError(f"--extra-rank {extra_rank} needs --joint-steps")
    option = "--sequential" if sequential else "--joint-steps" if joint_steps else None
    if option and chosen != "least_squares" and hands_on(config.shortcut, config.pre_num):
        raise ValueError(f"{option} needs {name} least_squares, got {chosen}")


def read_batches(
    data: str, split: str, count: int, *, tokenizer_source: tuple[str, str], model_config: Any, max_length: int | None,
    trust_remote_code: bool,
) -> list[dict[str, Tensor]]:  # fmt: skip
    """The first ``count`` examples as batches for the model, still on the CPU.

    Args:
        tokenizer_source: the option and the value that name the model or adapter whose tokenizer to use.

    Raises:
        OSError, ValueError: as for reading and encoding training data.
    """
    examples = read_examples("--data", data, split)
    tokenizer = load_tokenizer(*tokenizer_source, trust_remote_code)
    length = max_length_for(max_length, model_config)
    vocabulary = getattr(model_config.get_text_config(), "vocab_size", None)
    return as_batches(encode(examples[:count], tokenizer, length, vocabulary).rows[:count])


def as_batches(rows: Sequence[Row]) -> list[dict[str, Tensor]]:
    """One row per batch, so that no padding enters the statistics; without labels, so that no loss is computed."""
    batches = []
    for row in rows:
        ids = row.input_ids.long().unsqueeze(0)
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return batches


def on_device(batches: Sequence[dict[str, Tensor]], device: torch.device) -> list[dict[str, Tensor]]:
    """Token ids are small, so all of them may move at once; a list can be run through more than once."""
    return [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]

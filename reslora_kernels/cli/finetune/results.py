"""What a run leaves behind beside its checkpoints: adapter, merged model, PEFT adapter, and the record of it all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reslora_kernels.adapt.record import adapted_layers
from reslora_kernels.cli.calibration import as_batches, needs_data, on_device
from reslora_kernels.cli.loading import save_merged
from reslora_kernels.cli.output import whole_folder
from reslora_kernels.cli.tokenization import Row
from reslora_kernels.config import ResLoRAConfig
from reslora_kernels.files.peft_export import export_peft
from reslora_kernels.files.save_load import save_adapter
from reslora_kernels.merge.merging import merge_reslora


def save_trained(model: Any, tokenizer: Any, folder: Path | None) -> None:
    """Save the adapter, with the tokenizer beside it; without a folder, only see that it can be.

    Raises:
        RuntimeError: training has diverged. Nothing is written then.
    """
    refuse_diverged(model)
    if folder is None:
        return
    save_adapter(model, folder)
    tokenizer.save_pretrained(folder)


def refuse_diverged(model: Any) -> None:
    """RuntimeError, which says what to do, if an adapter holds NaN or Inf."""
    for name, layer in adapted_layers(model).items():
        if not bool(torch.isfinite(layer.lora_A).all() and torch.isfinite(layer.lora_B).all()):
            raise RuntimeError(
                f"training diverged: the adapter of {name!r} holds NaN or Inf; lower --learning-rate, or use --bf16 "
                "in place of --fp16"
            )


def calibration_for(
    config: ResLoRAConfig, train: Sequence[Row], count: int, seed: int, device: torch.device
) -> list[dict[str, Tensor]] | None:
    """``count`` training rows at random as batches, or None where the merge needs no data."""
    if not needs_data(config, None):
        return None
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    return on_device(as_batches([train[i] for i in order[:count]]), device)


def export_trained(model: Any, tokenizer: Any, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Write the PEFT adapter. Returns what the record says of it."""
    with whole_folder(folder) as staging:
        report = export_peft(model, staging, **options)
        tokenizer.save_pretrained(staging)
    return {"max_lora_rank": report.max_lora_rank, "relative_error": report.relative_error}


def merge_trained(model: Any, tokenizer: Any, folder: Path | None, options: dict[str, Any]) -> dict[str, Any]:
    """Merge the model, for good, and save it if a folder is given. Returns what the record says of it."""
    report = merge_reslora(model, keep_original=False, **options)
    if folder is not None:
        with whole_folder(folder) as staging:
            save_merged(model, tokenizer, staging)
    return {"methods": sorted({row.method for row in report.rows}), "worst_relative_error": report.worst()}


def losses(history: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """First and last losses out of the Trainer's log; None where there is none."""
    train = [entry["loss"] for entry in history if "loss" in entry]
    evaluation = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    return {
        "train_first": train[0] if train else None,
        "train_last": train[-1] if train else None,
        "eval_first": evaluation[0] if evaluation else None,
        "eval_last": evaluation[-1] if evaluation else None,
    }


def summary(record: dict[str, Any]) -> list[str]:
    """What a user wants to see at the end."""
    found = record["losses"]
    lines = [f"{record['steps']} steps in {record['seconds']:.1f} s"]
    for kind in ("train", "eval"):
        if found[f"{kind}_first"] is not None:
            lines.append(f"{kind} loss: {found[f'{kind}_first']:.4f} -> {found[f'{kind}_last']:.4f}")
    if "eval_merged" in found:
        lines.append(f"eval loss of the merged model: {found['eval_merged']:.4f}")
    if "peft" in record:
        lines.append(f"max_lora_rank a server needs: {record['peft']['max_lora_rank']}")
    return lines + [f"{name}: {path}" for name, path in record["outputs"].items()]

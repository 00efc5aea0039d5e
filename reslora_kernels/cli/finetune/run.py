"""The training itself: Transformers' Trainer over encoded rows, its checkpoints, and what a run leaves behind."""

from __future__ import annotations

import functools
import hashlib
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from reslora_kernels._version import __version__
from reslora_kernels.adapt.record import adapted_layers
from reslora_kernels.cli.merge import as_batches, needs_data, on_device
from reslora_kernels.cli.options import save_merged
from reslora_kernels.cli.output import whole_folder
from reslora_kernels.cli.tokenization import Row, collate, pad_token
from reslora_kernels.config import ResLoRAConfig
from reslora_kernels.files.peft_export import export_peft
from reslora_kernels.files.save_load import save_adapter
from reslora_kernels.merge.merging import merge_reslora
from reslora_kernels.training import AdapterCheckpoints


class ResLoRATrainer(AdapterCheckpoints, Trainer):
    """Transformers' Trainer with checkpoints that hold the adapters alone."""


class AfterFirstStep(TrainerCallback):
    """Does ``work`` once a step has gone well."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.work: Callable[[], None] | None = work

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.work is not None:
            self.work()
            self.work = None


class LogLastStep(TrainerCallback):
    """Logs the last step's loss too, so that a short run has one."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        control.should_log = control.should_log or state.global_step >= state.max_steps
        return control


def training_arguments(output_dir: Path, *, evaluate: bool, device: torch.device, **options: Any) -> TrainingArguments:
    """Transformers' arguments. Without ``eval_steps`` or ``save_steps`` it evaluates and saves once per epoch.

    Raises:
        ValueError: an option has a value that is not allowed, or fp16 is asked for without a GPU.
    """
    if options["bf16"] and options["fp16"]:
        raise ValueError("--bf16 and --fp16 exclude each other")
    if options["fp16"] and device.type == "cpu":
        raise ValueError("--fp16 needs a GPU; use --bf16 or neither on a CPU")
    eval_steps, save_steps = options.pop("eval_steps"), options.pop("save_steps")
    if eval_steps is not None and not evaluate:
        raise ValueError("--eval-steps needs --eval-data or --eval-fraction")
    strategy = "steps" if eval_steps is not None else "epoch"
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        eval_strategy=strategy if evaluate else "no",
        eval_steps=eval_steps,
        eval_on_start=evaluate,
        save_strategy="steps" if save_steps is not None else "epoch",
        save_steps=save_steps or 500,
        logging_first_step=True,
        remove_unused_columns=False,
        use_cpu=device.type == "cpu",
        report_to="none",
        **_warmup(options.pop("warmup_steps")),
        **options,
    )
    if arguments.n_gpu > 1:  # else the Trainer takes DataParallel, which copies the modules at every step
        arguments._n_gpu = 1
    return arguments


def _warmup(steps: float) -> dict[str, Any]:
    """Below 1 a share of all steps, for which Transformers had an argument of its own before version 5."""
    if 0 < steps < 1 and int(version("transformers").partition(".")[0]) < 5:
        return {"warmup_ratio": steps}
    return {"warmup_steps": int(steps) if steps.is_integer() else steps}


def make_trainer(
    model: Any, arguments: TrainingArguments, train: Sequence[Row], evaluation: Sequence[Row], tokenizer: Any
) -> ResLoRATrainer:
    """A Trainer over rows, ready to train."""
    return ResLoRATrainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=evaluation or None,
        data_collator=functools.partial(collate, pad=pad_token(tokenizer)),
        processing_class=tokenizer,
        callbacks=[LogLastStep()],
    )


def wait_for_all() -> None:
    """Wait until every process of the run is here; at once where there is only one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def part() -> None:
    """End the run of several processes when all are done; one that just exits can take the others with it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def fingerprint(rows: Sequence[Row]) -> str:
    """A hash of the training data as the model sees it, its order included."""
    digest = hashlib.sha256()
    for row in rows:
        for tensor in (row.input_ids, row.labels):
            digest.update(len(tensor).to_bytes(8, "little"))
            digest.update(tensor.numpy().astype("<i4").tobytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    libraries = ("torch", "transformers", "accelerate", "safetensors")
    return {
        "reslora_kernels": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in libraries},
    }


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

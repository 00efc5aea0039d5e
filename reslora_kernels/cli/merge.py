"""``reslora merge`` and ``reslora export``: an adapter folded into its base model, or written as a PEFT LoRA adapter.

PEFT, Transformers and inference servers load the latter. The options and the calibration data are those of both.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from reslora_kernels.cli import options
from reslora_kernels.cli.examples import read_examples
from reslora_kernels.cli.options import (
    load_adapted,
    load_model_config,
    load_tokenizer,
    out_option,
    read_adapter,
    save_merged,
    tokenizer_source,
    torch_dtype,
)
from reslora_kernels.cli.output import check_replaceable, whole_folder
from reslora_kernels.cli.tokenization import Row, encode, max_length_for
from reslora_kernels.config import MergeMethod, ResLoRAConfig
from reslora_kernels.files.adapter_format import SavedAdapter
from reslora_kernels.files.peft_export import export_peft
from reslora_kernels.layers.shortcuts import hands_on
from reslora_kernels.merge.merging import merge_reslora


@dataclass(frozen=True)
class MergeOptions:
    """How to merge, on what data, and how to load the base model."""

    method: options.Method = None
    data: options.Data = None
    split: options.Split = "train"
    calibration_examples: options.CalibrationExamples = 128
    max_length: options.MaxLength = None
    sequential: options.Sequential = False
    joint_steps: options.JointSteps = 0
    extra_rank: options.ExtraRank = 0
    torch_dtype_name: options.DType = "auto"
    device: options.Device = "auto"
    overwrite: options.Overwrite = False
    trust_remote_code: options.TrustRemoteCode = False

    def prepare(self, adapter: str, base: str, out: Path, marker: str) -> Prepared:
        """The adapted model, its tokenizer and how to merge it; whatever can be refused is, before the model loads.

        Args:
            marker: the file by which an earlier output in the folder ``out`` is known, which ``--overwrite`` replaces.
        """
        method = options.parse_method("--method", self.method)
        torch_dtype(self.torch_dtype_name)
        device = options.torch_device(self.device)
        fits = (self.sequential, self.joint_steps, self.extra_rank)
        saved = read_adapter(adapter)
        needed = check_data(saved, method, self.data, *fits)
        check_replaceable(out, self.overwrite, marker, [adapter, base] + ([] if self.data is None else [self.data]))
        model_config = load_model_config("--base", base, self.trust_remote_code)
        source = tokenizer_source(adapter, base)
        batches = None
        if needed and self.data is not None:
            batches = read_batches(
                self.data, self.split, self.calibration_examples, tokenizer_source=source or ("--base", base),
                model_config=model_config, max_length=self.max_length, trust_remote_code=self.trust_remote_code,
            )  # fmt: skip
        loading: dict[str, Any] = {"device": self.device, "trust_remote_code": self.trust_remote_code}
        return Prepared(
            load_adapted("--base", base, model_config, adapter, saved, dtype=self.torch_dtype_name, **loading),
            load_tokenizer(*source, self.trust_remote_code) if source is not None else None,
            {"method": method, "calibration": None if batches is None else on_device(batches, device)}
            | dict(zip(("sequential", "joint_steps", "extra_rank"), fits if needed else (False, 0, 0), strict=True)),
        )


@dataclass(frozen=True)
class Prepared:
    """``arguments``: of ``merge_reslora`` and ``export_peft``."""

    model: Any
    tokenizer: Any
    arguments: dict[str, Any]


def with_merge_options(command: Callable[..., None]) -> Callable[..., None]:
    """``command``, whose last parameter is a ``MergeOptions``, with an option of the command line for each field."""
    *own, last = inspect.signature(command, eval_str=True).parameters.values()
    hints = typing.get_type_hints(MergeOptions, include_extras=True)

    def run(**values: Any) -> None:
        chosen = {field.name: values.pop(field.name) for field in fields(MergeOptions)}
        command(**values, **{last.name: MergeOptions(**chosen)})

    keyword = inspect.Parameter.KEYWORD_ONLY
    shared = [
        inspect.Parameter(field.name, keyword, default=field.default, annotation=hints[field.name])
        for field in fields(MergeOptions)
    ]
    run.__dict__["__signature__"] = inspect.Signature([*(each.replace(kind=keyword) for each in own), *shared])
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run


@with_merge_options
def merge(
    adapter: Annotated[str, typer.Argument(help="Folder of a saved adapter.")],
    base: Annotated[str, typer.Option("--base", help="Folder of the base model, or its id on the Hugging Face Hub.")],
    out: Annotated[Path, out_option("Folder to save the merged model in.")],
    options: MergeOptions,
) -> None:
    """Merge ADAPTER into its base model and save the result, with the tokenizer, as a plain Transformers model.

    Adapters with shortcut "none" or "block" merge exactly. Those with "input" or "middle" are fitted to --data, which
    should be some of the training data; the table shows the relative error of each layer on it.
    """
    prepared = options.prepare(adapter, base, out, "config.json")
    report = merge_reslora(prepared.model, **prepared.arguments, keep_original=False)
    with whole_folder(out) as folder:
        save_merged(prepared.model, prepared.tokenizer, folder)
    typer.echo(str(report))
    typer.echo(f"merged model: {out}")


def needs_data(config: ResLoRAConfig, method: MergeMethod | None) -> bool:
    """Whether this merge is fitted to data; the others are exact, or use the weights alone."""
    if not hands_on(config.shortcut, config.pre_num):
        return False
    return not (config.shortcut == "input" and (method or config.merge) == "weights")


def check_data(
    saved: SavedAdapter, method: MergeMethod | None, data: str | None, sequential: bool, joint_steps: int,
    extra_rank: int,
) -> bool:  # fmt: skip
    """Whether data is needed.

    Raises:
        ValueError: it is and ``--data`` is not given; or as for ``check_fits``.
    """
    config = saved.config
    chosen = method or config.merge
    check_fits(config, chosen, "--method", sequential, joint_steps, extra_rank)
    alone = saved.chains is not None and all(len(chain.names) == 1 for chain in saved.chains)
    needed = needs_data(config, method) and not alone
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


@with_merge_options
def export(
    adapter: Annotated[str, typer.Argument(help="Folder of a saved adapter.")],
    base: Annotated[str, typer.Option("--base", help="Folder of the base model, or its id on the Hugging Face Hub.")],
    out: Annotated[Path, out_option("Folder to save the PEFT adapter in.")],
    pattern: Annotated[
        bool, typer.Option("--pattern", help="Exact rank per module (rank_pattern) instead of one padded rank.")
    ] = False,
    *,
    options: MergeOptions,
) -> None:
    """Export ADAPTER as a PEFT LoRA adapter, and print the max_lora_rank that a server needs for it.

    Data is needed where ``reslora merge`` needs it.
    """
    prepared = options.prepare(adapter, base, out, "adapter_config.json")
    with whole_folder(out) as folder:
        report = export_peft(prepared.model, folder, **prepared.arguments, pattern=pattern)
    typer.echo(str(dataclasses.replace(report, path=out)))

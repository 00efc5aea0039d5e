"""``reslora merge``: an adapter folded into its base model; and the options and data that it shares with export."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from reslora_kernels.cli import options
from reslora_kernels.cli.calibration import check_data, on_device, read_batches
from reslora_kernels.cli.loading import (
    load_adapted,
    load_model_config,
    load_tokenizer,
    read_adapter_config,
    save_merged,
    tokenizer_source,
    torch_dtype,
)
from reslora_kernels.cli.output import check_replaceable, whole_folder
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
        needed = check_data(read_adapter_config(adapter), method, self.data, *fits)
        check_replaceable(out, self.overwrite, marker, (adapter, base))
        model_config = load_model_config("--base", base, self.trust_remote_code)
        source = tokenizer_source(adapter, base)
        batches = None
        if needed and self.data is not None:
            batches = read_batches(
                self.data, self.split, self.calibration_examples, tokenizer_source=source or ("--base", base),
                model_config=model_config, max_length=self.max_length, trust_remote_code=self.trust_remote_code,
            )  # fmt: skip
        return Prepared(
            load_adapted(
                adapter, base, dtype=self.torch_dtype_name, device=self.device, trust_remote_code=self.trust_remote_code
            ),
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
    out: Annotated[Path, typer.Option("--out", help="Folder to save the merged model in.")],
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

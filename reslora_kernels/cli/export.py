"""``reslora export``: an adapter as a PEFT LoRA adapter, which PEFT, Transformers and inference servers load."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from reslora_kernels.cli.calibration import check_data, on_device, read_batches
from reslora_kernels.cli.loading import load_adapted, load_model_config, read_adapter_config, torch_device, torch_dtype
from reslora_kernels.cli.merge import tokenizer_source
from reslora_kernels.cli.options import (
    CalibrationExamples,
    Data,
    Device,
    DType,
    ExtraRank,
    JointSteps,
    MaxLength,
    Method,
    Overwrite,
    Sequential,
    Split,
    TrustRemoteCode,
    parse_method,
)
from reslora_kernels.cli.output import check_replaceable, whole_folder
from reslora_kernels.files.peft_export import export_peft


def export(
    adapter: Annotated[str, typer.Argument(help="Folder of a saved adapter.")],
    base: Annotated[str, typer.Option("--base", help="Folder of the base model, or its id on the Hugging Face Hub.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to save the PEFT adapter in.")],
    method: Method = None,
    data: Data = None,
    split: Split = "train",
    calibration_examples: CalibrationExamples = 128,
    max_length: MaxLength = None,
    sequential: Sequential = False,
    joint_steps: JointSteps = 0,
    extra_rank: ExtraRank = 0,
    pattern: Annotated[
        bool, typer.Option("--pattern", help="Exact rank per module (rank_pattern) instead of one padded rank.")
    ] = False,
    torch_dtype_name: DType = "auto",
    device: Device = "auto",
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Export ADAPTER as a PEFT LoRA adapter, and print the max_lora_rank that a server needs for it.

    Data is needed where ``reslora merge`` needs it.
    """
    chosen = parse_method("--method", method)
    torch_dtype(torch_dtype_name)
    target = torch_device(device)
    needed = check_data(read_adapter_config(adapter), chosen, data, sequential, joint_steps, extra_rank)
    check_replaceable(out, overwrite, "adapter_config.json", (adapter, base))
    model_config = load_model_config("--base", base, trust_remote_code)
    batches = None
    if needed and data is not None:
        batches = read_batches(
            data, split, calibration_examples,
            tokenizer_source=tokenizer_source(adapter, base) or ("--base", base), model_config=model_config,
            max_length=max_length, trust_remote_code=trust_remote_code,
        )  # fmt: skip
    model = load_adapted(adapter, base, dtype=torch_dtype_name, device=device, trust_remote_code=trust_remote_code)
    with whole_folder(out) as folder:
        report = export_peft(
            model,
            folder,
            chosen,
            calibration=None if batches is None else on_device(batches, target),
            sequential=sequential and needed,
            joint_steps=joint_steps if needed else 0,
            extra_rank=extra_rank if needed else 0,
            pattern=pattern,
        )
    typer.echo(str(dataclasses.replace(report, path=out)))

"""``reslora merge``: an adapter folded into its base model, saved as a model of Transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reslora_kernels.cli.calibration import check_data, on_device, read_batches
from reslora_kernels.cli.loading import (
    has_tokenizer,
    load_adapted,
    load_model_config,
    load_tokenizer,
    local_folder,
    read_adapter_config,
    save_merged,
    torch_device,
    torch_dtype,
)
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
from reslora_kernels.merge.merging import merge_reslora


def merge(
    adapter: Annotated[str, typer.Argument(help="Folder of a saved adapter.")],
    base: Annotated[str, typer.Option("--base", help="Folder of the base model, or its id on the Hugging Face Hub.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to save the merged model in.")],
    method: Method = None,
    data: Data = None,
    split: Split = "train",
    calibration_examples: CalibrationExamples = 128,
    max_length: MaxLength = None,
    sequential: Sequential = False,
    joint_steps: JointSteps = 0,
    extra_rank: ExtraRank = 0,
    torch_dtype_name: DType = "auto",
    device: Device = "auto",
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Merge ADAPTER into its base model and save the result, with the tokenizer, as a plain Transformers model.

    Adapters with shortcut "none" or "block" merge exactly. Those with "input" or "middle" are fitted to --data, which
    should be some of the training data; the table shows the relative error of each layer on it.
    """
    chosen = parse_method("--method", method)
    torch_dtype(torch_dtype_name)
    target = torch_device(device)
    needed = check_data(read_adapter_config(adapter), chosen, data, sequential, joint_steps, extra_rank)
    check_replaceable(out, overwrite, "config.json", (adapter, base))
    model_config = load_model_config("--base", base, trust_remote_code)
    source = tokenizer_source(adapter, base)
    tokenizer = load_tokenizer(*source, trust_remote_code) if source is not None else None
    batches = None
    if needed and data is not None:
        batches = read_batches(
            data, split, calibration_examples,
            tokenizer_source=source or ("--base", base), model_config=model_config, max_length=max_length,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
    model = load_adapted(adapter, base, dtype=torch_dtype_name, device=device, trust_remote_code=trust_remote_code)
    report = merge_reslora(
        model,
        chosen,
        calibration=None if batches is None else on_device(batches, target),
        sequential=sequential and needed,
        joint_steps=joint_steps if needed else 0,
        extra_rank=extra_rank if needed else 0,
        keep_original=False,
    )
    with whole_folder(out) as folder:
        save_merged(model, tokenizer, folder)
    typer.echo(str(report))
    typer.echo(f"merged model: {out}")


def tokenizer_source(adapter: str, base: str) -> tuple[str, str] | None:
    """The tokenizer's place: with the adapter, as ``reslora finetune`` leaves it, else with the base model, or None."""
    if has_tokenizer(Path(adapter).expanduser()):
        return "adapter", str(Path(adapter).expanduser().absolute())
    folder = local_folder("--base", base)
    return ("--base", base) if folder is None or has_tokenizer(folder) else None

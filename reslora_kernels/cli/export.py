"""``reslora export``: an adapter as a PEFT LoRA adapter, which PEFT, Transformers and inference servers load."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from reslora_kernels.cli.merge import MergeOptions, with_merge_options
from reslora_kernels.cli.output import whole_folder
from reslora_kernels.files.peft_export import export_peft


@with_merge_options
def export(
    adapter: Annotated[str, typer.Argument(help="Folder of a saved adapter.")],
    base: Annotated[str, typer.Option("--base", help="Folder of the base model, or its id on the Hugging Face Hub.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to save the PEFT adapter in.")],
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

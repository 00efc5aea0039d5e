"""``reslora merge``: an adapter folded into its base model, saved as a model of Transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reslora_kernels.cli.loading import save_merged
from reslora_kernels.cli.merging import MergeOptions, with_merge_options
from reslora_kernels.cli.output import whole_folder
from reslora_kernels.merge.merging import merge_reslora


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

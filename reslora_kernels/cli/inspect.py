"""``reslora inspect``: which layers of a model a configuration adapts, in which chains, and which it does not."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from reslora_kernels.adapt.apply import apply_reslora
from reslora_kernels.adapt.coverage import Coverage
from reslora_kernels.adapt.coverage import inspect as coverage_of
from reslora_kernels.cli.options import (
    DEFAULTS,
    Backend,
    ExcludeModules,
    Gates,
    LayersToTransform,
    PreNum,
    Rank,
    Shortcut,
    TargetModules,
    TrustRemoteCode,
    adapted_without_weights,
    load_adapted,
    load_model,
    load_model_config,
    make_config,
    model_class,
    read_adapter,
    torch_device,
)


def inspect(
    model: Annotated[str, typer.Argument(help="Folder of a Transformers model, or its id on the Hugging Face Hub.")],
    adapter: Annotated[
        str | None, typer.Option("--adapter", help="A saved adapter, instead of the options below.")
    ] = None,
    r: Rank = DEFAULTS["r"],
    target_modules: TargetModules = DEFAULTS["target_modules"],
    exclude_modules: ExcludeModules = None,
    layers_to_transform: LayersToTransform = None,
    shortcut: Shortcut = DEFAULTS["shortcut"],
    pre_num: PreNum = DEFAULTS["pre_num"],
    gates: Gates = DEFAULTS["gates"],
    backend: Backend = DEFAULTS["backend"],
    device: Annotated[
        str | None,
        typer.Option(
            "--device", help="Load the weights there (auto, cpu or cuda), to see the backends of that device."
        ),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Which layers of MODEL are adapted, in which chains and by which backend, and which are not and why.

    Only the model's configuration is read, so a model of any size takes seconds. With --device the weights are loaded.
    """
    saved = None if adapter is None else read_adapter(adapter)
    if saved is not None:
        config = saved.config
    else:
        config = make_config(
            r=r,
            target_modules=target_modules,
            exclude_modules=exclude_modules,
            layers_to_transform=layers_to_transform,
            shortcut=shortcut,
            pre_num=pre_num,
            gates=gates,
            backend=backend,
        )
    if device is not None:
        torch_device(device)
    model_config = load_model_config("MODEL", model, trust_remote_code)
    if device is None:
        adapted = adapted_without_weights(model_config, saved or config, trust_remote_code)
    else:
        loading: dict[str, Any] = {"dtype": "auto", "device": device, "trust_remote_code": trust_remote_code}
        if adapter is not None and saved is not None:
            adapted = load_adapted("MODEL", model, model_config, adapter, saved, **loading)
        else:
            adapted = apply_reslora(
                load_model("MODEL", model, model_config, model_class(model_config), **loading), config
            )
    coverage = coverage_of(adapted)
    if json_output:
        typer.echo(json.dumps({"model": model, "config": config.to_dict(), **coverage.to_dict()}, indent=2))
    else:
        show(coverage)


def show(coverage: Coverage) -> None:
    """The coverage as tables; wide enough for long names where the output is not a terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(
        f"{coverage.said_of_shortcut}; chains from {escape(coverage.order)}",
        highlight=False,
    )
    layers = Table(title="Adapted layers", title_justify="left")
    for name, justify in (
        ("layer", "left"), ("in", "right"), ("out", "right"), ("r", "right"),
        ("chain", "left"), ("position", "right"), ("hands on", "left"), ("backend", "left"), ("why", "left"),
    ):  # fmt: skip
        layers.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in coverage.layers:
        position = f"{row.position + 1} of {row.chain_length}"
        sizes = (str(row.in_features), str(row.out_features), str(row.r))
        place = (escape(row.chain), position, escape(row.hands_on))
        layers.add_row(escape(row.name), *sizes, *place, row.backend, escape(row.reason))
    console.print(layers)
    if coverage.unmatched:
        others = Table("linear layer", "why", title="Not adapted", title_justify="left")
        for name, reason in coverage.unmatched:
            others.add_row(escape(name), escape(reason))
        console.print(others)
    if coverage.others:
        rest = Table("module", "kind", "modules", "parameters", title="In no linear layer", title_justify="left")
        for other in coverage.others:
            rest.add_row(escape(other.name), escape(other.kind), str(other.modules), f"{other.parameters:,}")
        console.print(rest)
    share = 100 * coverage.trainable_parameters / max(1, coverage.total_parameters)
    console.print(
        f"trainable parameters: {coverage.trainable_parameters:,} of {coverage.total_parameters:,} ({share:.3f} %)",
        highlight=False,
    )

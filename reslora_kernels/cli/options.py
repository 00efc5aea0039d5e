"""Options that several commands share, and the configuration they describe."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Annotated, Any, get_args

import torch
import typer

from reslora_kernels.backends import select
from reslora_kernels.config import ALL_LINEAR, MergeMethod, ResLoRAConfig

DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(ResLoRAConfig)}

Rank = Annotated[int, typer.Option("--r", help="Rank of every adapter.")]
LoraAlpha = Annotated[float, typer.Option("--lora-alpha", help="The low-rank term is multiplied by lora_alpha / r.")]
TargetModules = Annotated[
    str,
    typer.Option(
        "--target-modules", help='Names or name endings, comma-separated; a regular expression; "all-linear".'
    ),
]
ExcludeModules = Annotated[
    str | None, typer.Option("--exclude-modules", help="What to leave out: names, or a regular expression.")
]
LayersToTransform = Annotated[
    str | None, typer.Option("--layers-to-transform", help="Only these layer numbers, comma-separated.")
]
Shortcut = Annotated[str, typer.Option("--shortcut", help="none (LoRA), input, block or middle.")]
PreNum = Annotated[int, typer.Option("--pre-num", help="Earlier blocks that block and middle use; -1 for all.")]
Gates = Annotated[
    str, typer.Option("--gates", help="Learned factors of the shortcut's terms: none, scalar, or rank for r of each.")
]
Backend = Annotated[str, typer.Option("--backend", help="auto, torch, triton or cuda.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python code that comes with the model.")
]
DType = Annotated[
    str, typer.Option("--torch-dtype", help="Of the base weights: auto (as stored), float32, float16 or bfloat16.")
]
Device = Annotated[str, typer.Option("--device", help="auto (a GPU if there is one), cpu or cuda.")]
Data = Annotated[
    str | None,
    typer.Option("--data", help="Calibration data: JSON Lines, a text file, a saved dataset or the id of one."),
]
Split = Annotated[str, typer.Option("--split", help="Which split of a dataset to read.")]
CalibrationExamples = Annotated[
    int, typer.Option("--calibration-examples", min=1, help="How many examples of it to use.")
]
MaxLength = Annotated[
    int | None,
    typer.Option("--max-length", min=2, help="Tokens per example. Not given: 1024, or what the model allows."),
]
Sequential = Annotated[
    bool, typer.Option("--sequential", help="Fit each layer on the model whose earlier layers are merged already.")
]
JointSteps = Annotated[
    int,
    typer.Option("--joint-steps", min=0, help="Steps of a joint fit of all layers to the output; 128 is good."),
]
ExtraRank = Annotated[
    int,
    typer.Option("--extra-rank", min=0, help="Rows that the joint fit adds to A, columns to B; r is good."),
]
Method = Annotated[
    str | None, typer.Option("--method", help="input, weights or least_squares. Not given: the adapter's own.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run left in the output folder.")]


def make_config(
    *,
    target_modules: str,
    exclude_modules: str | None = None,
    layers_to_transform: str | None = None,
    **others: Any,
) -> ResLoRAConfig:
    """The configuration that the options describe.

    Raises:
        ValueError: a value that is not allowed.
        RuntimeError: the backend cannot run on this machine.
    """
    config = ResLoRAConfig(
        target_modules=parse_names(target_modules),
        exclude_modules=None if exclude_modules is None else parse_names(exclude_modules),
        layers_to_transform=None if layers_to_transform is None else parse_indices(layers_to_transform),
        **others,
    )
    select.check(config.backend)
    return config


def parse_names(value: str) -> str | tuple[str, ...]:
    """Names separated by commas as a tuple; "all-linear", or anything with a regular expression's signs, as it is."""
    if value == ALL_LINEAR or not re.fullmatch(r"[\w.\-, ]+", value):
        return value
    return tuple(name for name in (part.strip() for part in value.split(",")) if name)


def parse_indices(value: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise ValueError(f"--layers-to-transform must be numbers separated by commas, got {value!r}") from None


def parse_method(option: str, value: str | None) -> MergeMethod | None:
    """A merge method; None stands for the adapter's own.

    Raises:
        ValueError: there is no such method.
    """
    methods = dict(zip(get_args(MergeMethod), get_args(MergeMethod), strict=True))
    if value is not None and value not in methods:
        raise ValueError(f"{option} must be one of {', '.join(methods)}, got {value!r}")
    return None if value is None else methods[value]


def check_choice(option: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise a ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{option} must be one of {', '.join(allowed)}, got {value!r}")


def torch_device(name: str, option: str = "--device") -> torch.device:
    """The device that ``auto`` (a GPU if there is one), ``cpu`` or ``cuda`` means.

    Raises:
        ValueError: the name is none of them, or means a GPU that torch cannot use.
    """
    check_choice(option, name, ("auto", "cpu", "cuda"))
    gpu = torch.cuda.is_available()
    if name == "cuda" and not gpu:
        raise ValueError(f"{option} cuda: torch cannot use a GPU here (see: reslora doctor)")
    return torch.device("cuda" if gpu and name != "cpu" else "cpu")

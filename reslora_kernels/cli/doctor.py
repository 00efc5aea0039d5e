"""``reslora doctor``: what is installed, built and working on this machine, and how to fix each gap."""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table

from reslora_kernels._version import __version__
from reslora_kernels.backends import select
from reslora_kernels.cli.toolchain import compiler_version, find_cxx, find_nvcc
from reslora_kernels.cli.verify import cases, check_case

CORE = ("torch", "safetensors", "typer", "rich")
EXTRAS = {
    "hf": ("transformers", "peft", "accelerate", "datasets"),
    "diffusion": ("diffusers",),
    "plots": ("matplotlib", "jinja2"),
}


class Library(NamedTuple):
    name: str
    version: str | None
    fix: str | None


class Compiler(NamedTuple):
    name: str
    path: str | None
    version: str | None


class Gpu(NamedTuple):
    name: str
    compute_capability: str
    memory_gib: float


class SmokeTest(NamedTuple):
    """One golden vector, forward and backward, through one backend. ``passed`` is None where it cannot run here."""

    backend: str
    passed: bool | None
    detail: str


def doctor(json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False) -> None:
    """What is installed, built and working on this machine, and how to fix each gap.

    The exit status is 0 if the torch backend works, else 1.
    """
    findings = examine()
    if json_output:
        typer.echo(json.dumps(findings, indent=2))
    else:
        show(findings)
    if not findings["healthy"]:
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """Everything doctor reports, as plain values ready for JSON."""
    libraries, compilers, build = find_libraries(), find_compilers(), build_record()
    gpus, driver = find_gpus(), driver_version()
    smoke_tests = [smoke_test(status) for status in select.status()]
    gaps = {f"{library.name} is not installed": library.fix for library in libraries if library.fix}
    if driver and not gpus:
        gaps["torch cannot use the GPU of this machine"] = gpu_fix()
    gaps |= {
        f"the {test.backend} backend fails its smoke test": "report it with the output of `reslora doctor --json`"
        for test in smoke_tests
        if test.passed is False
    }
    return {
        "reslora_kernels": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "libraries": [row._asdict() for row in libraries],
        "gpus": [gpu._asdict() for gpu in gpus],
        "driver": driver,
        "torch_cuda": torch.version.cuda,
        "compilers": [row._asdict() for row in compilers],
        "build": build,
        "backends": [test._asdict() for test in smoke_tests],
        "fixes": [{"gap": gap, "fix": fix} for gap, fix in gaps.items()],
        "healthy": any(test.backend == "torch" and test.passed for test in smoke_tests),
    }


def find_libraries() -> list[Library]:
    """What the package uses, without importing any of it. Triton comes with torch and has no fix of its own."""
    wanted: dict[str, str | None] = {name: "pip install reslora_kernels" for name in CORE} | {"triton": None}
    for extra, names in EXTRAS.items():
        wanted |= {name: f'pip install "reslora_kernels[{extra}]"' for name in names}
    rows = []
    for name, fix in wanted.items():
        try:
            rows.append(Library(name, installed_version(name), None))
        except PackageNotFoundError:
            rows.append(Library(name, None, fix))
    return rows


def find_compilers() -> list[Compiler]:
    """nvcc and a C++ compiler. Neither is a gap where there is nothing to compile."""
    found = {"nvcc": find_nvcc(), "C++": find_cxx()}
    return [Compiler(name, path, compiler_version(path) if path else None) for name, path in found.items()]


def find_gpus() -> list[Gpu]:
    """The GPUs that torch can use."""
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        gpus.append(Gpu(properties.name, capability, round(properties.total_memory / 2**30, 1)))
    return gpus


def driver_version() -> str | None:
    """The NVIDIA driver's version as nvidia-smi tells it; None without a driver."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        finished = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return finished.stdout.split()[0] if finished.returncode == 0 and finished.stdout.strip() else None


def gpu_fix() -> str:
    if torch.version.cuda is None:
        return "install a CUDA build of torch (https://pytorch.org/get-started/locally)"
    return (
        f"the driver must support CUDA {torch.version.cuda}, which torch was built for; check CUDA_VISIBLE_DEVICES too"
    )


def build_record() -> dict[str, Any]:
    """What setup.py wrote when the package was built."""
    try:
        record = importlib.import_module("reslora_kernels._build_info")
    except ModuleNotFoundError:
        return {"cuda_built": False, "reason": "running from a source tree, not built", "nvcc": None, "python": None}
    return {
        "cuda_built": record.CUDA_BUILT,
        "reason": record.CUDA_REASON,
        "nvcc": record.NVCC,
        "python": record.PYTHON,
    }


def smoke_test(status: select.Status) -> SmokeTest:
    """One golden vector, forward and backward, through the backend."""
    if not status.available:
        return SmokeTest(status.name, None, status.reason)
    check = check_case(next(case for case in cases() if case.config.shortcut == "middle"), status.name)
    if check.failure is not None:
        return SmokeTest(status.name, False, check.failure)
    return SmokeTest(status.name, True, f"{status.reason}; golden vector within {check.error:.0e} ({check.dtype})")


def show(findings: dict[str, Any]) -> None:
    """The findings as tables."""
    console = Console()
    console.print(
        f"reslora_kernels {findings['reslora_kernels']}, Python {findings['python']}, "
        f"{findings['platform']}, {findings['cpus']} CPUs",
        highlight=False,
    )
    libraries = [(row["name"], row["version"] or "not installed") for row in findings["libraries"]]
    console.print(table("Libraries", libraries))
    gpus = [
        (g["name"], f"compute capability {g['compute_capability']}, {g['memory_gib']} GiB") for g in findings["gpus"]
    ]
    gpus = gpus or [
        ("none", f"torch built for CUDA {cuda}" if (cuda := findings["torch_cuda"]) else "torch built without CUDA")
    ]
    console.print(table("GPUs", [*gpus, ("driver", findings["driver"] or "none")]))
    compilers = [
        (row["name"], f"{row['version']} ({row['path']})" if row["path"] else "none") for row in findings["compilers"]
    ]
    build = findings["build"]
    built = "built" if build["cuda_built"] else f"not built: {build['reason']}"
    console.print(table("Compilers", [*compilers, ("CUDA extension", built)]))
    verdicts = {True: "works", False: "FAILS", None: "not here"}
    console.print(table("Backends", [(t["backend"], verdicts[t["passed"]], t["detail"]) for t in findings["backends"]]))
    if findings["fixes"]:
        console.print(table("How to fix each gap", [(row["gap"], row["fix"]) for row in findings["fixes"]]))
    else:
        console.print("Nothing to fix.")


def table(title: str, rows: list[Any]) -> Table:
    """Rows of plain text under a title."""
    result = Table(title=title, title_justify="left", show_header=False)
    for _ in rows[0]:
        result.add_column(overflow="fold")
    for row in rows:
        result.add_row(*(str(cell).replace("[", r"\[") for cell in row))
    return result

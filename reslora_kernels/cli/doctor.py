"""``reslora doctor``: what is installed, built and working on this machine, and how to fix each gap."""

from __future__ import annotations

import importlib
import json
import os
import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table

from reslora_kernels import host
from reslora_kernels._version import __version__
from reslora_kernels.backends import select
from reslora_kernels.cli.toolchain import (
    OLDEST_ARCHITECTURE,
    OLDEST_NVCC,
    Driver,
    compiler_version,
    find_cxx,
    find_driver,
    find_nvcc,
    number,
    runs_on,
    version_number,
)
from reslora_kernels.cli.verify import cases, check_case

CORE = ("torch", "safetensors", "typer", "rich")
EXTRAS = {
    "hf": ("transformers", "peft", "accelerate", "datasets"),
    "diffusion": ("diffusers",),
    "plots": ("matplotlib", "jinja2"),
}
BUILD = "`RESLORA_CUDA=1 pip install --force-reinstall --no-deps .` in the source folder"
HOST_BUILD = "`RESLORA_HOST=1 pip install --force-reinstall --no-deps .` in the source folder"


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
    gpus, driver = find_gpus(), find_driver()
    smoke_tests = [smoke_test(status) for status in select.status()]
    gaps = {f"{library.name} is not installed": library.fix for library in libraries if library.fix}
    if driver and driver.capabilities and not gpus:
        gaps["torch cannot use the GPU of this machine"] = gpu_fix()
    gaps |= extension_gaps(build, driver)
    if host.module is None and find_cxx() and not host.why.startswith("RESLORA_HOST=0"):
        gaps[f"small layers on the CPU are slower than they could be: {host.why}"] = f"run {HOST_BUILD}"
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
        "driver": driver and driver._asdict(),
        "torch_cuda": torch.version.cuda,
        "compilers": [row._asdict() for row in compilers],
        "build": build,
        "host_extension": {"in_use": host.module is not None, "reason": host.why},
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
        reason = "running from a source tree, not built"
        return {"cuda_built": False, "reason": reason, "architectures": [], "nvcc": None, "python": None}
    return {
        "cuda_built": record.CUDA_BUILT,
        "reason": record.CUDA_REASON,
        "architectures": list(record.CUDA_ARCHS),
        "nvcc": record.NVCC,
        "python": record.PYTHON,
    }


def extension_gaps(build: dict[str, Any], driver: Driver | None) -> dict[str, str]:
    """What keeps the CUDA extension from the GPUs that the driver shows, each with its fix."""
    capabilities = [name for name in driver.capabilities if number(name) >= OLDEST_ARCHITECTURE] if driver else []
    if not driver or not capabilities or build["reason"].startswith("RESLORA_CUDA=0"):
        return {}
    if not build["cuda_built"]:
        toolkit = f"CUDA toolkit {'.'.join(map(str, OLDEST_NVCC))} or newer"
        first = "see to that, then" if find_nvcc() else f"install the {toolkit} (or point CUDA_HOME at it), then"
        return {f"the CUDA extension is not built: {build['reason']}": f"{first} {BUILD}"}
    served, needed = version_number(driver.cuda), version_number(build["nvcc"])
    update = f"update the NVIDIA driver to one for CUDA {build['nvcc']} or newer"
    if served[0] < needed[0]:
        gap = f"the driver serves CUDA up to {driver.cuda}, the CUDA extension was built with {build['nvcc']}"
        return {gap: f"{update}, or point CUDA_HOME at a CUDA {served[0]} toolkit and run {BUILD}"}
    gaps = {}
    for capability in capabilities:
        if any(runs_on(name, capability) for name in build["architectures"]):
            continue
        through_ptx = any(
            name.endswith("+PTX") and number(name) <= number(capability) for name in build["architectures"]
        )
        if not through_ptx:
            built_for = ", ".join(build["architectures"])
            gap = f"the CUDA extension was built for {built_for}, not for this GPU's compute capability {capability}"
            gaps[gap] = f"run {BUILD} on this machine"
        elif served < needed:
            gap = (
                f"the driver, of CUDA {driver.cuda}, cannot compile the extension's PTX of {build['nvcc']} for this GPU"
            )
            gaps[gap] = f"{update}, or run {BUILD} on this machine"
    return gaps


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
    driver = findings["driver"]
    console.print(table("GPUs", [*gpus, ("driver", f"serves CUDA up to {driver['cuda']}" if driver else "none")]))
    compilers = [
        (row["name"], f"{row['version']} ({row['path']})" if row["path"] else "none") for row in findings["compilers"]
    ]
    build = findings["build"]
    built = f"built by nvcc {build['nvcc']} for {', '.join(build['architectures'])}"
    built = built if build["cuda_built"] else f"not built: {build['reason']}"
    extension = findings["host_extension"]
    on_host = extension["reason"] if extension["in_use"] else f"not in use: {extension['reason']}"
    console.print(table("Compilers", [*compilers, ("CUDA extension", built), ("host extension", on_host)]))
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

"""``reslora doctor`` and ``reslora verify``: what works on this machine, how to fix gaps, whether results are right."""

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
from torch import Tensor

from reslora_kernels import host
from reslora_kernels._version import __version__
from reslora_kernels.backends import select
from reslora_kernels.cli.options import torch_device
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
from reslora_kernels.layers.kinds import link
from reslora_kernels.layers.linear import ResLoRALinear
from reslora_kernels.testing import GoldenCase, assert_close_to_truth, golden_cases, max_error, reference_results

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


GOLDEN_ERROR = 1e-10  # float64, elementwise
INPUTS = ("x", "weight", "bias", "lora_A", "lora_B", "dy")


class Check(NamedTuple):
    """One golden case through one backend. ``error`` is the largest over y, dx, dA, dB; ``failure`` None if none."""

    case: str
    backend: str
    dtype: str
    error: float
    failure: str | None


def verify() -> None:
    """Run the golden vectors, values and gradients, through every backend that this machine can run.

    One line for each case and backend, with the largest error. The exit status is 1 if any fails.
    """
    checks = []
    for status in select.status():
        if not status.available:
            typer.echo(f"skip  {status.name:6}  {status.reason}")
            continue
        for case in cases():
            checks.append(check_case(case, status.name))
            typer.echo(line_of(checks[-1]))
    failed = sum(check.failure is not None for check in checks)
    typer.echo(f"{len(checks) - failed} of {len(checks)} checks passed")
    if failed:
        raise typer.Exit(1)


def cases() -> tuple[GoldenCase, ...]:
    """The golden cases; an installation without any is an error, not a pass."""
    found = golden_cases()
    if not found:
        raise FileNotFoundError("reslora_kernels/golden.safetensors holds no golden vectors; reinstall reslora_kernels")
    return found


def line_of(check: Check) -> str:
    verdict = "ok    " if check.failure is None else "FAIL  "
    line = f"{verdict}{check.backend:6}  {check.case:42}  {check.dtype:7}  {check.error:.1e}"
    return line if check.failure is None else f"{line}  {check.failure}"


def check_case(case: GoldenCase, backend: str) -> Check:
    """Compare with the golden values: within 1e-10 in float64, by the tolerance rule where the backend lacks float64.

    An error that the backend raises is a failed check, so that the others still run.
    """
    dtype = served_dtype(case, backend)
    error, failure = float("nan"), None
    try:
        results = chain_results(case, backend, dtype)
        pairs = [(name, n, result) for name, tensors in results.items() for n, result in enumerate(tensors)]
        error = max(max_error(result, case.tensors[f"{name}.{n}"]) for name, n, result in pairs)
        if dtype == torch.float64:
            failure = None if error <= GOLDEN_ERROR else f"above {GOLDEN_ERROR:.0e}"
        else:
            plain = reference_results(case.config, inputs_of(case), dtype)
            for name, n, result in pairs:
                assert_close_to_truth(result, case.tensors[f"{name}.{n}"], plain[name][n], f"{name}.{n}")
    except Exception as fault:
        failure = f"{type(fault).__name__}: {fault}"
    return Check(case.name, backend, str(dtype).removeprefix("torch."), error, failure)


def served_dtype(case: GoldenCase, backend: str) -> torch.dtype:
    """float64, or float32 where the backend cannot serve float64."""
    x, weight = case.series("x")[0].flatten(0, -2), case.series("weight")[0]
    try:
        select.explain(backend, x.to(torch_device("auto")), weight.to(torch_device("auto")), case.config.r)
    except ValueError:
        return torch.float32
    return torch.float64


def inputs_of(case: GoldenCase) -> dict[str, list[Tensor]]:
    """x, weight, bias, lora_A, lora_B, dy, one tensor per layer; an empty list of biases where there are none."""
    return {name: case.series(name) if f"{name}.0" in case.tensors else [] for name in INPUTS}


def chain_results(case: GoldenCase, backend: str, dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """y, dx, dlora_A, dlora_B of linked layers, on the CPU; every x is a leaf, all layers differentiated together."""
    config = case.config.replace(backend=backend)
    device = torch_device("auto")
    inputs = {name: [t.to(device, dtype, copy=True) for t in tensors] for name, tensors in inputs_of(case).items()}
    layers = []
    for n, weight in enumerate(inputs["weight"]):
        out_features, in_features = weight.shape
        layer = ResLoRALinear(in_features, out_features, bool(inputs["bias"]), device, dtype, config=config)
        layer.load_state_dict(
            {name: inputs[name][n] for name in ("weight", "bias", "lora_A", "lora_B") if inputs[name]}
        )
        layers.append(layer)
    x = [t.requires_grad_() for t in inputs["x"]]
    with link(layers).forward_pass():
        y = [layer(t) for layer, t in zip(layers, x, strict=True)]
    torch.autograd.backward(y, inputs["dy"])
    a, b = [layer.lora_A for layer in layers], [layer.lora_B for layer in layers]
    gradients = {
        f"d{name}": [gradient(t) for t in tensors] for name, tensors in (("x", x), ("lora_A", a), ("lora_B", b))
    }
    return {"y": [t.detach().cpu() for t in y], **gradients}


def gradient(leaf: Tensor) -> Tensor:
    """The leaf's gradient on the CPU, zero where none reached it."""
    return (torch.zeros_like(leaf) if leaf.grad is None else leaf.grad).cpu()

"""Compilers, driver and GPUs of this machine; what to compile for. Standard library only: setup.py runs this file."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

OLDEST_NVCC = (12, 0)  # the first that knows 90a
OLDEST_ARCHITECTURE = 80  # Ampere: mma.sync on bf16 and tf32, cp.async
USUAL_ARCHITECTURES = ("80", "89", "90a", "100", "120")
WITH_SUFFIX = {"90": "90a"}  # chips whose own instructions need the architecture-specific target
USUAL_NVCC_FOLDER = "/usr/local/cuda/bin"
LIBCUDA = "libcuda.so.1"


class Driver(NamedTuple):
    """The NVIDIA driver: the newest CUDA version that it serves, and the compute capability of each visible GPU."""

    cuda: str
    capabilities: tuple[str, ...]


def find_nvcc() -> str | None:
    """Path of nvcc: under CUDA_HOME or else CUDA_PATH alone where set, else on PATH, else under /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=str(Path(home) / "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path=USUAL_NVCC_FOLDER)


def find_cxx() -> str | None:
    """Path of the C++ compiler: what CXX names, else g++, clang++ or c++; None if there is none."""
    names = [os.environ.get("CXX"), "g++", "clang++", "c++"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


def compiler_version(path: str) -> str | None:
    """The version that ``path --version`` reports, as in "13.0"; None where it cannot be run or says none."""
    output = output_of([path, "--version"])
    found = re.search(r"release (\d+[.\d]*)", output) or re.search(r"(\d+\.[.\d]*\d)", output)
    return found.group(1) if found else None


def output_of(command: list[str]) -> str:
    """What the command prints; nothing where it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def require_compilers() -> tuple[str, str]:
    """Paths of an nvcc that can build the extension and of a C++ compiler; RuntimeError says what is missing."""
    if sys.platform != "linux":
        raise RuntimeError(f"it is built on Linux only, this is {sys.platform}")
    nvcc, cxx = find_nvcc(), find_cxx()
    if nvcc is None:
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        raise RuntimeError(f"no nvcc under {home}/bin" if home else "no nvcc on PATH or under CUDA_HOME")
    version = compiler_version(nvcc)
    if version is None:
        raise RuntimeError(f"{nvcc} cannot be run")
    if version_number(version) < OLDEST_NVCC:
        raise RuntimeError(f"nvcc {version} ({nvcc}) is too old: {OLDEST_NVCC[0]}.{OLDEST_NVCC[1]} or newer is needed")
    if cxx is None:
        raise RuntimeError("no C++ compiler: none of CXX, g++, clang++, c++ was found")
    return nvcc, cxx


def version_number(version: str) -> tuple[int, ...]:
    """ "13.0" as (13, 0), which compares as a number."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def known_architectures(nvcc: str) -> tuple[str, ...]:
    """What nvcc can compile for, without suffixes, oldest first: ("80", ..., "120"); RuntimeError if it is silent."""
    names = set(re.findall(r"compute_(\d+)", output_of([nvcc, "--list-gpu-arch"])))
    if not names:
        raise RuntimeError(f"{nvcc} --list-gpu-arch names no architecture")
    return tuple(sorted(names, key=int))


def requested_architectures(request: str) -> tuple[str, ...]:
    """RESLORA_CUDA_ARCHS taken apart and checked: "80;90a;120+PTX" gives ("80", "90a", "120+PTX"), "" nothing.

    Raises:
        ValueError: an entry is not an architecture, or one that the kernels do not run on.
    """
    names = tuple(dict.fromkeys(name.strip() for name in re.split("[;,]", request) if name.strip()))
    for name in names:
        if not re.fullmatch(r"\d{2,3}[af]?(\+PTX)?", name):
            raise ValueError(f'RESLORA_CUDA_ARCHS must read like "80;90a;120+PTX", got {name!r} in {request!r}')
        if number(name) < OLDEST_ARCHITECTURE:
            raise ValueError(f"RESLORA_CUDA_ARCHS: the kernels need {OLDEST_ARCHITECTURE} or newer, got {name!r}")
    return names


def choose_architectures(
    requested: tuple[str, ...], known: Iterable[str], capabilities: Iterable[str]
) -> tuple[str, ...]:
    """What to compile for: what was asked for, else the visible GPUs, else the usual ones and PTX of the newest.

    Args:
        requested: of ``requested_architectures``; empty where nothing was asked for.
        known: of ``known_architectures``.
        capabilities: of the visible GPUs, as in "9.0".

    Raises:
        ValueError: nvcc does not know a requested architecture.
    """
    known = tuple(known)
    for name in requested:
        if str(number(name)) not in known:
            raise ValueError(f"RESLORA_CUDA_ARCHS: this nvcc knows {', '.join(known)}, got {name!r}")
    if requested:
        return requested
    visible = sorted({capability.replace(".", "") for capability in capabilities}, key=int)
    if visible and all(name in known and int(name) >= OLDEST_ARCHITECTURE for name in visible):
        return tuple(WITH_SUFFIX.get(name, name) for name in visible)
    *older, newest = [name for name in USUAL_ARCHITECTURES if str(number(name)) in known] or known
    return (*older, f"{newest}+PTX")


def number(name: str) -> int:
    """The architecture without suffix and PTX: 90 for "90a+PTX"."""
    return int(re.sub(r"\D", "", name))


def code_options(names: Iterable[str]) -> list[str]:
    """nvcc's options for these architectures. PTX is made without suffix, or newer chips could not use it."""
    options = []
    for name in names:
        target = name.removesuffix("+PTX")
        options.append(f"-gencode=arch=compute_{target},code=sm_{target}")
        if name != target:
            options.append(f"-gencode=arch=compute_{number(name)},code=compute_{number(name)}")
    return options


def runs_on(name: str, capability: str) -> bool:
    """Whether binary code runs on a GPU: of the same generation and not newer; with the suffix a, the very same."""
    major, minor = (int(part) for part in capability.split("."))
    name = name.removesuffix("+PTX")
    if name.endswith("a"):
        return number(name) == 10 * major + minor
    return number(name) // 10 == major and number(name) % 10 <= minor


def find_driver() -> Driver | None:
    """The NVIDIA driver, asked through its own library, so that no tool need be installed; None where there is none."""
    try:
        library = ctypes.CDLL(LIBCUDA)
        version = ask(library.cuDriverGetVersion)
    except (OSError, AttributeError):
        return None
    if version is None:
        return None
    capabilities = []
    if library.cuInit(0) == 0:
        for index in range(ask(library.cuDeviceGetCount) or 0):
            device = ask(library.cuDeviceGet, index)
            # 75 and 76: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
            major, minor = (ask(library.cuDeviceGetAttribute, attribute, device) for attribute in (75, 76))
            capabilities.append(f"{major}.{minor}")
    return Driver(f"{version // 1000}.{version % 1000 // 10}", tuple(capabilities))


def ask(function: Callable[..., int], *arguments: Any) -> int | None:
    """The integer that a function of the driver returns through its first argument; None where it fails."""
    answer = ctypes.c_int()
    return answer.value if function(ctypes.byref(answer), *arguments) == 0 else None

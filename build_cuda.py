"""Compiles csrc/ to the extension module with nvcc, through ninja. setup.py runs this file.

python build_cuda.py    puts both extensions and the record of their build beside the sources, where pip cannot
"""

from __future__ import annotations

import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent
TOOLCHAIN = SimpleNamespace(**runpy.run_path(str(ROOT / "reslora_kernels/cli/toolchain.py")))
MODULE = f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
COMPILE = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden"]
# Local symbols: torch loads a CUDA runtime of its own, which must not be mixed up with the static one in here.
LINK = ["-shared", "-cudart=static", "-Xlinker=--strip-all,--exclude-libs=ALL"]


def compile_extension(folder: Path, requested: tuple[str, ...], jobs: int) -> tuple[str, ...]:
    """Makes MODULE in ``folder``, with at most ``jobs`` compilers at a time.

    Args:
        requested: architectures, of ``toolchain.requested_architectures``; empty: those of this machine.

    Returns:
        The architectures, with "+PTX" where there is PTX too.

    Raises:
        ValueError: nvcc does not know a requested architecture.
        RuntimeError: it cannot be built here; the message says why.
    """
    nvcc, cxx = TOOLCHAIN.require_compilers()
    driver = TOOLCHAIN.find_driver()
    known = TOOLCHAIN.known_architectures(nvcc)
    architectures = TOOLCHAIN.choose_architectures(requested, known, driver.capabilities if driver else ())
    (folder / "build.ninja").write_text(build_steps([nvcc, "-ccbin", cxx], architectures, jobs), encoding="utf-8")
    run_ninja([sys.executable, "-m", "ninja", "-C", str(folder), f"-j{jobs}"])
    return architectures


def place(package: Path, compile_in: Callable[[Path], tuple[str, ...]], host: dict[str, Any]) -> tuple[str, ...]:
    """Puts MODULE, which ``compile_in`` makes in a folder, and the record of that into ``package``; older ones go.

    Args:
        host: what ``build_host.place`` gave, for the record.

    Returns:
        The architectures; none where ``compile_in`` raised a RuntimeError, which is then in the record.
    """
    for stale in (*package.glob("_cuda*.so"), *package.glob("_build_info.py")):
        stale.unlink()
    architectures: tuple[str, ...] = ()
    reason = "built"
    with tempfile.TemporaryDirectory(prefix="reslora_cuda_") as folder:
        try:
            architectures = compile_in(Path(folder))
            shutil.copy(Path(folder, MODULE), package)
        except RuntimeError as error:
            reason = str(error)
    nvcc = TOOLCHAIN.find_nvcc()
    record = {
        "CUDA_BUILT": bool(architectures),
        "CUDA_REASON": reason,
        "CUDA_ARCHS": architectures,
        "NVCC": nvcc and TOOLCHAIN.compiler_version(nvcc),
        "PYTHON": platform.python_version(),
        **host,
    }
    lines = ['"""Written by build_cuda.py when the package was built."""', ""]
    lines += [f"{name} = {value!r}" for name, value in record.items()]
    (package / "_build_info.py").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return architectures


def compile_requested(folder: Path) -> tuple[str, ...]:
    """``compile_extension`` as RESLORA_CUDA_ARCHS and MAX_JOBS say."""
    requested = TOOLCHAIN.requested_architectures(os.environ.get("RESLORA_CUDA_ARCHS", ""))
    return compile_extension(folder, requested, job_limit(os.environ.get("MAX_JOBS", "")))


def job_limit(request: str) -> int:
    """MAX_JOBS as a number, by default that of the CPUs; ValueError if it is none."""
    if request and not (request.isdecimal() and int(request) > 0):
        raise ValueError(f"MAX_JOBS must be a positive whole number, got {request!r}")
    return int(request) if request else os.cpu_count() or 1


def build_steps(nvcc: list[str], architectures: tuple[str, ...], jobs: int) -> str:
    """The ninja file: each source of csrc/ to an object, the objects to MODULE."""
    kernels = {path: architectures for path in ROOT.glob("csrc/*.cu")}
    hopper = ("90a",) if {"90a", "90a+PTX"} & set(architectures) else ()
    kernels |= {path: hopper for path in kernels if for_sm90(path)}
    kernels = {path: names for path, names in kernels.items() if names}
    macros = ["-DRESLORA_HAS_SM90"] if any(map(for_sm90, kernels)) else []
    objects = {ROOT / "csrc/bindings.cpp": [f"-I{folder}" for folder in include_folders()]}
    threads = max(1, jobs // (1 + len(kernels)))  # architectures that each nvcc compiles for at a time
    for path in sorted(kernels, key=lambda path: -path.stat().st_size):  # the longest first, not last and alone
        objects[path] = [*TOOLCHAIN.code_options(kernels[path]), f"--threads={threads}"]
    lines = ["rule run", "  command = $compiler $in -o $out"]
    for path, options in objects.items():
        escaped = re.sub(r"([$ :])", r"$\1", str(path))
        lines += [f"build {path.name}.o: run {escaped}"]
        lines += [f"  compiler = {shell([*nvcc, *COMPILE, *macros, *options, '-c'])}"]
    lines += [f"build {MODULE}: run {' '.join(f'{path.name}.o' for path in objects)}"]
    lines += [f"  compiler = {shell([*nvcc, *LINK])}"]
    return "\n".join(lines) + "\n"


def for_sm90(path: Path) -> bool:
    return path.stem.endswith("_sm90")


def include_folders() -> tuple[str, str]:
    try:
        import pybind11
    except ImportError:
        raise RuntimeError("pybind11 is not installed") from None
    return pybind11.get_include(), sysconfig.get_path("include")


def shell(command: list[str]) -> str:
    """The command as a shell reads it, in a ninja file."""
    return shlex.join(command).replace("$", "$$")


def run_ninja(command: list[str]) -> None:
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as ninja:
        for line in ninja.stdout or ():
            print(line, end="", flush=True)
            lines.append(line.strip())
    if ninja.returncode:
        said = [line for line in lines if line and not line.startswith("ninja: build stopped")]
        errors = [line for line in said if re.search(r"\b(error|fatal|no module)\b", line, re.IGNORECASE)]
        raise RuntimeError(f"the build failed: {[*errors, *said[-1:], 'ninja said nothing'][0]}")


if __name__ == "__main__":
    package = ROOT / "reslora_kernels"
    host = runpy.run_path(str(ROOT / "build_host.py"))["place"](package)
    if not place(package, compile_requested, host):
        raise SystemExit(runpy.run_path(str(package / "_build_info.py"))["CUDA_REASON"])

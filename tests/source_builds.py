"""Builds of a copied source tree, with a stand-in for nvcc and one for the NVIDIA driver."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from . import processes

ROOT = Path(__file__).parents[1]
BUILD_VARIABLES = ("RESLORA_CUDA", "RESLORA_CUDA_ARCHS", "RESLORA_HOST", "MAX_JOBS")
BUILD_VARIABLES += ("CUDA_HOME", "CUDA_PATH", "CXX", "LD_LIBRARY_PATH")
CXX = shutil.which("g++") or ""
HOOK = "import sys, setuptools.build_meta as hooks; getattr(hooks, f'build_{sys.argv[1]}')(sys.argv[2])"

# Notes each call, with the time at which it starts and ends, in the folder above its own; compiles nothing.
FAKE_NVCC = """
case "$1" in
  --version) echo "Cuda compilation tools, release {version}, V{version}.99"; exit ;;
  --list-gpu-arch) printf 'compute_%s\\n' {known}; exit ;;
esac
log="$(dirname "$0")/../calls"
echo "start $*" >> "$log"
{action}
echo "end" >> "$log"
while [ $# -gt 1 ]; do
  [ "$1" = -o ] && echo made by a stand-in > "$2"
  shift
done
exit 0
"""

# What toolchain.find_driver() calls of libcuda, for one GPU.
FAKE_DRIVER = """
extern "C" int cuDriverGetVersion(int* version) {{ *version = {version}; return 0; }}
extern "C" int cuInit(unsigned flags) {{ return {status}; }}
extern "C" int cuDeviceGetCount(int* count) {{ *count = 1; return 0; }}
extern "C" int cuDeviceGet(int* device, int index) {{ *device = 40 + index; return 0; }}
extern "C" int cuDeviceGetAttribute(int* value, int attribute, int device) {{
    *value = attribute == 75 ? {capability} / 10 : {capability} % 10;
    return device == 40 && (attribute == 75 || attribute == 76) ? 0 : 1;
}}
"""


def copy_source(folder: Path) -> Path:
    """What git would track, in ``folder``."""
    skipped = shutil.ignore_patterns(
        ".*", "build", "dist", "*.egg-info", "__pycache__", "results", "_build_info.py", "*.so"
    )
    return Path(shutil.copytree(ROOT, folder, ignore=skipped))


def environment(**variables: str) -> dict[str, str]:
    """This process's environment with nothing that steers a build but ``variables``."""
    return {name: value for name, value in os.environ.items() if name not in BUILD_VARIABLES} | variables


def run(command: list[str], source: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return processes.run(command, cwd=source, env=environment(**variables))


def build(kind: str, source: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A "wheel", "sdist" or "editable" by setuptools' hook, without isolation; it lies in ``out`` beside source."""
    (source.parent / "out").mkdir(exist_ok=True)
    return run([sys.executable, "-c", HOOK, kind, str(source.parent / "out")], source, **variables)


def built_wheel(source: Path) -> Path:
    (wheel,) = (source.parent / "out").glob("*.whl")
    return wheel


def names_in(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def record_of(wheel: Path) -> dict[str, Any]:
    """The wheel's _build_info.py."""
    with zipfile.ZipFile(wheel) as archive:
        return runpy.run_path(archive.extract("reslora_kernels/_build_info.py", wheel.parent / "unpacked"))


def script(path: Path, body: str) -> Path:
    """An executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def fake_nvcc(home: Path, action: str = ":", version: str = "13.0", known: str = "75 80 86 89 90 100 120") -> Path:
    """A CUDA_HOME whose nvcc does ``action`` instead of compiling."""
    script(home / "bin/nvcc", FAKE_NVCC.format(version=version, known=known, action=action))
    return home


def calls(home: Path) -> list[str]:
    """What the stand-in for nvcc was called with, in order, and "end" for each."""
    return (home / "calls").read_text().splitlines()


def fake_driver(folder: Path, version: int = 13000, capability: int = 90, status: int = 0) -> Path:
    """A libcuda.so.1 in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    code = FAKE_DRIVER.format(version=version, capability=capability, status=status)
    command = [CXX, "-shared", "-fPIC", "-x", "c++", "-", "-o", str(folder / "libcuda.so.1")]
    path = os.pathsep.join((str(Path(CXX).parent), os.defpath))
    processes.run(command, env=os.environ | {"PATH": path}, input=code, check=True)
    return folder / "libcuda.so.1"

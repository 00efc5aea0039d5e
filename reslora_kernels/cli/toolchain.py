"""Which compilers this machine has. Standard library only: setup.py runs this file before anything is installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path


def find_nvcc() -> str | None:
    """Path of nvcc: under CUDA_HOME or CUDA_PATH, then on PATH, then under /usr/local/cuda; None if there is none."""
    for root in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if root and (Path(root) / "bin/nvcc").is_file():
            return str(Path(root) / "bin/nvcc")
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def find_cxx() -> str | None:
    """Path of the C++ compiler: what CXX names, else g++, clang++ or c++; None if there is none."""
    names = [os.environ.get("CXX"), "g++", "clang++", "c++"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


def compiler_version(path: str) -> str | None:
    """The version that ``path --version`` reports, as in "13.0"; None where it cannot be run or says none."""
    try:
        finished = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"release (\d+[.\d]*)", finished.stdout) or re.search(r"(\d+\.[.\d]*\d)", finished.stdout)
    return found.group(1) if found else None

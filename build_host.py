"""Compiles csrc/host.cpp with the C++ compiler alone, in seconds. setup.py runs this file, and build_cuda.py.

RESLORA_HOST: auto (the default) compiles if possible and records why not, 1 fails if impossible, 0 skips.
"""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent
TOOLCHAIN = SimpleNamespace(**runpy.run_path(str(ROOT / "reslora_kernels/cli/toolchain.py")))
MODULE = f"_host{sysconfig.get_config_var('EXT_SUFFIX')}"
OPTIONS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread", "-shared", "-s"]


def place(package: Path) -> dict[str, Any]:
    """Puts MODULE into ``package``, as RESLORA_HOST asks; older ones go.

    Returns:
        What the record of the build says of it.

    Raises:
        SystemExit: RESLORA_HOST is none of its values, or 1 where it cannot be built.
    """
    request = os.environ.get("RESLORA_HOST") or "auto"
    if request not in ("auto", "1", "0"):
        raise SystemExit(f"RESLORA_HOST must be 'auto', '1' or '0', got {request!r}")
    for stale in package.glob("_host.*.so"):
        stale.unlink()
    reason = "RESLORA_HOST=0 at build time" if request == "0" else built_in(package)
    if reason and request == "1":
        raise SystemExit(f"RESLORA_HOST=1 asks for the host extension, but {reason}")
    if reason and request == "auto":
        print(f"warning: no host extension in this build: {reason}", file=sys.stderr)
    return {"HOST_BUILT": not reason, "HOST_REASON": reason or "built"}


def built_in(package: Path) -> str | None:
    """Compiles MODULE into ``package``; why it could not be, if it could not."""
    cxx = TOOLCHAIN.find_cxx()
    if sys.platform != "linux":
        return f"it is built on Linux only, this is {sys.platform}"
    if cxx is None:
        return "no C++ compiler: none of CXX, g++, clang++, c++ was found"
    with tempfile.TemporaryDirectory(prefix="reslora_host_") as folder:
        made = Path(folder, MODULE)
        include = f"-I{sysconfig.get_path('include')}"
        command = [cxx, *OPTIONS, include, str(ROOT / "csrc/host.cpp"), "-o", str(made), "-ldl"]
        finished = subprocess.run(command, capture_output=True, text=True)
        if finished.returncode:
            errors = [line.strip() for line in finished.stderr.splitlines() if "error" in line]
            return f"the build failed: {[*errors, finished.stderr.strip(), 'the compiler said nothing'][0]}"
        shutil.copy(made, package)
    return None

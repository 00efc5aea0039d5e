"""Build hook: decides what RESLORA_CUDA asks for and records the outcome in reslora_kernels/_build_info.py."""

from __future__ import annotations

import os
import platform
import runpy
import tempfile
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
TOOLCHAIN = runpy.run_path(str(ROOT / "reslora_kernels/cli/toolchain.py"))
NO_SOURCES = "this release has no CUDA sources (no .cu file in csrc/)"


def cuda_outcome(request: str) -> str:
    """Why there is no CUDA extension, for RESLORA_CUDA = ``request``; stops the build where one was insisted on."""
    if request not in ("auto", "1", "0"):
        raise SystemExit(f"RESLORA_CUDA must be 'auto', '1' or '0', got {request!r}")
    if request == "1":
        raise SystemExit(f"RESLORA_CUDA=1 asks for the CUDA extension, but {NO_SOURCES}; use RESLORA_CUDA=auto or 0")
    return "RESLORA_CUDA=0 at build time" if request == "0" else NO_SOURCES


class BuildWithRecord(build_py):
    """Copies the package, then adds the record: to the build folder, or in place for an editable install."""

    def run(self) -> None:
        nvcc = TOOLCHAIN["find_nvcc"]()
        record = {
            "CUDA_BUILT": False,
            "CUDA_REASON": cuda_outcome(os.environ.get("RESLORA_CUDA", "auto")),
            "NVCC": nvcc and TOOLCHAIN["compiler_version"](nvcc),
            "PYTHON": platform.python_version(),
        }
        super().run()
        root = ROOT if self.editable_mode else Path(self.build_lib)
        lines = ['"""Written by setup.py when the package was built."""', ""]
        lines += [f"{name} = {value!r}" for name, value in record.items()]
        (root / "reslora_kernels/_build_info.py").write_text("\n".join(lines) + "\n", encoding="utf-8")


# A fresh build folder each time: a left-over one would ship files that the source no longer has.
with tempfile.TemporaryDirectory(prefix="reslora_kernels_") as build_base:
    setup(cmdclass={"build_py": BuildWithRecord}, options={"build": {"build_base": build_base}})

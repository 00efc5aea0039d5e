"""Builds the extensions as RESLORA_CUDA and RESLORA_HOST say; reslora_kernels/_build_info.py records the outcome."""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
CUDA = SimpleNamespace(**runpy.run_path(str(ROOT / "build_cuda.py")))
HOST = SimpleNamespace(**runpy.run_path(str(ROOT / "build_host.py")))


def build_cuda(folder: Path) -> tuple[str, ...]:
    """Compiles the extension in ``folder`` for the architectures that it returns; RuntimeError says why it did not."""
    request = os.environ.get("RESLORA_CUDA") or "auto"
    if request not in ("auto", "1", "0"):
        raise SystemExit(f"RESLORA_CUDA must be 'auto', '1' or '0', got {request!r}")
    if request == "0":
        raise RuntimeError("RESLORA_CUDA=0 at build time")
    try:
        return CUDA.compile_requested(folder)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    except RuntimeError as error:
        if request == "1":
            raise SystemExit(f"RESLORA_CUDA=1 asks for the CUDA extension, but {error}") from None
        print(f"warning: no CUDA extension in this build: {error}", file=sys.stderr)
        raise


class PlatformWheel(Distribution):
    """A wheel is for this platform once it holds an extension, which is known only after the build."""

    extension_built = False

    def has_ext_modules(self) -> bool:
        return self.extension_built


class BuildWithExtension(build_py):
    """Copies the package, then adds extension and record: to the build folder, or in place for an editable install."""

    def run(self) -> None:
        super().run()
        package = (ROOT if self.editable_mode else Path(self.build_lib)) / "reslora_kernels"
        host = HOST.place(package)
        architectures = CUDA.place(package, build_cuda, host)
        if (architectures or host["HOST_BUILT"]) and not self.editable_mode:
            self.distribution.extension_built = True
            self.get_finalized_command("bdist_wheel").root_is_pure = False


# A fresh build folder each time: a left-over one would ship files that the source no longer has.
with tempfile.TemporaryDirectory(prefix="reslora_kernels_") as build_base:
    setup(
        distclass=PlatformWheel,
        cmdclass={"build_py": BuildWithExtension},
        options={"build": {"build_base": build_base}},
    )

"""Wheel and sdist: built in isolation, without torch, with everything in them; RESLORA_CUDA is honoured or refused."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GOLDEN = sorted(path.name for path in (ROOT / "reslora_kernels/golden").glob("*.safetensors"))
STALE = "CUDA_REASON = 'stale'\n"

pytestmark = pytest.mark.slow


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what git would track, plus a left-over record that a build must not ship."""
    skipped = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "results")
    copy = Path(shutil.copytree(ROOT, tmp_path / "source", ignore=skipped))
    (copy / "reslora_kernels/_build_info.py").write_text(STALE)
    return copy


def pip_wheel(source: Path, request: str) -> subprocess.CompletedProcess[str]:
    """``pip wheel`` with build isolation, so that the build sees setuptools and no torch."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--wheel-dir",
        str(source.parent / "out"),
        str(source),
    ]
    environment = {**os.environ, "RESLORA_CUDA": request}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


def record_of(wheel: Path, folder: Path) -> dict[str, object]:
    with zipfile.ZipFile(wheel) as archive:
        return runpy.run_path(archive.extract("reslora_kernels/_build_info.py", folder))


def test_wheel_has_everything(source: Path) -> None:
    finished = pip_wheel(source, "auto")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (wheel,) = (source.parent / "out").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    modules = {path.relative_to(source).as_posix() for path in (source / "reslora_kernels").rglob("*.py")}
    assert modules <= set(names)
    assert sorted(Path(name).name for name in names if "/golden/" in name) == GOLDEN
    assert "reslora_kernels/py.typed" in names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "csrc/"))]
    record = record_of(wheel, source.parent)
    assert record["CUDA_BUILT"] is False
    assert "no CUDA sources" in str(record["CUDA_REASON"])
    assert (source / "reslora_kernels/_build_info.py").read_text() == STALE
    assert not (source / "build").exists()


def test_zero_skips_the_extension(source: Path) -> None:
    finished = pip_wheel(source, "0")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (wheel,) = (source.parent / "out").glob("*.whl")
    assert "RESLORA_CUDA=0" in str(record_of(wheel, source.parent)["CUDA_REASON"])


@pytest.mark.parametrize(
    ("request_value", "message"),
    [("1", "no CUDA sources"), ("yes", "must be 'auto', '1' or '0', got 'yes'")],
    ids=["insisted on", "not a value"],
)
def test_build_fails_loudly(source: Path, request_value: str, message: str) -> None:
    finished = pip_wheel(source, request_value)
    assert finished.returncode != 0
    assert message in finished.stdout + finished.stderr


def test_sdist_has_tests_sources_and_golden_vectors(source: Path) -> None:
    command = [sys.executable, "-m", "build", "--sdist", "--outdir", str(source.parent / "out"), str(source)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (sdist,) = (source.parent / "out").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"reslora_kernels/golden/{name}" for name in GOLDEN} <= names
    assert {"csrc/README.md", "tests/test_build.py", "setup.py", "constraints.txt", "Makefile", "LICENSE"} <= names
    assert "reslora_kernels/_build_info.py" not in names

"""Wheel and sdist: built in isolation, without torch, with everything in them and nothing left over from before."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from reslora_kernels.cli.toolchain import find_nvcc

from .source_builds import (
    ROOT,
    build,
    built_wheel,
    copy_source,
    fake_driver,
    fake_nvcc,
    names_in,
    record_of,
    run,
)

GOLDEN = sorted(path.name for path in (ROOT / "reslora_kernels/golden").glob("*.safetensors"))
STALE = "CUDA_REASON = 'stale'\n"
NO_TORCH = "\nimport importlib.util\nassert importlib.util.find_spec('torch') is None, 'the build sees torch'\n"

needs_sources = pytest.mark.skipif(not any((ROOT / "csrc").glob("*.cu")), reason="this release has no CUDA sources")
pytestmark = pytest.mark.slow


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what git would track; a space in its path. With it, left-overs that a build must not ship."""
    copy = copy_source(tmp_path / "source tree")
    (copy / "reslora_kernels/_build_info.py").write_text(STALE)
    (copy / "reslora_kernels/_cuda.cpython-311-x86_64-linux-gnu.so").write_text("stale")
    left_over = copy / "build/lib.linux-x86_64-cpython-311/reslora_kernels"
    left_over.mkdir(parents=True)
    (left_over / "_cuda.cpython-311-x86_64-linux-gnu.so").write_text("stale")
    return copy


def pip_wheel(source: Path, **variables: str) -> Path:
    """``pip wheel`` with build isolation, so that the build sees setuptools, pybind11 and ninja alone."""
    (source / "setup.py").write_text((source / "setup.py").read_text() + NO_TORCH)
    folder = source.parent / "out"
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(folder), str(source)]
    finished = run(command, source, **variables)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return built_wheel(source)


def test_wheel_has_everything_and_nothing_left_over(source: Path) -> None:
    wheel = pip_wheel(source, RESLORA_CUDA="0")
    names = names_in(wheel)
    modules = {path.relative_to(source).as_posix() for path in (source / "reslora_kernels").rglob("*.py")}
    assert modules <= set(names)
    assert sorted(Path(name).name for name in names if "/golden/" in name) == GOLDEN
    assert "reslora_kernels/py.typed" in names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "csrc/", "build"))]
    assert not [name for name in names if name.endswith(".so")]
    assert wheel.name.endswith("-py3-none-any.whl")
    record = record_of(wheel)
    assert record["CUDA_BUILT"] is False
    assert record["CUDA_REASON"] == "RESLORA_CUDA=0 at build time"
    assert (source / "reslora_kernels/_build_info.py").read_text() == STALE


@needs_sources
def test_extension_needs_system_libraries_alone(source: Path) -> None:
    """The one real build: csrc/ as it is, for one architecture, by this machine's nvcc."""
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc")
    wheel = pip_wheel(source, RESLORA_CUDA="1", RESLORA_CUDA_ARCHS="90a", CUDA_HOME=str(Path(nvcc).parents[1]))
    record = record_of(wheel)
    assert (record["CUDA_BUILT"], record["CUDA_ARCHS"]) == (True, ("90a",))
    (name,) = [name for name in names_in(wheel) if name.endswith(".so")]
    folder = source.parent / "unpacked"
    shutil.unpack_archive(wheel, folder, "zip")
    libraries = subprocess.run(["ldd", folder / name], capture_output=True, text=True, check=True, timeout=60).stdout
    wanted = {Path(line.split()[0]).name.split(".")[0] for line in libraries.splitlines()}
    system = {"linux-vdso", "ld-linux-x86-64", "ld-linux-aarch64", "libc", "libm", "libdl", "librt", "libpthread"}
    assert wanted <= system | {"libstdc++", "libgcc_s"}, libraries
    code = "import sys; sys.path.insert(0, sys.argv[1]); import _cuda; print('torch' in sys.modules, _cuda.__file__)"
    command = [sys.executable, "-I", "-c", code, str((folder / name).parent)]
    finished = run(command, folder, CUDA_VISIBLE_DEVICES="")
    assert finished.stdout.split(maxsplit=1) == ["False", f"{folder / name}\n"], finished.stderr


def sdist_of(source: Path) -> Path:
    finished = build("sdist", source)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (sdist,) = (source.parent / "out").glob("*.tar.gz")
    return sdist


def test_sdist_has_all_sources_and_no_results(source: Path) -> None:
    results = source / "benchmarks/results/set"
    results.mkdir(parents=True)
    (results / "runs.jsonl").write_text("{}\n")
    with tarfile.open(sdist_of(source)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"reslora_kernels/golden/{name}" for name in GOLDEN} <= names
    assert {path.relative_to(source).as_posix() for path in (source / "csrc").iterdir()} <= names
    files = {"tests/test_build.py", "setup.py", "build_cuda.py", "constraints.txt", "Makefile", "LICENSE"}
    assert files <= names
    assert "reslora_kernels/_build_info.py" not in names
    assert not [name for name in names if name.endswith(".so") or name.startswith("benchmarks/results")]


@needs_sources
def test_sdist_builds(source: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist_of(source)) as archive:
        archive.extractall(tmp_path / "sdist", filter="data")
    (unpacked,) = (tmp_path / "sdist").iterdir()
    home = fake_nvcc(tmp_path / "cuda")
    fake_driver(tmp_path / "driver")
    finished = build("wheel", unpacked, RESLORA_CUDA="1", CUDA_HOME=str(home), LD_LIBRARY_PATH=str(tmp_path / "driver"))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert record_of(built_wheel(unpacked))["CUDA_ARCHS"] == ("90a",)


def test_editable_install_drops_a_stale_extension(source: Path) -> None:
    finished = build("editable", source, RESLORA_CUDA="0")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert not list((source / "reslora_kernels").glob("_cuda.*"))
    assert "RESLORA_CUDA=0" in (source / "reslora_kernels/_build_info.py").read_text()

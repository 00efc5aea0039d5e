"""Which compilers, driver and GPUs a machine has, and what the CUDA extension is compiled for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from reslora_kernels.cli import toolchain
from reslora_kernels.cli.toolchain import Driver

from ..source_builds import CXX, fake_driver, script

KNOWN = ("75", "80", "86", "89", "90", "100", "120")
USUAL = ("80", "89", "90a", "100", "120+PTX")


@pytest.fixture(autouse=True)
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiler and no driver, but for what a test adds."""
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(toolchain, "USUAL_NVCC_FOLDER", str(tmp_path / "usr"))
    monkeypatch.setattr(toolchain, "LIBCUDA", str(tmp_path / "libcuda.so.1"))


def test_nvcc_is_where_cuda_home_says_else_on_path_else_in_the_usual_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert toolchain.find_nvcc() is None
    usual = script(tmp_path / "usr/nvcc", "exit 1")
    assert toolchain.find_nvcc() == str(usual)
    on_path = script(tmp_path / "path/nvcc", "exit 1")
    assert toolchain.find_nvcc() == str(on_path)
    ours = script(tmp_path / "home/bin/nvcc", "exit 1")
    for name in ("CUDA_PATH", "CUDA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
        assert toolchain.find_nvcc() == str(ours)
        monkeypatch.setenv(name, str(tmp_path / "elsewhere"))
        assert toolchain.find_nvcc() is None


def test_compiler_version(tmp_path: Path) -> None:
    said = {
        "Cuda compilation tools, release 12.8, V12.8.93": "12.8",
        "g++ (Debian 12.2.0-14) 12.2.0": "12.2.0",
        "": None,
    }
    for output, version in said.items():
        assert toolchain.compiler_version(str(script(tmp_path / "compiler", f'echo "{output}"'))) == version
    assert toolchain.compiler_version(str(script(tmp_path / "compiler", "exit 1"))) is None
    assert toolchain.compiler_version(str(tmp_path / "absent")) is None


def test_cxx_honours_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = script(tmp_path / "path/my-cxx", "exit 1")
    assert toolchain.find_cxx() is None
    monkeypatch.setenv("CXX", "my-cxx")
    assert toolchain.find_cxx() == str(ours)


def test_missing_compilers_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reason() -> str:
        with pytest.raises(RuntimeError) as caught:
            toolchain.require_compilers()
        return str(caught.value)

    assert reason() == "no nvcc on PATH or under CUDA_HOME"
    nvcc = script(tmp_path / "path/nvcc", "echo release 11.8")
    assert reason() == f"nvcc 11.8 ({nvcc}) is too old: 12.0 or newer is needed"
    script(nvcc, "echo release 12.0")
    assert reason() == "no C++ compiler: none of CXX, g++, clang++, c++ was found"
    cxx = script(tmp_path / "path/c++", "exit 1")
    assert toolchain.require_compilers() == (str(nvcc), str(cxx))
    monkeypatch.setattr(sys, "platform", "win32")
    assert reason() == "it is built on Linux only, this is win32"


def test_requested_architectures() -> None:
    assert toolchain.requested_architectures("") == ()
    assert toolchain.requested_architectures(" 80;90a , 120+PTX;80;") == ("80", "90a", "120+PTX")


@pytest.mark.parametrize("entry", ["9.0", "sm_90", "90A", "90+ptx", "all", "8", "1200", "90 100"])
def test_what_is_no_architecture_is_refused(entry: str) -> None:
    with pytest.raises(ValueError, match=r'must read like "80;90a;120\+PTX", got ') as caught:
        toolchain.requested_architectures(f"80;{entry}")
    assert f"got {entry!r} in '80;{entry}'" in str(caught.value)


def test_architecture_before_ampere_is_refused() -> None:
    with pytest.raises(ValueError, match="the kernels need 80 or newer, got '75'"):
        toolchain.requested_architectures("75;80")


@pytest.mark.parametrize(
    ("capabilities", "chosen"),
    [
        ((), USUAL),
        (("9.0", "9.0"), ("90a",)),
        (("12.0", "8.6"), ("86", "120")),
        (("13.0",), USUAL),
        (("7.5",), USUAL),
    ],
    ids=["no GPU", "Hopper twice", "two kinds", "newer than nvcc", "before Ampere"],
)
def test_default_is_the_visible_gpus(capabilities: tuple[str, ...], chosen: tuple[str, ...]) -> None:
    assert toolchain.choose_architectures((), KNOWN, capabilities) == chosen
    assert toolchain.choose_architectures(("80",), KNOWN, capabilities) == ("80",)


def test_usual_architectures_are_those_that_nvcc_knows() -> None:
    assert toolchain.choose_architectures((), ("50", "80", "86", "89", "90"), ()) == ("80", "89", "90a+PTX")
    assert toolchain.choose_architectures((), ("150", "170"), ()) == ("150", "170+PTX")
    with pytest.raises(ValueError, match="this nvcc knows 80, 90, got '100a'"):
        toolchain.choose_architectures(("90a", "100a"), ("80", "90"), ())


@pytest.mark.parametrize(
    ("name", "runs", "fails"),
    [
        ("80", ["8.0", "8.6", "8.9"], ["7.5", "9.0"]),
        ("89", ["8.9"], ["8.6", "12.0"]),
        ("90a", ["9.0"], ["8.9", "10.0"]),
        ("100a", ["10.0"], ["10.3"]),
        ("100f", ["10.0", "10.3"], ["12.0"]),
        ("120+PTX", ["12.0", "12.1"], ["10.0", "13.0"]),
    ],
)
def test_binary_code_runs_on_its_generation(name: str, runs: list[str], fails: list[str]) -> None:
    assert all(toolchain.runs_on(name, capability) for capability in runs)
    assert not any(toolchain.runs_on(name, capability) for capability in fails)


@pytest.mark.skipif(not CXX, reason="needs g++")
@pytest.mark.parametrize(
    ("faked", "found"),
    [
        ({"version": 12080, "capability": 90}, Driver("12.8", ("9.0",))),
        ({"version": 13000, "capability": 121}, Driver("13.0", ("12.1",))),
        ({"version": 13000, "status": 100}, Driver("13.0", ())),
    ],
    ids=["Hopper", "two digits", "no GPU"],
)
def test_driver_is_asked_through_its_library(tmp_path: Path, faked: dict[str, int], found: Driver) -> None:
    fake_driver(tmp_path, **faked)
    assert toolchain.find_driver() == found


def test_no_driver(tmp_path: Path) -> None:
    assert toolchain.find_driver() is None
    Path(toolchain.LIBCUDA).write_text("not a library")
    assert toolchain.find_driver() is None


def test_toolchain_is_standard_library_only() -> None:
    """setup.py runs it in an isolated build, where nothing is installed."""
    command = [sys.executable, "-S", toolchain.__file__]
    assert subprocess.run(command, capture_output=True, timeout=60).returncode == 0

"""``reslora doctor``: what it finds on this machine, and what it says when something is missing or broken."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import reslora_kernels
from reslora_kernels.cli import doctor, main, toolchain


def findings(capsys: pytest.CaptureFixture[str], status: int = 0) -> dict[str, Any]:
    assert main(["doctor", "--json"]) == status
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_json_holds_what_this_machine_has(capsys: pytest.CaptureFixture[str]) -> None:
    found = findings(capsys)
    assert found["reslora_kernels"] == reslora_kernels.__version__
    assert found["python"] == platform.python_version()
    versions = {library["name"]: library["version"] for library in found["libraries"]}
    assert versions["torch"] == torch.__version__
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert {backend["backend"]: backend["passed"] for backend in found["backends"]}["torch"] is True
    assert found["healthy"] is True


def test_tables_show_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    for word in ("Libraries", "GPUs", "Compilers", "Backends", "CUDA extension", "works", torch.__version__):
        assert word in output


def test_missing_library_names_the_pip_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def version(name: str) -> str:
        if name in ("peft", "matplotlib", "triton"):
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(doctor, "installed_version", version)
    fixes = {row["gap"]: row["fix"] for row in findings(capsys)["fixes"]}
    assert fixes["peft is not installed"] == 'pip install "reslora_kernels[hf]"'
    assert fixes["matplotlib is not installed"] == 'pip install "reslora_kernels[plots]"'
    assert "triton is not installed" not in fixes
    assert main(["doctor"]) == 0
    assert 'pip install "reslora_kernels[hf]"' in capsys.readouterr().out


def test_backend_that_fails_is_unhealthy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(case: Any, backend: str) -> Any:
        return SimpleNamespace(failure="RuntimeError: illegal instruction", error=float("nan"), dtype="float64")

    monkeypatch.setattr(doctor, "check_case", broken)
    found = findings(capsys, status=1)
    assert found["healthy"] is False
    assert "the torch backend fails its smoke test" in [row["gap"] for row in found["fixes"]]
    assert main(["doctor"]) == 1
    assert "FAILS" in capsys.readouterr().out


def test_source_tree_without_a_build_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reslora_kernels._build_info", None)
    assert doctor.build_record()["reason"] == "running from a source tree, not built"


def test_build_record_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    record = SimpleNamespace(CUDA_BUILT=False, CUDA_REASON="RESLORA_CUDA=0 at build time", NVCC="13.0", PYTHON="3.11.7")
    monkeypatch.setitem(sys.modules, "reslora_kernels._build_info", record)
    expected = {"cuda_built": False, "reason": record.CUDA_REASON, "nvcc": "13.0", "python": "3.11.7"}
    assert doctor.build_record() == expected


def test_gpu_that_torch_cannot_use_is_a_gap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script(tmp_path / "nvidia-smi", "echo 580.65.06; echo 580.65.06")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor, "find_gpus", list)
    found = findings(capsys)
    assert found["driver"] == "580.65.06"
    (fix,) = [row["fix"] for row in found["fixes"] if row["gap"] == "torch cannot use the GPU of this machine"]
    assert ("CUDA build of torch" in fix) == (torch.version.cuda is None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "must support CUDA 13.0" in doctor.gpu_fix()


def test_driver_that_cannot_be_asked_counts_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path / "nvidia-smi", "echo no devices were found; exit 6")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.driver_version() is None


def test_gpus_are_described(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    properties = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert doctor.find_gpus() == [doctor.Gpu("NVIDIA H100", "9.0", 80.0)]
    assert main(["doctor"]) == 0
    assert "compute capability 9.0, 80.0 GiB" in capsys.readouterr().out


def test_nvcc_is_found_under_cuda_home_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = script(tmp_path / "home/bin/nvcc", 'echo "Cuda compilation tools, release 12.8, V12.8.93"')
    other = script(tmp_path / "path/nvcc", "exit 1")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(other.parent))
    assert toolchain.find_nvcc() == str(ours)
    assert toolchain.compiler_version(str(ours)) == "12.8"
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.delenv("CUDA_PATH", raising=False)
    assert toolchain.find_nvcc() == str(other)
    assert toolchain.compiler_version(str(other)) is None
    assert toolchain.compiler_version(str(tmp_path / "absent")) is None


def test_cxx_honours_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path / "my-cxx", 'echo "my-cxx (Debian 12.2.0-14) 12.2.0"')
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert toolchain.find_cxx() is None
    monkeypatch.setenv("CXX", "my-cxx")
    assert toolchain.find_cxx() == str(tmp_path / "my-cxx")


def test_toolchain_is_standard_library_only() -> None:
    """setup.py runs it in an isolated build, where nothing is installed."""
    command = [sys.executable, "-S", toolchain.__file__]
    assert subprocess.run(command, capture_output=True, timeout=60).returncode == 0

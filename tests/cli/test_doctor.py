"""``reslora doctor``: what it finds on this machine, and what it says when something is missing or broken."""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import reslora_kernels
from reslora_kernels.cli import doctor, main
from reslora_kernels.cli.toolchain import Driver


def findings(capsys: pytest.CaptureFixture[str], status: int = 0) -> dict[str, Any]:
    assert main(["doctor", "--json"]) == status
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_json_holds_what_this_machine_has(capsys: pytest.CaptureFixture[str]) -> None:
    found = findings(capsys)
    assert found["reslora_kernels"] == reslora_kernels.__version__
    assert found["python"] == platform.python_version()
    versions = {library["name"]: library["version"] for library in found["libraries"]}
    assert versions["torch"] == installed_version("torch")
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert {backend["backend"]: backend["passed"] for backend in found["backends"]}["torch"] is True
    assert found["healthy"] is True


def test_tables_show_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    for word in ("Libraries", "GPUs", "Compilers", "Backends", "CUDA extension", "works", installed_version("torch")):
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


def test_build_record_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    record = SimpleNamespace(
        CUDA_BUILT=True, CUDA_REASON="built", CUDA_ARCHS=("80", "90a+PTX"), NVCC="13.0", PYTHON="3.11.7"
    )
    monkeypatch.setitem(sys.modules, "reslora_kernels._build_info", record)
    expected = {"cuda_built": True, "reason": "built", "architectures": ["80", "90a+PTX"], "nvcc": "13.0"}
    assert doctor.build_record() == expected | {"python": "3.11.7"}
    assert main(["doctor"]) == 0
    assert "built by nvcc 13.0 for 80, 90a+PTX" in capsys.readouterr().out
    record.CUDA_BUILT, record.CUDA_REASON = False, "no nvcc on PATH"
    assert main(["doctor"]) == 0
    assert "not built: no nvcc on PATH" in capsys.readouterr().out


def test_gpu_that_torch_cannot_use_is_a_gap(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "find_driver", lambda: Driver("13.0", ("9.0",)))
    monkeypatch.setattr(doctor, "find_gpus", list)
    found = findings(capsys)
    assert found["driver"] == {"cuda": "13.0", "capabilities": ["9.0"]}
    (fix,) = [row["fix"] for row in found["fixes"] if row["gap"] == "torch cannot use the GPU of this machine"]
    assert ("CUDA build of torch" in fix) == (torch.version.cuda is None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "must support CUDA 13.0" in doctor.gpu_fix()


def test_driver_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for driver, words in ((Driver("12.8", ()), "serves CUDA up to 12.8"), (None, "none")):
        monkeypatch.setattr(doctor, "find_driver", lambda driver=driver: driver)
        assert main(["doctor"]) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "driver" in line]
        assert words in line


BUILT = {"cuda_built": True, "reason": "built", "architectures": ["80", "90a", "100+PTX"], "nvcc": "12.8"}
HERE = "`RESLORA_CUDA=1 pip install --force-reinstall --no-deps .` in the source folder"


@pytest.mark.parametrize(
    ("driver", "gap", "fix"),
    [
        (None, None, None),
        (Driver("12.8", ()), None, None),
        (Driver("12.8", ("9.0",)), None, None),
        (Driver("13.1", ("8.6", "12.0")), None, None),
        (Driver("12.4", ("8.0",)), None, None),
        (Driver("12.8", ("7.5",)), None, None),
        (
            Driver("11.8", ("8.0",)),
            "the driver serves CUDA up to 11.8, the CUDA extension was built with 12.8",
            "update the NVIDIA driver to one for CUDA 12.8 or newer",
        ),
        (
            Driver("12.4", ("12.0",)),
            "the driver, of CUDA 12.4, cannot compile the extension's PTX of 12.8 for this GPU",
            f"update the NVIDIA driver to one for CUDA 12.8 or newer, or run {HERE} on this machine",
        ),
    ],
    ids=["no driver", "no GPU", "same", "binary and PTX", "minor versions mix", "too old", "old driver", "no PTX"],
)
def test_driver_and_build_go_together(driver: Driver | None, gap: str | None, fix: str | None) -> None:
    gaps = doctor.extension_gaps(BUILT, driver)
    assert list(gaps) == ([gap] if gap else [])
    assert all(found.startswith(fix or "") for found in gaps.values())


def test_gpu_that_was_not_built_for_is_a_gap() -> None:
    build = BUILT | {"architectures": ["80", "90a"]}
    gap = "the CUDA extension was built for 80, 90a, not for this GPU's compute capability 10.0"
    driver = Driver("13.0", ("10.0", "9.0"))
    assert doctor.extension_gaps(build, driver) == {gap: f"run {HERE} on this machine"}


def test_missing_extension_is_a_gap_where_a_gpu_could_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver("13.0", ("9.0",))
    build = {"cuda_built": False, "reason": "no nvcc on PATH or under CUDA_HOME", "architectures": [], "nvcc": None}
    monkeypatch.setattr(doctor, "find_nvcc", lambda: None)
    gap = f"the CUDA extension is not built: {build['reason']}"
    fix = f"install the CUDA toolkit 12.0 or newer (or point CUDA_HOME at it), then {HERE}"
    assert doctor.extension_gaps(build, driver) == {gap: fix}
    monkeypatch.setattr(doctor, "find_nvcc", lambda: "/usr/local/cuda/bin/nvcc")
    assert doctor.extension_gaps(build, driver) == {gap: f"see to that, then {HERE}"}
    assert doctor.extension_gaps(build | {"reason": "RESLORA_CUDA=0 at build time"}, driver) == {}
    assert doctor.extension_gaps(build, None) == {}


def test_gpus_are_described(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    properties = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert doctor.find_gpus() == [doctor.Gpu("NVIDIA H100", "9.0", 80.0)]
    assert main(["doctor"]) == 0
    assert "compute capability 9.0, 80.0 GiB" in capsys.readouterr().out

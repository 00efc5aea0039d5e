"""``reslora doctor``: compilers, driver, GPUs and backends that it finds; what it says of what is missing or broken."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import reslora_kernels
from reslora_kernels.backends import cuda, native
from reslora_kernels.cli import doctor, main, toolchain
from reslora_kernels.cli.toolchain import Driver

from .. import processes
from ..processes import CXX, fake_driver, script


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
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # which a CUDA build may take from device_count
    assert doctor.find_gpus() == [doctor.Gpu("NVIDIA H100", "9.0", 80.0)]
    assert main(["doctor"]) == 0
    assert "compute capability 9.0, 80.0 GiB" in capsys.readouterr().out


KNOWN = ("75", "80", "86", "89", "90", "100", "120")
USUAL = ("80", "89", "90a", "100", "120+PTX")


@pytest.fixture
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiler and no driver, but for what a test adds."""
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(toolchain, "USUAL_NVCC_FOLDER", str(tmp_path / "usr"))
    monkeypatch.setattr(toolchain, "LIBCUDA", str(tmp_path / "libcuda.so.1"))


@pytest.mark.usefixtures("bare_machine")
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


@pytest.mark.usefixtures("bare_machine")
def test_cxx_honours_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = script(tmp_path / "path/my-cxx", "exit 1")
    assert toolchain.find_cxx() is None
    monkeypatch.setenv("CXX", "my-cxx")
    assert toolchain.find_cxx() == str(ours)


@pytest.mark.usefixtures("bare_machine")
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
@pytest.mark.usefixtures("bare_machine")
def test_driver_is_asked_through_its_library(tmp_path: Path, faked: dict[str, int], found: Driver) -> None:
    fake_driver(tmp_path, **faked)
    assert toolchain.find_driver() == found


@pytest.mark.usefixtures("bare_machine")
def test_no_driver(tmp_path: Path) -> None:
    assert toolchain.find_driver() is None
    Path(toolchain.LIBCUDA).write_text("not a library")
    assert toolchain.find_driver() is None


def test_toolchain_is_standard_library_only() -> None:
    """setup.py runs it in an isolated build, where nothing is installed."""
    command = [sys.executable, "-S", toolchain.__file__]
    assert processes.run(command).returncode == 0


@pytest.fixture
def asked_anew() -> Iterator[None]:
    """Whether the CUDA backend can run here."""
    cuda.unavailable_reason.cache_clear()
    yield
    cuda.unavailable_reason.cache_clear()


@pytest.mark.usefixtures("asked_anew")
def test_no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda: None)
    monkeypatch.setattr(native, "why_not_built", lambda: "no nvcc on PATH or under CUDA_HOME")
    assert cuda.unavailable_reason() == "this build has no CUDA extension (no nvcc on PATH or under CUDA_HOME)"


def test_reason_names_the_command() -> None:
    assert "pip install ." in native.why_not_built()


@pytest.mark.usefixtures("asked_anew")
def test_extension_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ImportError("libstdc++.so.6: version `GLIBCXX_3.4.32' not found")

    monkeypatch.setattr(native, "load", broken)
    reason = cuda.unavailable_reason()
    assert reason is not None and "GLIBCXX" in reason and "pip install" in reason


def test_kernel_that_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver too old, or another architecture: found by a small launch, not by the first training step."""

    def finish(*_: object) -> None:
        raise RuntimeError("CUDA kernel finish[...] failed: no kernel image is available for execution on the device")

    extension = SimpleNamespace(finish=finish, Device=lambda *_: None, Output=lambda *_: None, Sum=lambda *_: None)
    monkeypatch.setattr(native, "load", lambda: extension)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, device: ones(*size))
    reason = native.launch_failure()
    assert reason is not None and "no kernel image" in reason and "RESLORA_CUDA=1" in reason

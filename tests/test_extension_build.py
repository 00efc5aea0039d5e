"""Wheel and sdist in isolation; what RESLORA_CUDA, RESLORA_CUDA_ARCHS, MAX_JOBS make of them, nvcc stood in for."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from reslora_kernels.cli.toolchain import Driver, find_nvcc

from .processes import (
    CXX,
    REPOSITORY,
    build,
    build_environment,
    built_wheel,
    calls,
    copy_source,
    fake_driver,
    fake_nvcc,
    leave_out,
    names_in,
    record_of,
    run,
    run_build,
)

pytestmark = pytest.mark.slow


STALE = "CUDA_REASON = 'stale'\n"
NO_TORCH = "\nimport importlib.util\nassert importlib.util.find_spec('torch') is None, 'the build sees torch'\n"

needs_sources = pytest.mark.skipif(
    not any((REPOSITORY / "csrc").glob("*.cu")), reason="this release has no CUDA sources"
)


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
    finished = run_build(command, source, **variables)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return built_wheel(source)


def test_wheel_has_everything_and_nothing_left_over(source: Path) -> None:
    wheel = pip_wheel(source, RESLORA_CUDA="0", RESLORA_HOST="0")
    names = names_in(wheel)
    modules = {path.relative_to(source).as_posix() for path in (source / "reslora_kernels").rglob("*.py")}
    assert modules <= set(names)
    assert {"reslora_kernels/golden.safetensors", "reslora_kernels/py.typed"} <= set(names)
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "csrc/", "build"))]
    assert not [name for name in names if name.endswith(".so")]
    assert wheel.name.endswith("-py3-none-any.whl")
    record = record_of(wheel)
    assert record["CUDA_BUILT"] is record["HOST_BUILT"] is False
    assert record["CUDA_REASON"] == "RESLORA_CUDA=0 at build time"
    assert record["HOST_REASON"] == "RESLORA_HOST=0 at build time"
    assert (source / "reslora_kernels/_build_info.py").read_text() == STALE


@pytest.mark.skipif(not CXX, reason="needs g++")
def test_host_extension_is_in_the_wheel_and_opens(source: Path) -> None:
    wheel = pip_wheel(source, RESLORA_CUDA="0", RESLORA_HOST="1")
    assert record_of(wheel)["HOST_BUILT"] is True and "-none-any" not in wheel.name
    (name,) = [name for name in names_in(wheel) if name.endswith(".so")]
    folder = source.parent / "unpacked"
    shutil.unpack_archive(wheel, folder, "zip")
    code = "import sys; sys.path.insert(0, sys.argv[1]); from reslora_kernels import host; print(host.module.__file__)"
    finished = run_build([sys.executable, "-I", "-c", code, str(folder)], folder)
    assert finished.stdout == f"{folder / name}\n", finished.stderr


def test_host_extension_that_cannot_be_built_is_left_out_or_insisted_on(source: Path) -> None:
    (source / "csrc/host.cpp").write_text("int broken(")
    finished = build("wheel", source, RESLORA_CUDA="0")
    assert finished.returncode == 0 and "warning: no host extension in this build" in finished.stderr
    record = record_of(built_wheel(source))
    assert record["HOST_BUILT"] is False and "error: expected" in record["HOST_REASON"]
    finished = build("wheel", source, RESLORA_CUDA="0", RESLORA_HOST="1")
    assert finished.returncode and "RESLORA_HOST=1 asks for the host extension, but the build failed" in finished.stderr
    finished = build("wheel", source, RESLORA_CUDA="0", RESLORA_HOST="yes")
    assert finished.returncode and "RESLORA_HOST must be 'auto', '1' or '0', got 'yes'" in finished.stderr


@needs_sources
def test_extension_needs_system_libraries_alone(source: Path) -> None:
    """The one real build: every source of csrc/, for one architecture and type, by this machine's nvcc.

    Without optimization, which changes no name that the linker looks for; test_compile_contract compiles with it.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc")
    leave_out(source / "csrc", "Fp16", "Tf32", "Ieee")
    home, hurried = str(Path(nvcc).parents[1]), "-O0 -Xcicc=-O0 -Xptxas=-O0"  # nvcc heeds the last of each
    built_for = {"RESLORA_CUDA": "1", "RESLORA_CUDA_ARCHS": "90a", "CUDA_HOME": home}
    wheel = pip_wheel(source, **built_for, NVCC_APPEND_FLAGS=hurried)
    record = record_of(wheel)
    assert (record["CUDA_BUILT"], record["CUDA_ARCHS"]) == (True, ("90a",))
    (name,) = [name for name in names_in(wheel) if "/_cuda." in name]
    folder = source.parent / "unpacked"
    shutil.unpack_archive(wheel, folder, "zip")
    libraries = run(["ldd", folder / name], check=True).stdout
    wanted = {Path(line.split()[0]).name.split(".")[0] for line in libraries.splitlines()}
    system = {"linux-vdso", "ld-linux-x86-64", "ld-linux-aarch64", "libc", "libm", "libdl", "librt", "libpthread"}
    assert wanted <= system | {"libstdc++", "libgcc_s"}, libraries
    code = "import sys; sys.path.insert(0, sys.argv[1]); import _cuda; print('torch' in sys.modules, _cuda.__file__)"
    command = [sys.executable, "-I", "-c", code, str((folder / name).parent)]
    finished = run_build(command, folder, CUDA_VISIBLE_DEVICES="")
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
    assert "reslora_kernels/golden.safetensors" in names
    assert {path.relative_to(source).as_posix() for path in (source / "csrc").iterdir()} <= names
    files = {
        "tests/test_extension_build.py",
        "setup.py",
        "build_cuda.py",
        "build_host.py",
        "constraints.txt",
        "Makefile",
        "LICENSE",
    }
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
    stale = source / "reslora_kernels/_host.cpython-39-x86_64-linux-gnu.so"
    stale.write_text("stale")
    finished = build("editable", source, RESLORA_CUDA="0", RESLORA_HOST="0")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert not stale.exists() and not list((source / "reslora_kernels").glob("_cuda.*"))
    assert "RESLORA_CUDA=0" in (source / "reslora_kernels/_build_info.py").read_text()


MODULE = f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
FAILS = 'echo "project.cu(3): error: identifier \\"dh\\" is undefined" >&2; exit 2'
FAILURE = 'the build failed: project.cu(3): error: identifier "dh" is undefined'
USUAL = ("80", "89", "90a", "100", "120+PTX")
HOPPER = "-gencode=arch=compute_90a,code=sm_90a"


class Place(NamedTuple):
    """A source tree whose csrc/ holds three small sources, and a CUDA_HOME with a stand-in for nvcc."""

    source: Path
    home: Path

    def compile(self, *architectures: str, jobs: int = 2, driver: Driver | None = None) -> tuple[str, ...]:
        """Only the compilation, in this process, on a machine with this driver."""
        module = SimpleNamespace(**runpy.run_path(str(self.source / "build_cuda.py")))
        module.TOOLCHAIN.find_driver = lambda: driver
        folder = self.source.parent / "objects"
        folder.mkdir()
        compiled_for: tuple[str, ...] = module.compile_extension(folder, architectures, jobs)
        assert (folder / MODULE).is_file()
        return compiled_for

    def build(self, kind: str = "wheel", **variables: str) -> subprocess.CompletedProcess[str]:
        return build(kind, self.source, CUDA_HOME=str(self.home), **variables)

    def record(self, **variables: str) -> dict[str, Any]:
        finished = self.build(**variables)
        assert finished.returncode == 0, finished.stdout + finished.stderr
        return record_of(built_wheel(self.source))

    def commands(self) -> dict[str, str]:
        """The command line for each source of csrc/, and for "link"."""
        lines = [line for line in calls(self.home) if line.startswith("start")]
        return {line.split("/csrc/")[1].split()[0] if "/csrc/" in line else "link": line for line in lines}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    source = copy_source(tmp_path / "source tree")
    shutil.rmtree(source / "csrc")
    (source / "csrc").mkdir()
    for name in ("bindings.cpp", "project.cu", "matmul_sm90.cu", "params.h"):
        (source / "csrc" / name).write_text("")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    return Place(source, fake_nvcc(tmp_path / "cuda"))


def test_each_source_is_compiled_for_its_architectures(place: Place) -> None:
    assert place.compile("80", "90a", "120+PTX") == ("80", "90a", "120+PTX")
    commands = place.commands()
    assert set(commands) == {"bindings.cpp", "project.cu", "matmul_sm90.cu", "link"}
    codes = {name: [word for word in line.split() if "gencode" in word] for name, line in commands.items()}
    newest = ["-gencode=arch=compute_120,code=sm_120", "-gencode=arch=compute_120,code=compute_120"]
    assert codes["project.cu"] == ["-gencode=arch=compute_80,code=sm_80", HOPPER, *newest]
    assert codes["matmul_sm90.cu"] == [HOPPER]
    assert "-std=c++17 -O3 --expt-relaxed-constexpr" in commands["project.cu"]
    assert "-DRESLORA_HAS_SM90" in commands["bindings.cpp"] and "pybind11" in commands["bindings.cpp"]
    assert "-cudart=static" in commands["link"]


def test_hopper_source_is_left_out_without_90a(place: Place) -> None:
    place.compile("80", "90")
    assert set(place.commands()) == {"bindings.cpp", "project.cu", "link"}
    assert "RESLORA_HAS_SM90" not in place.commands()["bindings.cpp"]


def test_hopper_source_gets_no_ptx(place: Place) -> None:
    place.compile("90a+PTX")
    assert "code=compute_90 " in place.commands()["project.cu"]
    assert [word for word in place.commands()["matmul_sm90.cu"].split() if "gencode" in word] == [HOPPER]


@pytest.mark.parametrize(
    ("driver", "architectures"),
    [(Driver("13.0", ("9.0", "9.0")), ("90a",)), (Driver("13.0", ()), USUAL), (None, USUAL)],
    ids=["two Hopper GPUs", "driver without a GPU", "no driver"],
)
def test_default_is_the_visible_gpu(place: Place, driver: Driver | None, architectures: tuple[str, ...]) -> None:
    assert place.compile(driver=driver) == architectures


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda home: shutil.rmtree(home), "no nvcc under"),
        (lambda home: fake_nvcc(home, version="11.8"), "is too old: 12.0 or newer is needed"),
        (lambda home: fake_nvcc(home, action=FAILS), FAILURE),
        (lambda home: fake_nvcc(home, action="echo out of luck; exit 1"), "the build failed: out of luck"),
        (lambda home: fake_nvcc(home, known=""), "names no architecture"),
        (lambda home: (home / "bin/nvcc").write_text("#!/nowhere\n"), "cannot be run"),
        (lambda home: (home / "../source tree/csrc/bindings.cpp").unlink(), "bindings.cpp', needed by"),
    ],
    ids=["no nvcc", "old nvcc", "error", "other failure", "silent nvcc", "broken nvcc", "no bindings"],
)
def test_why_it_cannot_be_built(place: Place, change: Any, reason: str) -> None:
    change(place.home)
    with pytest.raises(RuntimeError) as caught:
        place.compile()
    assert reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("jobs", [1, 3])
def test_jobs_limit_the_compilers(place: Place, jobs: int) -> None:
    for number in range(3):
        (place.source / f"csrc/more{number}.cu").write_text("")
    fake_nvcc(place.home, action="sleep 0.3")
    place.compile("80", jobs=jobs)
    running, most = 0, 0
    for line in calls(place.home):
        running += 1 if line.startswith("start") else -1
        most = max(most, running)
    assert most == jobs


def test_wheel_with_the_extension_is_for_this_platform(place: Place) -> None:
    record = place.record(RESLORA_CUDA="auto", RESLORA_CUDA_ARCHS="80, 90a;80", MAX_JOBS="6")
    assert (record["CUDA_BUILT"], record["CUDA_ARCHS"], record["NVCC"]) == (True, ("80", "90a"), "13.0")
    assert "--threads=2" in place.commands()["project.cu"]
    wheel = built_wheel(place.source)
    assert f"reslora_kernels/{MODULE}" in names_in(wheel)
    assert not [name for name in names_in(wheel) if ".data/" in name]
    assert "-none-any" not in wheel.name
    assert not list(place.source.glob("build/")) and not (place.source / "reslora_kernels" / MODULE).exists()


@pytest.mark.skipif(not CXX, reason="needs g++, for a stand-in for the driver")
def test_gpu_is_asked_for_through_the_driver(place: Place, tmp_path: Path) -> None:
    fake_driver(tmp_path, capability=86)
    assert place.record(RESLORA_CUDA="1", LD_LIBRARY_PATH=str(tmp_path))["CUDA_ARCHS"] == ("86",)


def test_failure_leaves_a_pure_wheel_or_none_where_insisted_on(place: Place) -> None:
    fake_nvcc(place.home, action=FAILS)
    finished = place.build(RESLORA_CUDA="auto")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert f"warning: no CUDA extension in this build: {FAILURE}\n" in finished.stderr
    wheel = built_wheel(place.source)
    record = record_of(wheel)
    assert (record["CUDA_BUILT"], record["CUDA_REASON"], record["CUDA_ARCHS"]) == (False, FAILURE, ())
    assert wheel.name.endswith("-py3-none-any.whl")
    assert f"reslora_kernels/{MODULE}" not in names_in(wheel)
    wheel.unlink()
    finished = place.build(RESLORA_CUDA="1")
    assert finished.returncode != 0
    assert f"RESLORA_CUDA=1 asks for the CUDA extension, but {FAILURE}\n" in finished.stderr
    assert not list(wheel.parent.glob("*.whl"))


def test_editable_install_builds_in_place_or_fails_loudly(place: Place) -> None:
    built, record = place.source / "reslora_kernels" / MODULE, place.source / "reslora_kernels/_build_info.py"
    finished = place.build("editable", RESLORA_CUDA="1", RESLORA_CUDA_ARCHS="89")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert built.is_file()
    assert "CUDA_ARCHS = ('89',)" in record.read_text()
    shutil.rmtree(place.home)
    finished = place.build("editable", RESLORA_CUDA="1")
    assert finished.returncode != 0
    assert f"no nvcc under {place.home}/bin" in finished.stderr
    assert not built.exists() and not record.exists()


def test_the_script_alone_builds_in_place_where_pip_cannot(place: Place) -> None:
    built, record = place.source / "reslora_kernels" / MODULE, place.source / "reslora_kernels/_build_info.py"
    script, home = [sys.executable, "build_cuda.py"], {"CUDA_HOME": str(place.home)}
    finished = run_build(script, place.source, RESLORA_CUDA_ARCHS="89", **home)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert built.is_file() and "CUDA_ARCHS = ('89',)" in record.read_text()
    shutil.rmtree(place.home)
    finished = run_build(script, place.source, **home)
    assert finished.returncode == 1 and f"no nvcc under {place.home}/bin" in finished.stderr
    assert not built.exists() and "CUDA_BUILT = False" in record.read_text()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RESLORA_CUDA": "yes"}, "RESLORA_CUDA must be 'auto', '1' or '0', got 'yes'"),
        ({"RESLORA_CUDA_ARCHS": "8.0"}, """RESLORA_CUDA_ARCHS must read like "80;90a;120+PTX", got '8.0' in '8.0'"""),
        ({"RESLORA_CUDA_ARCHS": "130"}, "this nvcc knows 75, 80, 86, 89, 90, 100, 120, got '130'"),
        ({"MAX_JOBS": "0"}, "MAX_JOBS must be a positive whole number, got '0'"),
    ],
    ids=["RESLORA_CUDA", "no architecture", "unknown architecture", "MAX_JOBS"],
)
def test_bad_value_stops_the_build(place: Place, variables: dict[str, str], message: str) -> None:
    finished = place.build(**{"RESLORA_CUDA": "auto"} | variables)
    assert finished.returncode != 0
    assert message in finished.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("asked", "passed_on"), [({}, {"0", "auto"}), ({"RESLORA_CUDA": "1"}, {"1"})], ids=["", "asked"]
)
def test_make_compiles_only_for_a_gpu_or_on_request(asked: dict[str, str], passed_on: set[str]) -> None:
    command = ["make", "--dry-run", "--always-make", ".venv/.installed-dev"]
    finished = run(command, cwd=REPOSITORY, env=build_environment(**asked), check=True)
    (line,) = [line for line in finished.stdout.splitlines() if "install" in line and line.startswith("RESLORA_CUDA=")]
    assert line.split()[0].removeprefix("RESLORA_CUDA=") in passed_on

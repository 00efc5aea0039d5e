"""Child processes of the tests: ended when they stand still or never end, however slow a busy machine makes them.

No deadline is a time on the clock. What works uses processor time, however little of it a loaded machine gives; what
waits for something that will not come uses none; what spins uses more than any test needs.

The second half builds a copied source tree, with a stand-in for nvcc and one for the NVIDIA driver.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

REPOSITORY = Path(__file__).parents[1]
LOOK = 2.0  # seconds between two looks at the processes
STILL = 120.0  # seconds over which processes that work use at least WORK of processor time
WORK = 3.0  # two ranks that wait for each other wake for 1 s
SPENT = 1500.0  # seconds of processor time that no test needs


def environment(**changes: str) -> dict[str, str]:
    """For processes that share a small machine: one thread each, no network."""
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **quiet, "PYTHONPATH": str(REPOSITORY), **changes}


def run(
    command: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    input: str | None = None,
    check: bool = False,
) -> subprocess.CompletedProcess[str]:
    """``subprocess.run`` with both outputs as text; AssertionError with the output so far if it had to be ended."""
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(command, cwd=cwd, env=env, text=True, **pipes)
    watch = Watch([process])
    while True:
        try:
            out, err = process.communicate(input, timeout=LOOK)
        except subprocess.TimeoutExpired:
            input = None  # what is not written yet is remembered
            reason = watch.reason_to_end()
            if reason:
                end([process])
                out, err = process.communicate()
                raise AssertionError(f"{reason}: {command}\n{out[-4000:]}\n{err[-4000:]}") from None
        else:
            finished = subprocess.CompletedProcess(command, process.returncode, out, err)
            assert not check or finished.returncode == 0, f"{command}\n{out[-4000:]}\n{err[-4000:]}"
            return finished


def run_ranks(module: str, folder: Path, *arguments: str, count: int = 2, **changes: str) -> list[Report]:
    """Run ``python -m module arguments folder`` as ranks 0 to count - 1; what each found, as far as they came."""
    processes, logs = [], []
    for rank in range(count):
        logs.append(folder / f"log.{rank}")
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # accelerate asks, but uses our group
        env = environment(**place, **changes)
        with logs[-1].open("w") as log:
            command = [sys.executable, "-m", module, *arguments, str(folder)]
            processes.append(subprocess.Popen(command, cwd=REPOSITORY, env=env, stdout=log, stderr=log))
    watch, reason = Watch(processes), ""
    try:
        for process in processes:
            while not reason and not ended(process):
                reason = watch.reason_to_end()
    finally:
        end(processes)
    codes = [process.returncode for process in processes]
    trouble = reason or (f"exit codes {codes}" if any(codes) else "")
    written = "\n".join(log.read_text()[-4000:] for log in logs)
    return [Report(folder / f"report.{rank}.json", f"{trouble}\n{written}" if trouble else "") for rank in range(count)]


class Report(dict[str, dict[str, Any]]):
    """What one rank wrote, by the name of the scenario; asked for one that it never came to, it says what happened."""

    def __init__(self, path: Path, trouble: str) -> None:
        super().__init__(json.loads(path.read_text()) if path.exists() else {})
        self.trouble = trouble

    def __missing__(self, name: str) -> dict[str, Any]:
        return {"traceback": f"it never came to {name!r}: {self.trouble}"}


class Watch:
    """Whether processes and their children still work; a launcher that only looks after its children does not count."""

    def __init__(self, processes: Sequence[subprocess.Popen[Any]]) -> None:
        self.processes = processes
        self.used: dict[int, float] = {}
        self.since, self.worked = time.monotonic(), 0.0

    def reason_to_end(self) -> str:
        """Why they are to be ended now; empty while they work."""
        now = time.monotonic()
        for process in leaves(self.processes):
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                self.used[process.pid] = times.user + times.system
        worked = sum(self.used.values())
        if worked > SPENT:
            return f"no end after {worked:.0f} s of processor time"
        if worked - self.worked > WORK:
            self.since, self.worked = now, worked
        if now - self.since > STILL:
            return f"it has stood still for {STILL:.0f} s"
        return ""


def ended(process: subprocess.Popen[Any]) -> bool:
    """Whether it ends before the next look."""
    try:
        process.wait(LOOK)
    except subprocess.TimeoutExpired:
        return False
    return True


def descendants(processes: Iterable[subprocess.Popen[Any]]) -> list[psutil.Process]:
    """The processes that still run and all that they started."""
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.poll() is None:
                root = psutil.Process(process.pid)
                found += [root, *root.children(recursive=True)]
    return found


def leaves(processes: Iterable[subprocess.Popen[Any]]) -> list[psutil.Process]:
    """Those of them that started none."""
    found, parents = descendants(processes), set()
    for each in found:
        with suppress(psutil.NoSuchProcess):
            parents.add(each.ppid())
    return [each for each in found if each.pid not in parents]


def end(processes: Sequence[subprocess.Popen[Any]]) -> None:
    """Kill them and all that they started."""
    for each in descendants(processes):
        with suppress(psutil.NoSuchProcess):
            each.kill()
    for process in processes:
        process.wait()


def run_command(command: Sequence[str], **env: str) -> str:
    """Run a launcher (torchrun, accelerate) to its end; what it printed."""
    finished = run(command, cwd=REPOSITORY, env=environment(**env), check=True)
    return finished.stdout + finished.stderr


# Builds of a copied source tree, with a stand-in for nvcc and one for the NVIDIA driver.
BUILD_VARIABLES = ("RESLORA_CUDA", "RESLORA_CUDA_ARCHS", "RESLORA_HOST", "MAX_JOBS")
BUILD_VARIABLES += ("CUDA_HOME", "CUDA_PATH", "CXX", "LD_LIBRARY_PATH")
CXX = shutil.which("g++") or ""
HOOK = "import sys, setuptools.build_meta as hooks; getattr(hooks, f'build_{sys.argv[1]}')(sys.argv[2])"

# Notes each call, with the time at which it starts and ends, in the folder above its own; compiles nothing.
FAKE_NVCC = """
case "$1" in
  --version) echo "Cuda compilation tools, release {version}, V{version}.99"; exit ;;
  --list-gpu-arch) printf 'compute_%s\\n' {known}; exit ;;
esac
log="$(dirname "$0")/../calls"
echo "start $*" >> "$log"
{action}
echo "end" >> "$log"
while [ $# -gt 1 ]; do
  [ "$1" = -o ] && echo made by a stand-in > "$2"
  shift
done
exit 0
"""

# What toolchain.find_driver() calls of libcuda, for one GPU.
FAKE_DRIVER = """
extern "C" int cuDriverGetVersion(int* version) {{ *version = {version}; return 0; }}
extern "C" int cuInit(unsigned flags) {{ return {status}; }}
extern "C" int cuDeviceGetCount(int* count) {{ *count = 1; return 0; }}
extern "C" int cuDeviceGet(int* device, int index) {{ *device = 40 + index; return 0; }}
extern "C" int cuDeviceGetAttribute(int* value, int attribute, int device) {{
    *value = attribute == 75 ? {capability} / 10 : {capability} % 10;
    return device == 40 && (attribute == 75 || attribute == 76) ? 0 : 1;
}}
"""


def copy_source(folder: Path) -> Path:
    """What git would track, in ``folder``."""
    skipped = shutil.ignore_patterns(
        ".*", "build", "dist", "*.egg-info", "__pycache__", "results", "_build_info.py", "*.so"
    )
    return Path(shutil.copytree(REPOSITORY, folder, ignore=skipped))


def build_environment(**variables: str) -> dict[str, str]:
    """This process's environment with nothing that steers a build but ``variables``."""
    return {name: value for name, value in os.environ.items() if name not in BUILD_VARIABLES} | variables


def run_build(command: list[str], source: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return run(command, cwd=source, env=build_environment(**variables))


def build(kind: str, source: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A "wheel", "sdist" or "editable" by setuptools' hook, without isolation; it lies in ``out`` beside source."""
    (source.parent / "out").mkdir(exist_ok=True)
    return run_build([sys.executable, "-c", HOOK, kind, str(source.parent / "out")], source, **variables)


def leave_out(csrc: Path, *types: str) -> None:
    """Puts kernels of bfloat16 where those of "Fp16", "Tf32" or "Ieee" are asked for: of one type less to compile."""
    launch = csrc / "launch.cuh"
    for name in types:
        text = launch.read_text()
        assert text.count(f"use({name}Math{{}})") == 1
        launch.write_text(text.replace(f"use({name}Math{{}})", "use(Bf16Math{})"))
    for source in csrc.glob("*_sm90.cu") if "Fp16" in types else ():
        assert source.read_text().count("<Fp16>") == 1
        source.write_text(source.read_text().replace("<Fp16>", "<Bf16>"))


def built_wheel(source: Path) -> Path:
    (wheel,) = (source.parent / "out").glob("*.whl")
    return wheel


def names_in(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def record_of(wheel: Path) -> dict[str, Any]:
    """The wheel's _build_info.py."""
    with zipfile.ZipFile(wheel) as archive:
        return runpy.run_path(archive.extract("reslora_kernels/_build_info.py", wheel.parent / "unpacked"))


def script(path: Path, body: str) -> Path:
    """An executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def fake_nvcc(home: Path, action: str = ":", version: str = "13.0", known: str = "75 80 86 89 90 100 120") -> Path:
    """A CUDA_HOME whose nvcc does ``action`` instead of compiling."""
    script(home / "bin/nvcc", FAKE_NVCC.format(version=version, known=known, action=action))
    return home


def calls(home: Path) -> list[str]:
    """What the stand-in for nvcc was called with, in order, and "end" for each."""
    return (home / "calls").read_text().splitlines()


def fake_driver(folder: Path, version: int = 13000, capability: int = 90, status: int = 0) -> Path:
    """A libcuda.so.1 in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    code = FAKE_DRIVER.format(version=version, capability=capability, status=status)
    command = [CXX, "-shared", "-fPIC", "-x", "c++", "-", "-o", str(folder / "libcuda.so.1")]
    path = os.pathsep.join((str(Path(CXX).parent), os.defpath))
    run(command, env=os.environ | {"PATH": path}, input=code, check=True)
    return folder / "libcuda.so.1"

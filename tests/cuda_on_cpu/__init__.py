"""The CUDA C++ kernels on a machine without a GPU: the same sources, each instruction, compiled by a C++ compiler.

Every thread of a block is a fiber of its own, and each instruction of ``csrc/ptx.cuh`` has a twin in ``host_ptx.h``.
The scheduler in ``emulator.cpp`` is as unkind as CUDA's programming model allows, by a seed:

- blocks run in any order, one warp runs far ahead of the others, the lanes of a warp run in any order;
- a ``cp.async`` lands at once, or not before it is waited for; until then its destination is NaN;
- shared memory is NaN when a block starts;
- a barrier that some threads never reach, lanes of a warp at different instructions, a misaligned or out-of-bounds
  address of ldmatrix or cp.async, a copy in flight when the kernel ends: each is an error with the kernel's name;
- bank conflicts of ldmatrix and cp.async are counted, and of what goes through store_shared and load_shared;
- the blocks of a cluster run together, one far ahead of the others; shared memory begins at any multiple of 128 bytes;
- what sm_90 does beside the threads (``emulator_async.cpp``, twins in ``host_ptx_sm90.h``) comes
  at once, at some time, or not before nothing else can: a bulk load's destination is NaN until it lands, a bulk store
  reads and writes when it likes, wgmma reads its operands as late as its wait and its registers are NaN until then;
- a copy to another block of the cluster reads its source as late as it lands, and counts at the barrier there;
- these units see of shared memory only what a warp's fence_async_shared has followed; reading past it is an error with
  the warp's number. So are an mbarrier that more bytes or arrivals reach than it counts, one that is not announced or
  is overwritten, registers that change under wgmma or with no wgmma_fence, copies to or from a block that has ended,
  and whatever is not committed or not waited for. A deadlock names each barrier and what it lacks;
- built with AddressSanitizer and UndefinedBehaviorSanitizer, all accesses are checked, global and shared.

``build`` compiles csrc/ with it to an extension module, which ``reslora_kernels.backends.cuda`` takes in place of the
real one, so that checks, launch parameters and kernels are tested as one path.

What only a GPU can prove: that nvcc's code does what the sources say, that the twins do what the instructions do, the
order in which a tensor core adds, memory ordering between threads without a barrier, occupancy, and every speed; of
sm_90 also a fence that some lanes of a warp lack and registers that are written between wgmma_fence and wgmma.
"""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType

import pybind11

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
MODULE = f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
OPTIONS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-DRESLORA_EMULATED"]
OPTIONS += ["-Wall", "-Wno-unknown-pragmas", "-Wno-psabi"]
FAST = ["-O2"]
SANITIZED = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
BINDINGS = ["-O0", "-fno-sanitize=undefined"]  # templates of pybind11, which take longer than all kernels


def unavailable_reason() -> str | None:
    """Why the emulator cannot be built on this machine; None when it can."""
    if platform.machine() != "x86_64":
        return "the emulator switches stacks with x86-64 code"
    return None if shutil.which("g++") else "needs g++"


@dataclass(frozen=True)
class Statistics:
    """Counts of what the emulator has performed, in the order of its struct."""

    launches: int
    copies: int
    late_copies: int
    matrix_loads: int
    bank_conflicts: int
    multiplications: int
    barriers: int
    tensor_loads: int
    tensor_stores: int
    block_copies: int
    group_multiplications: int
    shared_accesses: int


def build(folder: Path, csrc: Path = CSRC, options: Sequence[str] = FAST) -> Path:
    """Compiles ``csrc`` with the emulator to an extension module in ``folder``; returns its path."""
    includes = [f"-I{HERE}", f"-I{csrc}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    sources = [*sorted(csrc.glob("*.cu")), csrc / "bindings.cpp", *sorted(HERE.glob("emulator*.cpp"))]
    has_sm90 = ["-DRESLORA_HAS_SM90"] * any(source.stem.endswith("_sm90") for source in csrc.glob("*.cu"))

    def compile_one(source: Path) -> Path:
        made, last = folder / f"{source.name}.o", BINDINGS if source.name == "bindings.cpp" else []
        compile_and_link(["-c", "-x", "c++", str(source)], made, [*has_sm90, *options, *last, *includes])
        return made

    with ThreadPoolExecutor() as pool:
        compiled = list(pool.map(compile_one, sources))
    module = folder / MODULE
    compile_and_link(["-shared", *map(str, compiled)], module, options)
    return module


def compile_and_link(what: Sequence[str], made: Path, options: Sequence[str]) -> None:
    """RuntimeError with all that the compiler says unless it is content."""
    command = ["g++", *OPTIONS, *options, *what, "-o", str(made)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode or "warning:" in finished.stderr:
        raise RuntimeError(f"{' '.join(command)}\n{finished.stderr}")


def load(path: Path) -> ModuleType:
    """The module that ``build`` made."""
    spec = importlib.util.spec_from_file_location("_cuda", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def set_seed(path: Path, seed: int) -> None:
    """What the scheduler and the copies do from here on."""
    ctypes.CDLL(str(path)).reslora_emulator_seed(ctypes.c_uint(seed))


def plant(path: Path, fault: int) -> None:
    """Which of the faults that a test has compiled in is there from here on; 0 for none."""
    ctypes.CDLL(str(path)).reslora_emulator_plant(ctypes.c_int(fault))


def take_statistics(path: Path) -> Statistics:
    """Counts since the last call."""
    values = (ctypes.c_int64 * len(fields(Statistics)))()
    ctypes.CDLL(str(path)).reslora_emulator_statistics(values, ctypes.c_bool(True))
    return Statistics(*values)

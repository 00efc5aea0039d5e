"""The emulator's twins of what only sm_90 has: a small product runs exactly, and faults planted in it are caught."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from . import cuda_on_cpu, processes

REASON = cuda_on_cpu.unavailable_reason()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
SOURCE = cuda_on_cpu.HERE / "small_matmul_sm90.cpp"


@dataclass(frozen=True)
class Fault:
    """``text`` of the source becomes ``planted``; some seed then ends with ``caught``."""

    name: str
    text: str
    planted: str
    caught: str


FAULTS = [
    Fault(
        "a stage read in the wrong phase",
        "full[turn.stage], turn.phase)", "full[turn.stage], turn.phase ^ 1)", "is wrong|deadlock",
    ),
    Fault(
        "a stage filled in the wrong phase", "turn.phase ^ 1);", "turn.phase);",
        r"deadlock.*mbarrier at byte \d+ of shared memory, parity 0, where 8 of 8 arrivals and 0 bytes are missing",
    ),
    Fault(
        "a stage filled while it is read",
        "mbarrier_wait(&s.empty[turn.stage], turn.phase ^ 1);", "", "is wrong|in flight|more",
    ),
    Fault("a stage released while products read it", "wgmma_wait<1>();", "wgmma_wait<2>();", "is wrong"),
    Fault(
        "a stage released in one block only",
        "if (BLOCKS == 2) mbarrier_arrive_cluster", "if (false) mbarrier_arrive_cluster",
        r"deadlock.*of block \d of the cluster, parity \d, where 8 of 16 arrivals",
    ),
    Fault(
        "a stage filled when one block has released it", "GROUPS * 4 * BLOCKS", "GROUPS * 4", "is wrong|deadlock|more",
    ),
    Fault("products not waited for", "            wgmma_wait<0>();\n", "", "is wrong|still in flight"),
    Fault("products not committed", "                wgmma_commit();\n", "", "is wrong|never committed"),
    Fault("products with no fence before", "                wgmma_fence();\n", "", "no wgmma_fence"),
    Fault("eight rows at another distance", "BOX_BYTES, 16, 1024)", "BOX_BYTES, 16, 512)", "is wrong"),
    Fault("eight k at another distance", "BOX_BYTES, 1024)\n", "BOX_BYTES, 2048)\n", "MN-major.*is wrong"),
    Fault(
        "64 columns at another distance",
        "(s.b[turn.stage], BOX_BYTES, 1024)", "(s.b[turn.stage], 1024, 1024)", "MN-major.*is wrong",
    ),
    Fault("the next 16 k at another distance", "MAJOR ? 128 : 2)", "MAJOR ? 64 : 2)", "MN-major.*is wrong"),
    Fault("a descriptor into the middle of a pattern", "a + i * 2,", "a + i * 8,", "not in the first row"),
    Fault("b the other way round", "wgmma<N, B_MN_MAJOR>", "wgmma<N, !B_MN_MAJOR>", "is wrong"),
    Fault("fewer bytes expected", "(GROUPS + 2) * BOX", "(GROUPS + 1) * BOX", "more bytes came|is wrong|in flight"),
    Fault(
        "more bytes expected", "(GROUPS + 2) * BOX", "(GROUPS + 3) * BOX",
        "deadlock.*parity 0, where 0 of 1 arrivals and 8192 bytes are missing",
    ),
    Fault(
        "a barrier of too many arrivals",
        "mbarrier_init(&s.full[i], 1)", "mbarrier_init(&s.full[i], 2)", "deadlock.*where 1 of 2 arrivals",
    ),
    Fault("barriers not announced", "        fence_barrier_init();\n", "", "no fence_barrier_init"),
    Fault("a store with no fence", "            fence_async_shared();\n", "", "no fence_async_shared"),
    Fault(
        "a fence of one thread only", "            fence_async_shared();\n",
        "            if (thread == 0) fence_async_shared();\n", r"warp \d has written with no fence_async_shared",
    ),
    Fault(
        "a fence of the thread that stores", "fence_async_shared();\n            named_barrier(1 + group, 128);",
        "named_barrier(1 + group, 128);\n            if (thread == 0) fence_async_shared();",
        r"warp \d has written with no fence_async_shared",
    ),
    Fault(
        "a store before all have written", "fence_async_shared();\n            named_barrier(1 + group, 128);",
        "fence_async_shared();", "no fence_async_shared|is wrong",
    ),
    Fault(
        "a tile overwritten while it is stored",
        "            if (thread == 0) tma_store_wait_read<0>();\n            named", "            named",
        "or too early|is wrong",
    ),
    Fault(
        "a store not waited for",
        "        if (thread == 0) tma_store_wait_read<0>();\n    }", "    }", "bulk stores may still read",
    ),
    Fault("a store not committed", "                tma_store_commit();\n", "", "never committed"),
    Fault("a tile stored with no swizzle", "(column % 64 / 8 ^ row % 8)", "(column % 64 / 8)", "is wrong"),
    Fault(
        "a barrier that half of its threads reach",
        "fence_async_shared();\n            named_barrier(1 + group, 128)",
        "fence_async_shared();\n            named_barrier(1 + group, 256)",
        "deadlock.*named barrier [12], where 128 of 256",
    ),
    Fault("a block that ends first", "    cluster_arrive();\n    cluster_wait();\n}", "}", "that has ended"),
    Fault(
        "a cluster that does not wait for its barriers",
        "    cluster_arrive();\n    cluster_wait();\n    grid", "    barrier();\n    grid", "there is no mbarrier",
    ),
    Fault("a copy to an odd address", "i * BOX_BYTES, &p.a", "i * BOX_BYTES + 16, &p.a", "misaligned address"),
    Fault("a copy of other rows", "row + 64 * i, full", "row + 64 * i + 1, full", "is wrong"),
    Fault("too little shared memory", "+ 1024 - 128", "- 128", "outside of shared"),
    Fault("tiles at a multiple of 128", "(1024 - misplaced) % 1024", "misplaced * 0", "not in the first row|is wrong"),
]  # fmt: skip


def compile_to(path: Path, source: Path, objects: list[Path]) -> Path:
    includes = [f"-I{cuda_on_cpu.HERE}", f"-I{cuda_on_cpu.CSRC}"]
    options = [*cuda_on_cpu.OPTIONS, "-O1", *includes]
    linked = ["-c"] if path.suffix == ".o" else [str(made) for made in objects]
    cuda_on_cpu._run(["g++", *options, str(source), *linked, "-o", str(path)])
    return path


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("emulator")
    return [compile_to(folder / f"{source.stem}.o", source, []) for source in cuda_on_cpu.HERE.glob("emulator*.cpp")]


def run(program: Path, seeds: int) -> subprocess.CompletedProcess[str]:
    return processes.run([program, str(seeds)])


def test_small_matmul_is_exact_whatever_the_schedule(tmp_path: Path, objects: list[Path]) -> None:
    finished = run(compile_to(tmp_path / "program", SOURCE, objects), 10)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout == "3360 loads, 1280 stores, 7680 products\n"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_planted_fault_is_caught(fault: Fault, tmp_path: Path, objects: list[Path]) -> None:
    text = SOURCE.read_text()
    assert text.count(fault.text) == 1
    (tmp_path / "planted.cpp").write_text(text.replace(fault.text, fault.planted))
    finished = run(compile_to(tmp_path / "program", tmp_path / "planted.cpp", objects), 10)
    assert finished.returncode == 1, finished.stdout + finished.stderr
    assert re.search(fault.caught, finished.stdout), finished.stdout

"""The emulator finds what it is there to find: planted faults in the real sources, each caught for its own reason."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from reslora_kernels.backends import hopper

from . import cuda_on_cpu

REASON = cuda_on_cpu.unavailable_reason()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
ROOT = Path(__file__).parents[1]
# All faults are planted in bfloat16, so that nothing else need be compiled.
ONE_TYPE = re.compile(r"case MATH_FLOAT16:.*?default: return use\(IeeeMath\{\}\);", re.DOTALL)


@dataclass(frozen=True)
class Fault:
    """``text`` of a source becomes ``planted``; the run then ends with ``caught``."""

    name: str
    source: str
    text: str
    planted: str
    caught: str
    sanitized: bool = False
    variant: str = "off"  # of the Hopper kernel


FAULTS = [
    Fault(
        "no barrier before a stage is read", "matmul.cuh",
        "            wait_copies<STAGES - 2>();\n            barrier();", "            wait_copies<STAGES - 2>();",
        "is wrong",
    ),
    Fault(
        "one copy fewer waited for", "matmul.cuh",
        "wait_copies<STAGES - 2>();", "wait_copies<STAGES - 1>();", "is wrong|in flight",
    ),
    Fault(
        "buffers reused while they are read", "matmul.cuh",
        "        wait_copies<0>();\n        barrier();\n    }", "        wait_copies<0>();\n    }", "is wrong",
    ),
    Fault(
        "copies of a stage in the next one's group", "matmul.cuh",
        "            commit_copies();\n            arrived", "            arrived", "is wrong|in flight",
    ),
    Fault(
        "a tile multiplied before all of it is dropped", "project.cu",
        "std::uint32_t) {});\n        barrier();", "std::uint32_t) {});", "is wrong",
    ),
    Fault(
        "a barrier that half of the warps reach", "low_rank_grads.cu",
        "m, column, keep);\n        barrier();", "m, column, keep);\n        if (thread_id() < 64) barrier();",
        "deadlock|is wrong",
    ),
    Fault(
        "no swizzle", "tile.cuh", "turn % LINE + turn / LINE", "turn * 0", "bank conflicts",
    ),
    Fault(
        "copies to another swizzle than is read", "tile.cuh",
        "const to = tile.chunk(row, chunk)", "const to = tile.chunk(row, chunk ^ 1)", "is wrong",
    ),
    Fault(
        "wide copies from odd addresses", "launch.cuh",
        "m.row * size % 16 == 0 && m.columns * size % 16 == 0", "size > 0",
        "misaligned global address",
    ),
    Fault(
        "a stage too little shared memory", "matmul.cuh",
        "SHARED_BYTES = STAGES * STAGE_BYTES", "SHARED_BYTES = (STAGES - 1) * STAGE_BYTES", "outside of shared memory",
    ),
    Fault(
        "a row too many is read", "tile.cuh",
        "on < rows ? columns", "on <= rows ? columns",
        "AddressSanitizer: heap-buffer-overflow", sanitized=True,
    ),
    Fault(
        "a row too many is written", "augmented_matmul_sm80.cu",
        "if (i >= p.x.rows || j >= p.y.columns) continue;\n            Element",
        "if (i > p.x.rows || j >= p.y.columns) continue;\n            Element",
        "AddressSanitizer: heap-buffer-overflow", sanitized=True,
    ),
    Fault(
        "rows of y that leave before the warp has staged them", "augmented_matmul_sm80.cu",
        "        warp_barrier();\n        RESLORA", "        RESLORA", "is wrong",
    ),
    Fault(
        "the first stages of x counted with those of t", "augmented_matmul_sm80.cu",
        "return copy(step - first, stage)", "return copy(step, stage)", "is wrong",
    ),
    Fault(
        "t multiplied before all of it is written", "augmented_matmul_sm80.cu",
        "        barrier();\n        matmul.template", "        matmul.template", "is wrong",
    ),
    Fault(
        "y staged over t that is still read", "augmented_matmul_sm80.cu",
        "(matmul.stage);\n        barrier();", "(matmul.stage);", "is wrong",
    ),
    Fault(
        "the low-rank product in every part of K", "augmented_matmul_sm80.cu",
        "part ? 0 : static_cast", "static_cast", "is wrong",
    ),
    Fault("the bias in every part of K", "augmented_matmul_sm80.cu", "p.bias && part == 0", "p.bias", "y is wrong"),
    Fault(
        "a part of K too long", "augmented_matmul_sm80.cu",
        " < p.split ? p.x.columns - start : p.split", "", "is wrong",
    ),
    Fault(
        "consumers that take no turns", "augmented_matmul_sm90.cu",
        "        pipeline.await_turn(consumer, count);\n", "", "is wrong|deadlock|more arrivals", variant="ping-pong",
    ),
    Fault(
        "a turn passed by one warp", "pipeline_sm90.cuh",
        "mbarrier_init(turn(consumer), 4);", "mbarrier_init(turn(consumer), 1);", "is wrong|deadlock",
        variant="ping-pong-pair",
    ),
    Fault(
        "a stage released while products read it", "augmented_matmul_sm90.cu",
        "wgmma_wait<1>();", "wgmma_wait<2>();", "is wrong", variant="cooperative",
    ),
    Fault(
        "a stage released in one block of the pair", "pipeline_sm90.cuh",
        "block < CLUSTER; ++block)", "block < 1; ++block)", "deadlock", variant="cooperative-pair",
    ),
    Fault(
        "each block with the same half of w", "pipeline_sm90.cuh",
        "k, column + part * B_BOX_ROWS,", "k, column,", "is wrong", variant="cooperative-pair",
    ),
    Fault(
        "a block that leaves its pair", "tiles_sm90.cuh",
        "    if constexpr (P::CLUSTER > 1) P::meet();\n", "", "has ended", variant="ping-pong-pair",
    ),
    Fault(
        "a box written while it is stored", "tiles_sm90.cuh",
        "        if (thread == 0) tma_store_wait_read<P::STORE_BOXES - 1>();\n", "", "too early|is wrong",
        variant="ping-pong",
    ),
    Fault(
        "a store with no fence", "tiles_sm90.cuh",
        "        fence_async_shared();\n", "", "no fence_async_shared", variant="cooperative",
    ),
    Fault(
        "u multiplied with no fence", "augmented_matmul_one_pass_sm90.cu",
        "        fence_async_shared();\n", "", "no fence_async_shared", variant="cooperative",
    ),
    Fault(
        "more bytes expected than b has", "pipeline_sm90.cuh",
        "B_BYTES + a_bytes", "B_BYTES + a_bytes + 16", "deadlock", variant="one-pass",
    ),
    Fault(
        "u read before it has come from the block beside", "augmented_matmul_one_pass_sm90.cu",
        "P::ACROSS > 1 ? SQUARE : 0", "0", "is wrong|more bytes|in flight", variant="one-pass-pair",
    ),
    Fault(
        "u copied over x that the block beside still reads", "augmented_matmul_one_pass_sm90.cu",
        "            pipeline.await_empty();", "            ;", "is wrong|written", variant="one-pass-pair",
    ),
    Fault(
        "u copied before all of its rows are there", "augmented_matmul_one_pass_sm90.cu",
        "            named_barrier(1 + consumer, WARPGROUP);\n            if (P::ACROSS", "            if (P::ACROSS",
        "is wrong|no fence_async_shared", variant="one-pass-pair",
    ),
    Fault(
        "u that is not copied", "augmented_matmul_one_pass_sm90.cu",
        "P::ACROSS > 1 && thread == 0", "P::ACROSS > 2 && thread == 0", "deadlock.*0 of 1 arrivals and 8192 bytes",
        variant="one-pass-quad",
    ),
    Fault(
        "a block that leaves while u is copied from it", "tiles_sm90.cuh",
        "    if constexpr (P::CLUSTER > 1) P::meet();\n", "", "has ended", variant="one-pass-pair",
    ),
    Fault(
        "a stage filled when one block of the row has released it", "pipeline_sm90.cuh",
        "(DOWN + ACROSS - 1)", "DOWN", "is wrong|deadlock|more", variant="one-pass-quad",
    ),
    Fault(
        "each block with the same half of x", "pipeline_sm90.cuh",
        "k, row + part * A_BOX_ROWS,", "k, row,", "is wrong", variant="one-pass-quad",
    ),
    Fault(
        "64 columns of w at another distance", "pipeline_sm90.cuh",
        "b(ring.stage), W_BY_K ? 16 : SQUARE", "b(ring.stage), W_BY_K ? 16 : LINE", "dx is wrong",
        variant="cooperative",
    ),
    Fault(
        "a step of the rank too few", "augmented_matmul_sm90.cu",
        "(p.rank - k + 15) / 16", "(p.rank - k) / 16", "is wrong", variant="cooperative",
    ),
    Fault(
        "the mask of another row", "augmented_matmul_sm90.cu", "i = row + 8 * half;", "i = row;", "dx is wrong",
        variant="ping-pong",
    ),
    Fault(
        "a word too many of the mask", "augmented_matmul_sm90.cu",
        "i < p.rows && at < p.keep_words", "i <= p.rows", "AddressSanitizer: heap-buffer-overflow", sanitized=True,
        variant="cooperative",
    ),
    Fault(
        "a stage of x filled while it is read", "project_sm90.cu",
        "        mbarrier_wait(empty(ring.stage), ring.parity ^ 1);\n", "", "is wrong|in flight|more",
        variant="cooperative",
    ),
    Fault(
        "a stage of x released while products read it", "project_sm90.cu",
        "wgmma_wait<1>();", "wgmma_wait<2>();", "is wrong", variant="cooperative",
    ),
]  # fmt: skip


def run_calls(module: Path, seeds: int, variant: str = "off") -> subprocess.CompletedProcess[str]:
    libraries = [
        subprocess.run(["g++", f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=True).stdout
        for name in ("asan", "ubsan")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(path.strip() for path in libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.cuda_on_cpu.run_calls", str(module), str(seeds), variant]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


def sources(folder: Path) -> Path:
    """A copy of csrc/ with the kernels for one type."""
    copy = shutil.copytree(cuda_on_cpu.CSRC, folder / "csrc")
    text, found = ONE_TYPE.subn("default: return use(Bf16Math{});", (copy / "launch.cuh").read_text())
    assert found == 1
    (copy / "launch.cuh").write_text(text)
    return copy


def objects_of(module: Path) -> dict[str, Path]:
    return {path.stem: path for path in module.parent.glob("*.o")}


@pytest.fixture(scope="session")
def faultless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faultless")
    return cuda_on_cpu.build(folder, sources(folder), ["-O0"])


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sanitized")
    return cuda_on_cpu.build(folder, sources(folder), cuda_on_cpu.SANITIZED)


@pytest.mark.parametrize("variant", ["off", *hopper.NUMBERS])
def test_sources_are_clean(variant: str, sanitized: Path) -> None:
    """Nothing is read or written out of bounds and nothing is undefined, whatever the schedule."""
    finished = run_calls(sanitized, 2 if variant == "off" else 1, variant)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_planted_fault_is_caught(fault: Fault, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    csrc = sources(tmp_path)
    text = (csrc / fault.source).read_text()
    assert text.count(fault.text) == 1
    (csrc / fault.source).write_text(text.replace(fault.text, fault.planted))
    made = objects_of(request.getfixturevalue("sanitized" if fault.sanitized else "faultless"))
    concerned = {fault.source} if fault.source.endswith(".cu") else {path.name for path in csrc.glob("*.cu")}
    made = {name: path for name, path in made.items() if name not in concerned}
    module = cuda_on_cpu.build(tmp_path, csrc, cuda_on_cpu.SANITIZED if fault.sanitized else ["-O0"], made)
    finished = run_calls(module, 20 if fault.variant == "off" else 4, fault.variant)
    assert finished.returncode != 0
    assert re.search(fault.caught, finished.stdout + finished.stderr), finished.stdout + finished.stderr

"""The emulator finds what it is there to find: planted faults, each caught for its own reason.

They are planted in the real sources and, for what only sm_90 has, in a small product that runs exactly. All faults of a
program are compiled in at once, each behind a question which one is there.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from reslora_kernels.backends import hopper

from . import cuda_on_cpu, processes

REASON = cuda_on_cpu.unavailable_reason()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
ROOT = Path(__file__).parents[1]
SMALL = cuda_on_cpu.HERE / "small_matmul_sm90.cpp"


@dataclass(frozen=True)
class Fault:
    """At its ``site``, which a source has once, what is in [[ ]], or all of it, becomes ``planted``.

    It is one statement or one expression. A run with it ends with ``caught``.
    """

    name: str
    source: str
    site: str
    planted: str
    caught: str
    variant: str = "off"  # of the Hopper kernel
    sanitized: bool = False


MATMUL, TILE, LAUNCH, SM80 = "matmul.cuh", "tile.cuh", "launch.cuh", "augmented_matmul_sm80.cu"
SM90, ONE_PASS, PIPELINE, TILES, STRIPS = (
    "augmented_matmul_sm90.cu", "augmented_matmul_one_pass_sm90.cu", "pipeline_sm90.cuh", "tiles_sm90.cuh",
    "strips_sm90.cuh",
)  # fmt: skip
OVERFLOW = "AddressSanitizer: heap-buffer-overflow"
FAULTS = [
    Fault("no barrier before a stage is read", MATMUL, "[[barrier();]]\n            copy(step", "", "is wrong"),
    Fault(
        "one copy fewer waited for", MATMUL, "wait_copies<STAGES - 2>();", "wait_copies<STAGES - 1>();",
        "is wrong|in flight",
    ),
    Fault("buffers reused while they are read", MATMUL, "wait_copies<0>();\n        [[barrier();]]", "", "is wrong"),
    Fault(
        "copies of a stage in the next one's group", MATMUL, "[[commit_copies();]]\n            arrived", "",
        "is wrong|in flight",
    ),
    Fault(
        "a tile multiplied before all of it is dropped", "project.cu",
        "std::uint32_t) {});\n        [[barrier();]]", "", "is wrong",
    ),
    Fault(
        "a barrier that half of the warps reach", "low_rank_grads.cu",
        "m, column, keep);\n        [[barrier();]]", "if (thread_id() < 64) barrier();", "deadlock|is wrong",
    ),
    Fault("no swizzle", TILE, "turn % LINE + turn / LINE", "turn * 0", "bank conflicts"),
    Fault(
        "neighbours that copy every other row", TILE, "return [[static_cast<unsigned>(thread_id()) / Tile::CHUNKS]];",
        "static_cast<unsigned>(thread_id()) / Tile::CHUNKS % (ROWS_ON / 2) * 2 + "
        "static_cast<unsigned>(thread_id()) / Tile::CHUNKS / (ROWS_ON / 2)",
        "bank conflicts",
    ),
    Fault(
        "copies to another swizzle than is read", TILE, "const to = [[tile.chunk(row, chunk)]]",
        "tile.chunk(row, chunk ^ 1)", "is wrong",
    ),
    Fault(
        "wide copies from odd addresses", LAUNCH, "m.row * size % 16 == 0 && m.columns * size % 16 == 0", "size > 0",
        "misaligned global address",
    ),
    Fault(
        "a stage too little shared memory", SM80, "[[M::SHARED_BYTES]], p, device", "M::SHARED_BYTES - M::STAGE_BYTES",
        "outside of shared memory",
    ),
    Fault("a row too many is read", TILE, "[[on < rows]] ? columns", "on <= rows", OVERFLOW, sanitized=True),
    Fault(
        "a row too many is written", SM80, "if ([[i >= p.x.rows]] || j >= p.y.columns) continue;\n            Element",
        "i > p.x.rows", OVERFLOW, sanitized=True,
    ),
    Fault(
        "rows of y that leave before the warp has staged them", SM80,
        "        [[warp_barrier();]]\n        RESLORA", "", "is wrong",
    ),
    Fault(
        "the first stages of x counted with those of t", SM80, "return copy([[step - first]], stage)", "step",
        "is wrong",
    ),
    Fault(
        "t multiplied before all of it is written", SM80, "[[barrier();]]\n        matmul.template", "", "is wrong",
    ),
    Fault("y staged over t that is still read", SM80, "(matmul.stage);\n        [[barrier();]]", "", "is wrong"),
    Fault("the low-rank product in every part of K", SM80, "[[part]] ? 0 : static_cast", "false", "is wrong"),
    Fault("the bias in every part of K", SM80, "p.bias && [[part == 0]]", "true", "y is wrong"),
    Fault("a part of K too long", SM80, "p.x.columns - start < p.split", "true", "is wrong"),
    Fault(
        "consumers that take no turns", SM90, "pipeline.await_turn(consumer, count);", "",
        "is wrong|deadlock|more arrivals", "ping-pong",
    ),
    Fault(
        "a turn passed by one warp", PIPELINE, "mbarrier_init(turn(consumer), [[4]]);", "1", "is wrong|deadlock",
        "ping-pong",
    ),
    Fault(
        "a stage released while products read it", SM90, "wgmma_wait<1>();", "wgmma_wait<2>();", "is wrong",
        "cooperative",
    ),
    Fault(
        "a stage released in one block of the pair", PIPELINE, "[[block < DOWN]]; ++block)", "block < 1",
        "deadlock", "cooperative-pair",
    ),
    Fault(
        "each block with the same half of w", PIPELINE, "map, k, [[column + rank * B_BOX_ROWS]]);", "column",
        "is wrong", "cooperative-pair",
    ),
    Fault(
        "a block that leaves its pair", TILES, "if constexpr (P::DOWN > 1) P::meet();", "", "has ended",
        "cooperative-pair",
    ),
    Fault(
        "a box written while it is stored", TILES, "if (thread == 0 && part > 0) tma_store_wait_read<BOXES - 1>();", "",
        "too early|is wrong", "ping-pong",
    ),
    Fault("a store with no fence", TILES, "fence_async_shared();", "", "no fence_async_shared", "cooperative"),
    Fault("u multiplied with no fence", ONE_PASS, "fence_async_shared();", "", "no fence_async_shared", "one-pass"),
    Fault(
        "more bytes expected than b has", PIPELINE, "mbarrier_expect(full(ring.stage), [[B_BYTES]]);", "B_BYTES + 16",
        "deadlock", "one-pass",
    ),
    Fault(
        "u told of before all of it is there", ONE_PASS, "2 * WARPGROUP / 32", "1", "is wrong|deadlock", "one-pass",
    ),
    Fault(
        "u fetched without waiting for it", ONE_PASS,
        "[[p.progress.await(row / P::BM);]]\n            pipeline", "", "is wrong", "one-pass",
    ),
    Fault(
        "progress of the launch before", ONE_PASS, "words[i] = 0;", "words[i] = words[i];", "is wrong|deadlock",
        "one-pass",
    ),
    Fault(
        "tiles shared out to blocks that do not run yet", ONE_PASS,
        "rows ? static_cast<int>(take_global(words + rows)) : otherwise", "otherwise", "deadlock", "one-pass",
    ),
    Fault("a tile without its number", PIPELINE, "*tile() = number;", "", "is wrong|deadlock|begin", "one-pass"),
    Fault(
        "a strip that takes dh before it is made", STRIPS, "if (second && row % 128 == 0) await(row);", "",
        "dA is wrong|da", "one-pass",
    ),
    Fault(
        "a stage of strips released while it is read", STRIPS, "wgmma_wait<1>();", "wgmma_wait<2>();", "is wrong",
        "one-pass",
    ),
    Fault("a row too many of strips", STRIPS, "c < strips.columns", "c <= strips.columns", OVERFLOW, "one-pass", True),
    Fault(
        "64 columns of w at another distance", PIPELINE, "b(ring.stage), [[W_BY_K ? 16 : SQUARE]]",
        "W_BY_K ? 16 : LINE", "dx is wrong", "cooperative",
    ),
    Fault(
        "a step of the rank too few", SM90, "(p.rank - k + 15) / 16", "(p.rank - k) / 16", "is wrong", "cooperative",
    ),
    Fault("the mask of another row", SM90, "i = [[row + 8 * half]];", "row", "dx is wrong", "ping-pong"),
    Fault(
        "a word too many of the mask", SM90, "i < p.rows && at < p.keep_words", "i <= p.rows", OVERFLOW, "cooperative",
        sanitized=True,
    ),
    Fault(
        "a stage of x filled while it is read", "project_sm90.cu",
        "mbarrier_wait(empty(ring.stage), ring.parity ^ 1);", "", "is wrong|in flight|more", "cooperative",
    ),
    Fault(
        "a stage of x released while products read it", "project_sm90.cu", "wgmma_wait<1>();", "wgmma_wait<2>();",
        "is wrong", "cooperative",
    ),
]  # fmt: skip
AWAIT_EMPTY = "mbarrier_wait(&s.empty[turn.stage], turn.phase ^ 1);"
NO_FENCE, WARP_HAS_NO_FENCE = "no fence_async_shared", r"warp \d has written with no fence_async_shared"
FENCE, AFTER_FENCE = "fence_async_shared();", "fence_async_shared();\n            [[named_barrier(1 + group, 128);]]"
SMALL_FAULTS = [
    Fault(name, SMALL.name, site, planted, caught) for name, site, planted, caught in (
        ("a stage read in the wrong phase", "full[turn.stage], [[turn.phase]])", "turn.phase ^ 1",
         "is wrong|deadlock"),
        ("a stage filled in the wrong phase", AWAIT_EMPTY, "mbarrier_wait(&s.empty[turn.stage], turn.phase);",
         r"deadlock.*mbarrier at byte \d+ of shared memory, parity 0, where 8 of 8 arrivals and 0 bytes are missing"),
        ("a stage filled while it is read", AWAIT_EMPTY, "", "is wrong|in flight|more"),
        ("a stage released while products read it", "wgmma_wait<1>();", "wgmma_wait<2>();", "is wrong"),
        ("a stage released in one block only", "if ([[BLOCKS == 2]]) mbarrier_arrive_cluster", "false",
         r"deadlock.*of block \d of the cluster, parity \d, where 8 of 16 arrivals"),
        ("a stage filled when one block has released it", "GROUPS * 4 * BLOCKS", "GROUPS * 4",
         "is wrong|deadlock|more"),
        ("products not waited for", "wgmma_wait<0>();", "", "is wrong|still in flight"),
        ("products not committed", "wgmma_commit();", "", "is wrong|never committed"),
        ("products with no fence before", "wgmma_fence();", "", "no wgmma_fence"),
        ("eight rows at another distance", "BOX_BYTES, 16, [[1024]])", "512", "is wrong"),
        ("eight k at another distance", "BOX_BYTES, [[1024]])\n", "2048", "MN-major.*is wrong"),
        ("64 columns at another distance", "(s.b[turn.stage], [[BOX_BYTES]], 1024)", "1024", "MN-major.*is wrong"),
        ("the next 16 k at another distance", "MAJOR ? [[128]] : 2)", "64", "MN-major.*is wrong"),
        ("a descriptor into the middle of a pattern", "a + [[i * 2]],", "i * 8", "not in the first row"),
        ("b the other way round", "wgmma<N, B_MN_MAJOR, false, Element>",
         "wgmma<N, !B_MN_MAJOR, false, Element>", "is wrong"),
        ("fewer bytes expected", "(GROUPS + 2) * BOX_BYTES", "(GROUPS + 1) * BOX_BYTES",
         "more bytes came|is wrong|in flight"),
        ("more bytes expected", "(GROUPS + 2) * BOX_BYTES", "(GROUPS + 3) * BOX_BYTES",
         "deadlock.*parity 0, where 0 of 1 arrivals and 8192 bytes are missing"),
        ("a barrier of too many arrivals", "mbarrier_init(&s.full[i], [[1]])", "2", "deadlock.*where 1 of 2 arrivals"),
        ("barriers not announced", "fence_barrier_init();", "", "no fence_barrier_init"),
        ("a store with no fence", FENCE, "", NO_FENCE),
        ("a fence of one thread only", FENCE, f"if (thread == 0) {FENCE}", WARP_HAS_NO_FENCE),
        ("a fence of the thread that stores", FENCE, f"named_barrier(1 + group, 128); if (thread == 0) {FENCE}",
         WARP_HAS_NO_FENCE),
        ("a store before all have written", AFTER_FENCE, "", f"{NO_FENCE}|is wrong"),
        ("a tile overwritten while it is stored",
         "[[if (thread == 0) tma_store_wait_read<0>();]]\n            named", "", "or too early|is wrong"),
        ("a store not waited for", "[[if (thread == 0) tma_store_wait_read<0>();]]\n    }", "",
         "bulk stores may still read"),
        ("a store not committed", "tma_store_commit();", "", "never committed"),
        ("a tile stored with no swizzle", "(column % 64 / 8 ^ row % 8)", "column % 64 / 8", "is wrong"),
        ("a barrier that half of its threads reach", AFTER_FENCE, "named_barrier(1 + group, 256);",
         "deadlock.*named barrier [12], where 128 of 256"),
        ("a block that ends first", "[[cluster_arrive();\n    cluster_wait();]]\n}", "", "that has ended"),
        ("a cluster that does not wait for its barriers", "[[cluster_arrive();\n    cluster_wait();]]\n    grid",
         "barrier();", "there is no mbarrier"),
        ("a copy to an odd address", "[[i * BOX_BYTES]], &p.a", "i * BOX_BYTES + 16", "misaligned address"),
        ("a copy of other rows", "[[row + 64 * i]], full", "row + 64 * i + 1", "is wrong"),
        ("too little shared memory", "THREADS, [[SHARED_BYTES<STAGES>]],", "SHARED_BYTES<STAGES> - 1024",
         "outside of shared"),
        ("tiles at a multiple of 128", "(1024 - misplaced) % 1024", "misplaced * 0", "not in the first row|is wrong"),
    )
]  # fmt: skip


def with_faults(text: str, source: str, faults: Sequence[Fault]) -> str:
    """The source with those faults that are of it; the n-th of all, from 1 on, is there if emulator::planted is n."""
    places: dict[tuple[int, int], list[tuple[int, str]]] = {}
    for number, fault in enumerate(faults, 1):
        if fault.source == source:
            before, part, after = re.fullmatch(r"(?:(.*)\[\[)?(.*?)(?:\]\](.*))?", fault.site, re.DOTALL).groups("")
            assert text.count(before + part + after) == 1, fault.name
            start = text.index(before + part + after) + len(before)
            places.setdefault((start, start + len(part)), []).append((number, fault.planted))
    beyond = len(text)
    for (start, end), planted in sorted(places.items(), reverse=True):
        assert end <= beyond, "one place in another"
        text, beyond = text[:start] + _choice(text[start:end], planted) + text[end:], start
    return text


def _choice(part: str, planted: list[tuple[int, str]]) -> str:
    if part.endswith(";"):
        others = "".join(f"if (emulator::planted == {number}) {{ {code} }} else " for number, code in planted)
        return f"{{ {others}{{ {part} }} }}"
    others = "".join(f"emulator::planted == {number} ? ({code}) : " for number, code in planted)
    return f"({others}({part}))"


class Calls:
    """The process of ``run_calls`` for a module."""

    def __init__(self, module: Path, sanitized: bool) -> None:
        libraries = [
            processes.run(["g++", f"-print-file-name=lib{name}.so"]).stdout.strip() for name in ("asan", "ubsan")
        ]
        preloaded = {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}  # Python's own
        command = [sys.executable, "-m", "tests.cuda_on_cpu.run_calls", str(module)]
        environment = processes.environment(**preloaded if sanitized else {})
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)

    def __call__(self, seeds: int, variant: str, fault: int = 0) -> tuple[int, str]:
        """The exit code, and what was printed."""
        assert self.process.stdin and self.process.stdout
        print(seeds, variant, fault, file=self.process.stdin, flush=True)
        code, output = json.loads(self.process.stdout.readline())
        return code, output


@pytest.fixture(scope="module")
def csrc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of csrc/ with all faults, and the kernels for one type."""
    folder = shutil.copytree(cuda_on_cpu.CSRC, tmp_path_factory.mktemp("planted") / "csrc")
    processes.leave_out(folder, "Fp16", "Tf32", "Ieee")
    for path in folder.iterdir():
        path.write_text(with_faults(path.read_text(), path.name, FAULTS))
    return folder


def built(folder: Path, csrc: Path, sanitized: bool) -> Iterator[Calls]:
    calls = Calls(cuda_on_cpu.build(folder, csrc, cuda_on_cpu.SANITIZED if sanitized else ["-O1"]), sanitized)
    yield calls
    calls.process.communicate()


@pytest.fixture(scope="module")
def plain(csrc: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calls]:
    yield from built(tmp_path_factory.mktemp("plain"), csrc, sanitized=False)


@pytest.fixture(scope="module")
def sanitized(csrc: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calls]:
    yield from built(tmp_path_factory.mktemp("sanitized"), csrc, sanitized=True)


@pytest.mark.parametrize("variant", ["off", *hopper.NUMBERS])
def test_sources_are_clean(variant: str, sanitized: Calls) -> None:
    """Nothing is read or written out of bounds and nothing is undefined, whatever the schedule."""
    assert sanitized(2 if variant == "off" else 1, variant) == (0, "")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_planted_fault_is_caught(fault: Fault, request: pytest.FixtureRequest) -> None:
    calls = request.getfixturevalue("sanitized" if fault.sanitized else "plain")
    code, output = calls(20 if fault.variant == "off" else 4, fault.variant, FAULTS.index(fault) + 1)
    assert code != 0
    assert re.search(fault.caught, output), output


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small product with all its faults."""
    folder = tmp_path_factory.mktemp("small")
    source, program = folder / SMALL.name, folder / "program"
    source.write_text(with_faults(SMALL.read_text(), SMALL.name, SMALL_FAULTS))
    emulator = [str(path) for path in cuda_on_cpu.HERE.glob("emulator*.cpp")]
    includes = [f"-I{cuda_on_cpu.HERE}", f"-I{cuda_on_cpu.CSRC}"]
    cuda_on_cpu.compile_and_link([str(source), *emulator], program, ["-O1", *includes])
    return program


def test_small_matmul_is_exact_whatever_the_schedule(small: Path) -> None:
    finished = processes.run([small, "10", "0"])
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout == "3360 loads, 1280 stores, 7680 products\n"


@pytest.mark.parametrize("fault", SMALL_FAULTS, ids=lambda fault: fault.name)
def test_planted_fault_in_the_small_matmul_is_caught(fault: Fault, small: Path) -> None:
    finished = processes.run([small, "10", str(SMALL_FAULTS.index(fault) + 1)])
    assert finished.returncode == 1, finished.stdout + finished.stderr
    assert re.search(fault.caught, finished.stdout), finished.stdout

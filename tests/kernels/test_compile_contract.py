"""The compile contracts read machine code right: kernels that hold them, and planted faults that they name.

Triton compiles only where TRITON_INTERPRET is unset, so this file is also the script that a process of its own runs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import compile_contract, cuda_contract
from benchmarks.bytes_moved import shipped_launches
from benchmarks.compile_contract import CHIPS, TARGETS, Compiled, check, contract, digest, resident_blocks
from benchmarks.cuda_contract import MOST_BESIDE, blocks_at_once, compile_source, main_loop
from benchmarks.cuda_contract import Row as CudaRow
from benchmarks.cuda_contract import check as check_cuda
from reslora_kernels.cli.toolchain import find_nvcc

from .. import processes

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

ROOT = Path(__file__).parents[2]


@triton.jit
def matmul(x, w, y, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    """y [M, N] = x [M, K] @ w [N, K].T through pointers."""
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(x + m[:, None].to(tl.int64) * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        b = tl.load(w + n[:, None].to(tl.int64) * K + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
        total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION)
    at = y + m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(at, total.to(y.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def persistent_matmul(x, w, y, M, N, K, PROGRAMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """The same through descriptors made on the host; each program takes tiles in turn."""
    columns = tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BM) * columns, PROGRAMS):
        row, column = (tile // columns) * BM, (tile % columns) * BN
        total = tl.zeros((BM, BN), tl.float32)
        for k in range(0, tl.cdiv(K, BK)):
            total = tl.dot(x.load([row, k * BK]), w.load([column, k * BK]).T, total)
        y.store([row, column], total.to(y.dtype))


@triton.jit
def column_sums(x, sums, N, BM: tl.constexpr, BN: tl.constexpr):
    """Adds a block of rows to sums [N] with atomics."""
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BN)
    tl.atomic_add(sums + n, tl.sum(tl.load(x + m[:, None] * N + n[None, :]).to(tl.float32), axis=0))


def launches() -> dict[str, Any]:
    """The samples by name."""
    from reslora_kernels.kernels.device import descriptor
    from reslora_kernels.tuning.launch import Launch

    def pointers(
        dtype: torch.dtype = torch.bfloat16, tile: tuple[int, int, int] = (128, 128, 64), **how: Any
    ) -> Launch:
        x, w, y = (
            torch.empty(shape, dtype=dtype, device="meta") for shape in ((8192, 4096), (4096, 4096), (8192, 4096))
        )
        precision = how.pop("precision", "ieee")
        arguments = {"x": x, "w": w, "y": y, "M": 8192, "N": 4096, "K": 4096, "PRECISION": precision}
        arguments |= dict(zip(("BM", "BN", "BK"), tile, strict=True))
        return Launch("matmul", matmul, (64, 32), arguments, {"num_warps": 8, "num_stages": 2} | how)

    def descriptors(bm: int, bn: int, stages: int) -> Launch:
        x, w, y = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((8192, 4096), (4096, 4096), (8192, 4096)))
        arguments = {"x": descriptor(x, bm, 64), "w": descriptor(w, bn, 64), "y": descriptor(y, bm, bn)}
        arguments |= {"M": 8192, "N": 4096, "K": 4096, "PROGRAMS": 132, "BM": bm, "BN": bn, "BK": 64}
        return Launch("persistent", persistent_matmul, (132,), arguments, {"num_warps": 8, "num_stages": stages})

    rows = torch.empty(4096, 64, dtype=torch.bfloat16)
    atomics = {"x": rows, "sums": torch.empty(64), "N": 64, "BM": 64, "BN": 64}
    return {
        "pointers": pointers(),
        "tall and thin": pointers(tile=(16, 128, 64), num_warps=4),
        "exact float32": pointers(torch.float32, (64, 64, 32)),
        "TF32": pointers(torch.float32, (64, 64, 32), precision="tf32"),
        "descriptors": descriptors(128, 128, 3),
        "wide descriptors": descriptors(128, 256, 3),
        "spills": pointers(tile=(128, 256, 32), num_warps=4),
        "atomics": Launch("column_sums", column_sums, (64,), atomics, {"num_warps": 4, "num_stages": 1}),
        "too much shared memory": descriptors(128, 256, 4),
    }


def compile_and_print(wanted: list[list[str]]) -> None:
    samples = launches()
    rows = {f"{name}, {target}": asdict(next(contract([(name, samples[name])], target))) for name, target in wanted}
    print(json.dumps(rows))


def compiled(wanted: list[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """(sample, target) pairs as rows of the contract, compiled in a process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "tests.kernels.test_compile_contract", json.dumps(wanted)]
    result = processes.run(command, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    linker_missing = [row["launch"] for row in rows.values() if "linker" in "".join(row["violations"])]
    if linker_missing:
        pytest.skip("Triton before 3.6 compiles for AMD only where ROCm's linker is installed")
    return rows


HOLDING = {
    "pointers, sm_90": ("HGMMA", "LDGSTS"),
    "descriptors, sm_90": ("HGMMA", "UTMALDG", "UTMASTG"),
    "tall and thin, sm_90": ("HMMA",),
    "exact float32, sm_90": ("FFMA",),
}
FAULTS = {
    "spills, sm_80": r"spills: \d+ bytes of local memory, \d+ loads, \d+ stores",
    "atomics, sm_90": "atomics: 1 (ATOMG|REDG|RED)",
    "too much shared memory, sm_90": "262,176 bytes of shared memory, 232,448 allowed",
}
OTHER_TARGETS = {
    "pointers, sm_80": ("HMMA", "LDGSTS"),
    "TF32, sm_80": ("HMMA",),
    "TF32, sm_90": ("HGMMA",),
    "wide descriptors, sm_90": ("HGMMA", "UTMALDG"),
    "pointers, sm_100": ("UTCHMMA",),
    "descriptors, sm_100": ("UTCHMMA", "UTMALDG", "UTMASTG"),
    "pointers, sm_120": ("HMMA",),
    "descriptors, sm_120": ("HMMA", "UTMALDG", "UTMASTG"),
    "pointers, gfx942": ("MFMA",),
}


def pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    return [(sample, target) for sample, _, target in (name.rpartition(", ") for name in names)]


@pytest.fixture(scope="module")
def hopper() -> dict[str, dict[str, Any]]:
    return compiled(pairs([*HOLDING, *FAULTS]))


@pytest.mark.parametrize("name", HOLDING)
def test_samples_hold(hopper: dict[str, dict[str, Any]], name: str) -> None:
    assert hopper[name]["violations"] == []
    assert set(HOLDING[name]) <= set(hopper[name]["compiled"]["instructions"])


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named(hopper: dict[str, dict[str, Any]], name: str) -> None:
    (violation,) = hopper[name]["violations"]
    assert re.fullmatch(FAULTS[name], violation)


def test_what_is_read_from_machine_code(hopper: dict[str, dict[str, Any]]) -> None:
    """Two stages of two 128 x 64 tiles of bfloat16; each of 256 threads holds 64 float32 sums, and indices."""
    found = hopper["pointers, sm_90"]["compiled"]
    assert found["shared_bytes"] == 2 * 2 * 128 * 64 * 2
    assert 64 < found["registers"] <= 128 and found["blocks"] == 2 and found["occupancy"] == 0.25
    assert found["matrix_dots"] == found["wide_dots"] == 1
    assert hopper["exact float32, sm_90"]["compiled"]["matrix_dots"] == 0


@pytest.mark.slow
def test_other_targets() -> None:
    rows = compiled(pairs(OTHER_TARGETS))
    assert {name: row["violations"] for name, row in rows.items() if row["violations"]} == {}
    for name, instructions in OTHER_TARGETS.items():
        assert set(instructions) <= set(rows[name]["compiled"]["instructions"]), name


def test_a_compiler_error_is_a_violation() -> None:
    """In this process kernels are interpreted, which is one reason why nothing can be compiled."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled here")
    (row,) = contract([("a sample", launches()["pointers"])], "sm_90")
    assert row.compiled is None and "TRITON_INTERPRET" in row.violations[0]


HELD = Compiled(128, 0, 0, 0, 65_536, 2, 0.25, 8, {"HGMMA": 4, "UTMALDG": 2}, 1, 1, 0.0)


@pytest.mark.parametrize(
    ("change", "target", "violation"),
    [
        ({}, "sm_100", "no UTCHMMA"),
        ({"instructions": {"HMMA": 4, "UTMALDG": 2}}, "sm_90", "no HGMMA"),
        ({"instructions": {"HMMA": 4, "UTMALDG": 2}, "wide_dots": 0}, "sm_90", None),
        ({"instructions": {"HGMMA": 4, "UTMASTG": 1}}, "sm_90", "1 TMA loads and stores, at least 2 expected"),
        ({"stack_bytes": 16}, "sm_90", "spills: 16 bytes of local memory, 0 loads, 0 stores"),
        ({"stack_bytes": 8, "local_stores": 3}, "sm_90", "spills: 8 bytes of local memory, 0 loads, 3 stores"),
        ({"stack_bytes": 8, "local_stores": 2}, "sm_90", None),  # one per TMA load, read by none: no spill
        ({"instructions": {"HGMMA": 4, "UTMALDG": 2, "RED": 3}}, "sm_90", "atomics: 3 RED"),
    ],
)
def test_rules(change: dict[str, Any], target: str, violation: str | None) -> None:
    assert check(HELD, "sm_90", expects_matrix=True, expects_tma=2) == []
    broken = check(replace(HELD, **change), target, expects_matrix=True, expects_tma=2)
    assert broken == ([violation] if violation else [])


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "columns", "blocks"),
    [
        ("sm_90", 32, 0, 4, 0, 16),  # 64 warps
        ("sm_90", 168, 0, 8, 0, 1),  # registers
        ("sm_90", 64, 100_000, 4, 0, 2),  # shared memory
        ("sm_100", 64, 32_768, 4, 256, 2),  # tensor memory
        ("sm_120", 32, 0, 4, 0, 12),  # 48 warps
        ("gfx942", 128, 32_768, 4, 0, 2),  # shared memory
        ("gfx942", 256, 16_384, 4, 0, 2),  # registers
    ],
)
def test_blocks_on_one_multiprocessor(
    target: str, registers: int, shared: int, warps: int, columns: int, blocks: int
) -> None:
    assert resident_blocks(CHIPS[target], registers, shared, warps, columns) == blocks


def committed(kind: str) -> dict[str, Any]:
    (path,) = ROOT.glob(f"benchmarks/results/{kind}-contract-*.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.mark.parametrize(("kind", "sources"), [("triton", compile_contract), ("cuda", cuda_contract)])
def test_the_committed_contract_is_of_these_sources_and_holds(kind: str, sources: Any) -> None:
    """If not: ``python -m benchmarks.compile_contract --output`` its file, or ``benchmarks.cuda_contract``."""
    found = committed(kind)
    assert found["sources"] == digest(sources.kernel_sources())
    assert [row for row in found["rows"] if row["violations"]] == []


def test_the_committed_contract_has_every_launch_that_is_shipped() -> None:
    compiled = [(row["target"], row["launch"]) for row in committed("triton")["rows"]]
    assert compiled == [(target, str(entry)) for target in TARGETS for _, entry in shipped_launches(target)]


def test_a_contract_grows_old_with_code_and_not_with_what_is_said_of_it(tmp_path: Path) -> None:
    code = {"a.py": 'x = y // 2  # half\n"""Of y\n# all."""\n', "a.cu": "#pragma unroll  // all\nx = y;\n"}
    changed = {"a.py": "x = y // 3\n", "a.cu": "#pragma unroll 1\nx = y;\n"}
    same = {"a.py": "x  =  y // 2\n", "a.cu": "#pragma unroll\nx = y;  // so\n"}
    for name in code:
        digests = []
        for text in (code[name], same[name], changed[name]):
            (tmp_path / name).write_text(text)
            digests.append(digest([tmp_path / name]))
        assert digests[0] == digests[1] != digests[2]


if __name__ == "__main__":
    compile_and_print(json.loads(sys.argv[1]))


CSRC = Path(__file__).parents[2] / "csrc"

needs_compilers = pytest.mark.skipif(find_nvcc() is None or shutil.which("g++") is None, reason="needs nvcc and g++")


@pytest.fixture(scope="module")
def csrc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without float16, of which all is as in bfloat16."""
    folder = shutil.copytree(CSRC, tmp_path_factory.mktemp("contract") / "csrc")
    processes.leave_out(folder, "Fp16")
    return folder


@pytest.mark.slow
@needs_compilers
@pytest.mark.parametrize("source", ["project.cu", "low_rank_grads.cu"])
def test_kernels_hold_the_contract(source: str) -> None:
    rows, _ = compile_source(CSRC / source, "90a")
    multiplying = [row for row in rows if "Math" in row.kernel]
    assert {row.kernel.split("<")[1].split(",")[0] for row in multiplying} == {
        "Bf16Math", "Fp16Math", "Tf32Math", "IeeeMath",
    }  # fmt: skip
    assert [violation for row in rows for violation in row.violations] == []


@pytest.mark.slow
@needs_compilers
def test_hopper_kernels_hold_the_contract(csrc: Path) -> None:
    rows, _ = compile_source(csrc / "augmented_matmul_sm90.cu", "90a")
    assert len({row.kernel for row in rows}) == 6  # two orders of W; cooperative, alone and in pairs, and ping-pong
    assert all("hopper" in row.kernel and row.registers == 168 for row in rows)  # of each thread, until roles part
    assert [violation for row in rows for violation in row.violations] == []


@pytest.mark.slow
@needs_compilers
def test_one_pass_hopper_kernels_hold_the_contract(csrc: Path) -> None:
    rows, _ = compile_source(csrc / "augmented_matmul_one_pass_sm90.cu", "90a")
    assert len({row.kernel for row in rows}) == 6  # two orders of W, three widths
    assert all("one_pass_hopper" in row.kernel and row.registers == 168 for row in rows)
    found = {row.instructions["HGMMA"] for row in rows}
    assert found == {4 * 2 + 4 + ranks + 4 for ranks in (1, 2, 4)}  # a stage's with u and without, u times B, strips
    assert [violation for row in rows for violation in row.violations] == []


@pytest.mark.slow
@needs_compilers
def test_streaming_kernels_hold_the_contract(csrc: Path) -> None:
    rows, _ = compile_source(csrc / "project_sm90.cu", "90a")
    assert len({row.kernel for row in rows}) == 6  # a by k in four widths, by columns in two
    assert all(row.kernel.startswith("project_hopper_kernel<") for row in rows)
    assert [violation for row in rows for violation in row.violations] == []


def test_hopper_rules() -> None:
    instructions = {"HGMMA": 9, "UTMALDG": 4, "UTMASTG": 4}
    assert check_cuda(CudaRow("90a", "a_hopper_kernel<Bf16>", 168, 0, instructions, [], [40, 232], [])) == []
    streaming = {"HGMMA": 4, "UTMALDG": 2, "ACQBULK": 1, "PREEXIT": 1}
    assert check_cuda(CudaRow("90a", "project_hopper_kernel<Bf16>", 34, 0, streaming, [])) == []
    assert check_cuda(CudaRow("90a", "project_hopper_kernel<Bf16>", 34, 0, {"HMMA": 4}, [], [], ["C7520"])) == [
        "no HGMMA", "no UTMALDG", "no ACQBULK", "no PREEXIT", "ptxas remarks C7520",
    ]  # fmt: skip
    assert check_cuda(CudaRow("90a", "a_hopper_kernel<Bf16>", 168, 0, {"HGMMA": 9}, [], [], ["C7508", "C7520"])) == [
        "no UTMALDG", "no UTMASTG", "registers of the roles: [], not [40, 232]",
        "ptxas remarks C7508", "ptxas remarks C7520",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kernel", "stack", "instructions", "violations"),
    [
        ("a_kernel<Bf16Math>", 0, {"HMMA": 4, "LDSM": 2, "LDGSTS": 2}, []),
        ("a_kernel<IeeeMath>", 0, {"LDGSTS": 2}, []),
        ("a_kernel<Bf16Math>", 0, {"LDGSTS": 2}, ["no HMMA", "no LDSM"]),
        ("a_kernel<Tf32Math>", 0, {"HMMA": 4}, ["no LDGSTS"]),
        ("finish_kernel", 8, {"LDL": 1, "STL": 2}, ["spills: 8 bytes of local memory, 1 loads, 2 stores"]),
        ("finish_kernel", 0, {"RED": 3}, ["atomics: 3 RED"]),
    ],
)
def test_cuda_rules(kernel: str, stack: int, instructions: dict[str, int], violations: list[str]) -> None:
    assert check_cuda(CudaRow("90a", kernel, 64, stack, instructions, [])) == violations


SASS = [
    (0x10, "HMMA", ""), (0x20, "LDGSTS", ""), (0x30, "BRA", " 0x10 ;"),
    (0x40, "LDSM", ""), (0x50, "HMMA", ""), (0x60, "LDGSTS", ""), (0x70, "IADD3", ""),
    (0x78, "NOP", ""), (0x80, "BRA", " 0x40 ;"),
    (0x90, "IMAD", ""), (0xA0, "BRA", " 0x90 ;"), (0xB0, "BRA", " 0xf0 ;"),
]  # fmt: skip


def test_the_main_loop_is_the_last_that_copies_and_multiplies() -> None:
    assert main_loop(SASS) == {"all": 5, "HMMA": 1, "LDSM": 1, "LDGSTS": 1}
    assert main_loop(SASS[8:]) == {}


def test_what_the_main_loop_may_cost() -> None:
    instructions = {"HMMA": 128, "LDSM": 32, "LDGSTS": 24}
    row = CudaRow("80", "augmented_matmul_kernel<Bf16Math, Large, 1, 0, 1>", 240, 0, instructions, [])
    row.loop, row.blocks = {"all": 88 + MOST_BESIDE, "HMMA": 64, "LDSM": 16, "LDGSTS": 8}, blocks_at_once(240, 128)
    assert row.blocks == 2 and check_cuda(row) == []
    row.loop["all"] += 1
    row.blocks = blocks_at_once(241, 256)
    assert check_cuda(row) == [
        f"{MOST_BESIDE + 1} instructions beside 64 HMMA in a step of the main loop", "registers for 1 blocks, not 2",
    ]  # fmt: skip
    assert check_cuda(replace(row, kernel="augmented_matmul_kernel<Bf16Math, Small, 1, 0, 0>", loop={}, blocks=1)) == []


@pytest.mark.slow
@needs_compilers
def test_the_compiler_keeps_to_it(csrc: Path) -> None:
    rows, _ = compile_source(csrc / "augmented_matmul_sm80.cu", "80")
    assert [(row.kernel, row.violations) for row in rows if row.violations] == []
    counted = [row for row in rows if row.kernel.startswith("augmented_matmul_kernel<Bf16Math, Large, 1, 0, 1")]
    assert len(counted) == 1 and counted[0].loop["HMMA"] == 4 * counted[0].loop["LDSM"] == 8 * counted[0].loop["LDGSTS"]

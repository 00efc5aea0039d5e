"""What nvcc makes of the CUDA kernels holds the contract, and a kernel that breaks a rule is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks.cuda_contract import Row as CudaRow, check as check_cuda, compile_source
from reslora_kernels.cli.toolchain import find_nvcc

CSRC = Path(__file__).parents[2] / "csrc"

needs_compilers = pytest.mark.skipif(find_nvcc() is None or shutil.which("g++") is None, reason="needs nvcc and g++")


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
def test_hopper_kernels_hold_the_contract() -> None:
    rows, _ = compile_source(CSRC / "augmented_matmul_sm90.cu", "90a")
    assert len({row.kernel for row in rows}) == 16  # two types, two orders of W, two forms, alone and in pairs
    assert all("hopper" in row.kernel and row.registers == 168 for row in rows)  # of each thread, until roles part
    assert [violation for row in rows for violation in row.violations] == []


@pytest.mark.slow
@needs_compilers
def test_one_pass_hopper_kernels_hold_the_contract() -> None:
    rows, _ = compile_source(CSRC / "augmented_matmul_one_pass_sm90.cu", "90a")
    assert (
        len({row.kernel for row in rows}) == 36
    )  # two types, two orders of W, three widths; alone, in pairs and fours
    assert all("one_pass_hopper" in row.kernel and row.registers == 168 for row in rows)
    alone = {row.instructions["HGMMA"] for row in rows if "UBLKCP" not in row.instructions}
    clusters = [row.instructions["HGMMA"] for row in rows if row.instructions.get("UBLKCP") == 1]
    assert alone == {4 * 2 + ranks for ranks in (1, 2, 4)}  # a stage's, and those of u
    assert len(clusters) == 24 and set(clusters) == {4 * 2 + 4 + 2 * ranks for ranks in (1, 2, 4)}  # with u, without
    assert [violation for row in rows for violation in row.violations] == []


@pytest.mark.slow
@needs_compilers
def test_streaming_kernels_hold_the_contract() -> None:
    rows, _ = compile_source(CSRC / "project_sm90.cu", "90a")
    assert len({row.kernel for row in rows}) == 12  # two types; a by k in four widths, by columns in two
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
def test_rules(kernel: str, stack: int, instructions: dict[str, int], violations: list[str]) -> None:
    assert check_cuda(CudaRow("90a", kernel, 64, stack, instructions, [])) == violations

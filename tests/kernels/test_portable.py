"""The portable CUDA matmul: K in parts, no bank met twice in any type, and what its main loop may cost."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.cuda_contract import MOST_BESIDE, Row, blocks_at_once, check, compile_source, main_loop
from reslora_kernels.backends import cuda
from reslora_kernels.cli.toolchain import find_nvcc

from .. import cuda_on_cpu
from .calls import Call, draw, launched, run, truth

ROOT = Path(__file__).parents[2]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FEW_ROWS = Call("few rows: K of y in parts", 5, 1288, 72, 16, 16, BF16, BF16, p=0.5, hand=(0, 16), residual=True)
PROCESSORS = 4  # of the emulator


@pytest.fixture
def emulator(emulated: Path | None, monkeypatch: pytest.MonkeyPatch) -> Path:
    if emulated is None:
        pytest.skip("counted by the emulator")
    module = cuda_on_cpu.load(emulated)
    monkeypatch.setattr(cuda, "_extension", lambda: module)
    cuda_on_cpu.set_seed(emulated, 1)
    cuda_on_cpu.take_statistics(emulated)
    return emulated


def test_few_rows_take_k_in_parts_that_are_added_in_order(emulator: Path, poisoned: None) -> None:
    values = draw(FEW_ROWS, torch.device("cpu"), integers=True)
    expected = truth(FEW_ROWS, values)
    results, launches = launched(FEW_ROWS, values, "augmented_matmul")
    assert all(torch.equal(result, expected[name].to(result.dtype)) for name, result in results.items())
    forward, dx = launches
    assert (forward["parts"], forward["split"]) == (2, 704) and forward["split"] % 64 == 0
    assert "partial" not in dx  # of 72 columns of dy
    random = draw(FEW_ROWS, torch.device("cpu"), integers=False)
    first = run(FEW_ROWS, random, cuda)
    for seed in range(3):
        cuda_on_cpu.set_seed(emulator, seed)
        assert all(torch.equal(first[name], result) for name, result in run(FEW_ROWS, random, cuda).items())


@pytest.mark.parametrize(
    ("m", "n", "k", "parts"), [(64, 64, 2048, 4), (65, 64, 2048, 2), (64, 192, 2048, 1), (64, 64, 1000, 1)]
)
def test_k_is_split_where_processors_would_have_no_tile(
    m: int, n: int, k: int, parts: int, emulator: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESLORA_CUDA_HOPPER", "off")
    x = torch.empty(m, k)
    split, found = cuda._matmul_split(x, n)
    assert found == parts and (parts - 1) * split < k <= parts * split
    said = cuda.explain(x, torch.empty(n, k), 16)
    assert said.endswith(f" and K in {parts} parts" if parts > 1 else "in tiles of 64 x 64")


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("dtype", [FP16, FP32, "tf32"], ids=str)
def test_no_bank_is_met_twice(dtype: torch.dtype | str, large: bool, emulator: Path, monkeypatch) -> None:
    """Of ldmatrix, of y on its way out, and of what TF32 reads one at a time."""
    monkeypatch.setattr(cuda, "_large", lambda *_: large)
    call = Call("", 70, 72, 264, 16, 16, FP32 if dtype == "tf32" else dtype, FP32, scaling=0.5, p=0.5)
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        for one in (call, replace(call, p=0.0)):
            run(one, draw(one, torch.device("cpu"), integers=False), cuda)
    finally:
        torch.set_float32_matmul_precision("highest")
    counted = cuda_on_cpu.take_statistics(emulator)
    assert counted.shared_accesses > 0 and counted.bank_conflicts == 0
    assert (counted.matrix_loads > 0) == (dtype != FP32)


def test_an_odd_width_leaves_one_element_at_a_time(emulator: Path, poisoned: None) -> None:
    """W is copied as it is, since its rows are; y's rows begin anywhere."""
    call = Call("", 66, 72, 131, 8, 8, FP32, FP32)
    values = draw(call, torch.device("cpu"), integers=True)
    expected = truth(call, values)
    assert torch.equal(run(call, values, cuda)["y"], expected["y"].float())


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
    row = Row("80", "augmented_matmul_kernel<Bf16Math, Large, 1, 0, 1>", 240, 0, instructions, [])
    row.loop, row.blocks = {"all": 88 + MOST_BESIDE, "HMMA": 64, "LDSM": 16, "LDGSTS": 8}, blocks_at_once(240, 128)
    assert row.blocks == 2 and check(row) == []
    row.loop["all"] += 1
    row.blocks = blocks_at_once(241, 256)
    assert check(row) == [
        f"{MOST_BESIDE + 1} instructions beside 64 HMMA in a step of the main loop", "registers for 1 blocks, not 2",
    ]  # fmt: skip
    assert check(replace(row, kernel="augmented_matmul_kernel<Bf16Math, Small, 1, 0, 0>", loop={}, blocks=1)) == []


@pytest.mark.slow
@pytest.mark.skipif(find_nvcc() is None or shutil.which("g++") is None, reason="needs nvcc and g++")
def test_the_compiler_keeps_to_it() -> None:
    rows, _ = compile_source(ROOT / "csrc" / "augmented_matmul_sm80.cu", "80")
    assert [(row.kernel, row.violations) for row in rows if row.violations] == []
    counted = [row for row in rows if row.kernel.startswith("augmented_matmul_kernel<Bf16Math, Large, 1, 0, 1")]
    assert len(counted) == 1 and counted[0].loop["HMMA"] == 4 * counted[0].loop["LDSM"] == 8 * counted[0].loop["LDGSTS"]

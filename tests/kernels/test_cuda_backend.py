"""The CUDA backend against float64: exact on integers, else within twice PyTorch's own error; and what keeps it away.

On a GPU the extension that was built, elsewhere the same sources in the emulator of ``tests/cuda_on_cpu``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from reslora_kernels.backends import cuda, native, select
from reslora_kernels.backends import torch as plain
from reslora_kernels.cli.doctor import check_case
from reslora_kernels.dropout import Dropout
from reslora_kernels.ops import lora_linear
from reslora_kernels.side_channel import Needs, SideChannel
from reslora_kernels.testing import GoldenCase, assert_close_to_truth, golden_cases

from .. import cuda_on_cpu
from .calls import SEED, Call, draw, launched, run, truth

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CALLS = [
    Call("one token, as in generation", 1, 257, 100, 16, 8, BF16, FP32, hand=(8, 16), residual=True),
    Call("everything one", 3, 1, 1, 1, 1, BF16),
    Call("several tiles, two passes", 100, 100, 257, 34, 17, BF16, BF16, hand=(17, 34), residual=True, c=2.0),
    Call("several tiles, one pass", 100, 104, 264, 32, 16, BF16, BF16, hand=(16, 32), residual=True, c=2.0),
    Call("one pass, float16, nothing aligned", 70, 100, 257, 17, 9, FP16, FP16, scaling=0.5, hand=(8, 17)),
    Call("dropout, columns not a multiple of 8", 70, 100, 72, 8, 8, FP32, FP32, p=0.5, hand=(0, 8)),
    Call("dropout, sliced", 40, 257, 64, 24, 8, BF16, FP32, p=0.5, residual=True, layout="sliced"),
    Call("dropout, aligned", 130, 136, 192, 16, 16, FP16, FP16, p=0.5, hand=(0, 16), residual=True),
    Call("most dropped", 17, 24, 64, 3, 3, FP16, FP16, p=0.9, bias=False),
    Call("rank above width", 17, 8, 24, 64, 64, BF16, BF16, hand=(0, 64)),
    Call("stack over several blocks of ranks", 20, 40, 48, 255, 255, FP16, FP32),
    Call("column-major operands", 33, 72, 40, 16, 16, BF16, FP32, layout="transposed", residual=True),
    Call("transposed weight", 33, 72, 40, 16, 16, FP32, FP32, layout="transposed weight", hand=(0, 16)),
    Call("few rows, long reduction: K in parts", 3, 1032, 40, 16, 16, BF16, FP32, p=0.5, residual=True),
    Call("many rows: M in parts", 1100, 40, 72, 16, 16, BF16, BF16, p=0.5),
    Call("the largest stack", 20, 24, 40, 1024, 512, BF16, BF16, hand=(512, 1024), residual=True),
    Call("double adapters", 40, 72, 100, 24, 8, FP32, torch.float64, hand=(8, 24), residual=True),
    Call("u is given, nothing to project", 70, 100, 136, 0, 12, residual=True),
]
EXACT = [call for call in CALLS if call.p in (0.0, 0.5)]  # 1 / (1 - p) is a power of two


def name_of(value: object) -> str | None:
    return value.why if isinstance(value, Call) else None


@pytest.fixture(autouse=True)
def extension(emulated: Path | None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path | None]:
    if emulated is None:
        if reason := cuda.unavailable_reason():
            pytest.skip(reason)
    else:
        module = cuda_on_cpu.load(emulated)
        monkeypatch.setattr(native, "load", lambda: module)
        monkeypatch.setattr(cuda, "unavailable_reason", lambda: None)
        cuda_on_cpu.set_seed(emulated, 1)
    select.unavailable_reason.cache_clear()
    select._chosen.clear()
    yield emulated
    select.unavailable_reason.cache_clear()
    select._chosen.clear()


@pytest.fixture
def emulator(extension: Path | None) -> Path:
    if extension is None:
        pytest.skip("counted by the emulator")
    cuda_on_cpu.take_statistics(extension)
    return extension


@pytest.fixture(params=[False, True], ids=["small tile", "large tile"])
def large(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(cuda, "_large", lambda *_: request.param)
    return request.param


@pytest.mark.parametrize("call", EXACT, ids=name_of)
def test_integers_come_out_bit_for_bit(call: Call, large: bool, device: torch.device, poisoned: None) -> None:
    values = draw(call, device, integers=True)
    expected, plain = truth(call, values), run(call, values)
    for name, result in run(call, values, cuda).items():
        assert result.dtype == plain[name].dtype
        assert torch.equal(result, expected[name].to(result.dtype)), name


@pytest.mark.parametrize("call", CALLS, ids=name_of)
def test_error_at_most_twice_plain_pytorchs(call: Call, device: torch.device, poisoned: None) -> None:
    values = draw(call, device, integers=False)
    expected, plain = truth(call, values), run(call, values)
    for name, result in run(call, values, cuda).items():
        assert_close_to_truth(result, expected[name], plain[name], name)


@pytest.mark.parametrize("large", [False, True], indirect=True)
def test_integers_in_tf32(large: bool, device: torch.device, poisoned: None) -> None:
    call = Call("", 100, 100, 257, 34, 17, FP32, FP32, hand=(17, 34), residual=True, p=0.5)
    values = draw(call, device, integers=True)
    torch.set_float32_matmul_precision("high")
    try:
        results = run(call, values, cuda)
    finally:
        torch.set_float32_matmul_precision("highest")
    expected = truth(call, values)
    for name, result in results.items():
        assert torch.equal(result, expected[name].to(result.dtype)), name


@pytest.mark.parametrize("call", [CALLS[2], CALLS[6], CALLS[13]], ids=name_of)
def test_same_bits_whatever_the_schedule(call: Call, extension: Path | None, device: torch.device) -> None:
    values = draw(call, device, integers=False)
    first = run(call, values, cuda)
    for seed in range(3 if extension else 250):
        if extension:
            cuda_on_cpu.set_seed(extension, seed)
        again = run(call, values, cuda)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("wanted", ["dx", "da_cat", "db_cat", "dresidual"])
def test_only_what_is_asked_for(wanted: str, device: torch.device, poisoned: None) -> None:
    call = Call("", 40, 72, 100, 24, 8, FP32, FP32, p=0.5, hand=(8, 24), residual=True)
    values = draw(call, device, integers=True)
    everything = run(call, values, cuda)
    names = ("dx", "da_cat", "db_cat", "dresidual")
    gradients = cuda.backward(
        values["dy"], values["dhanded"], values["x"] if wanted == "da_cat" else None, values["weight"],
        (values["a_cat"],), (values["b_cat"],), everything["u"] if wanted == "db_cat" else None,
        SideChannel(call.c, call.scaling, *call.hand), Dropout(torch.tensor(SEED, device=device), call.p),
        Needs(*(name == wanted for name in names)),
    )  # fmt: skip
    for name, gradient in zip(names, gradients, strict=True):
        assert torch.equal(gradient, everything[name]) if name == wanted else gradient is None


@pytest.mark.parametrize("empty", ["m", "n"])
def test_nothing_to_compute_goes_to_torch(empty: str, device: torch.device) -> None:
    call = replace(Call("", 8, 16, 24, 4, 4, FP32, FP32, residual=True), **{empty: 0})
    values = draw(call, device, integers=False)
    assert select.choose("cuda", values["x"], values["weight"], 4) is plain


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("n", [72, 520], ids=["one pass", "two passes"])
def test_what_is_not_finite_comes_out_in_its_row_only(value: float, n: int, device: torch.device) -> None:
    call = Call("", 40, 100, n, 24, 8, BF16, FP32, hand=(8, 24), residual=True)
    values = draw(call, device, integers=False)
    values["x"][7, 99] = values["dy"][5, 71] = value
    results = run(call, values, cuda)
    for name, row in (("y", 7), ("u", 7), ("handed", 7), ("dx", 5), ("dresidual", 5)):
        broken = ~results[name].isfinite().all(1)
        assert broken.nonzero().flatten().tolist() == [row], name


@pytest.mark.parametrize("case", golden_cases(), ids=lambda case: case.name)
def test_golden_vectors(case: GoldenCase) -> None:
    check = check_case(case, "cuda")
    assert check.dtype == "float32"
    assert check.failure is None


def test_launches(emulator: Path, device: torch.device) -> None:
    """One or two for the forward pass, three for the backward pass; no bank conflict in ldmatrix."""
    for n, forward in ((72, 1), (520, 2)):
        call = Call("", 300, 136, n, 16, 16, residual=True)
        values = draw(call, device, integers=False)
        cuda_on_cpu.take_statistics(emulator)
        run(call, values, cuda)
        counted = cuda_on_cpu.take_statistics(emulator)
        assert counted.launches == forward + 3
        assert counted.bank_conflicts == 0
        assert counted.matrix_loads > 0
        assert 0.4 < counted.late_copies / counted.copies < 0.6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8, dtype=torch.float64), "weight": torch.zeros(4, 8, dtype=torch.float64)}, "x must be"),
        ({"a_stack": [torch.zeros(1025, 8)], "b_stack": [torch.zeros(4, 1025)]}, "a_stack's total rank must be"),
    ],
    ids=["float64", "rank beyond the limit"],
)
def test_bad_input_is_refused_before_any_launch(change: dict, message: str, device: torch.device) -> None:
    arguments = {
        "x": torch.zeros(2, 8), "weight": torch.zeros(4, 8), "bias": None,
        "a_stack": [torch.zeros(2, 8)], "b_stack": [torch.zeros(4, 2)],
    }  # fmt: skip
    there = {name: _on(device, value) for name, value in (arguments | change).items()}
    with pytest.raises(ValueError, match=message):
        lora_linear(**there, scaling=1.0, backend="cuda")


def _on(device: torch.device, value: Any) -> Any:
    if isinstance(value, list):
        return [one.to(device) for one in value]
    return value if value is None else value.to(device)


FEW_ROWS = Call("few rows: K of y in parts", 5, 1288, 72, 16, 16, BF16, BF16, p=0.5, hand=(0, 16), residual=True)


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

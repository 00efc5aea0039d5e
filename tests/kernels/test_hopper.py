"""The Hopper kernels against float64, by the rules of test_cuda_backend: every variant, both orders of W, ragged sizes.

On a GPU of compute capability 9.0 the extension that was built; without a GPU the same source in the emulator.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from reslora_kernels.backends import cuda, hopper, native
from reslora_kernels.side_channel import SideChannel
from reslora_kernels.testing import assert_close_to_truth

from .. import cuda_on_cpu
from .calls import Call, draw, launched, run, truth

pytestmark = pytest.mark.slow
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CALLS = [
    Call("several tiles for a block, ragged edges", 300, 200, 520, 16, 16, BF16, BF16),
    Call("nothing but one tile, which it does not fill", 64, 72, 520, 40, 40, FP16, FP16, scaling=0.5),
    Call("dropout, a handed stack over two stages of ranks", 200, 264, 536, 72, 72, BF16, FP32, hand=(8, 72), p=0.5),
    Call("dropout, few kept", 130, 136, 528, 8, 8, FP16, FP16, p=0.9, bias=False),
    Call("one step of K, two of ranks", 257, 64, 776, 128, 128, FP16, BF16, c=2.0),
    Call("u is given", 100, 104, 264, 0, 24, residual=True),
]
ONE_PASS = [
    Call(
        "one pass, several tiles for a block, handed on",
        300,
        200,
        264,
        32,
        16,
        hand=(16, 32),
        residual=True,
        c=2.0,
    ),
    Call("one pass, nothing but one tile, which it does not fill", 64, 72, 40, 8, 8, FP16, FP16, scaling=0.5),
    Call("one pass, as wide as it may be, odd ranks", 130, 136, 512, 29, 24, BF16, BF16, hand=(13, 29), bias=False),
    Call("one pass, one step of K", 129, 64, 72, 17, 8, FP16, FP32, scaling=1.0, residual=True),
    Call("one pass, wider than a cluster, all ranks", 300, 520, 1032, 64, 40, hand=(40, 64), residual=True),
]
PROJECTED = [  # and the parts of K in the two directions
    (Call("16 columns, one stage", 257, 40, 520, 16, 16, BF16, BF16), (1, 1)),
    (Call("32 columns, parts of K, handed columns", 100, 1288, 776, 32, 24, FP16, FP16, hand=(8, 32)), (2, 2)),
    (Call("a residual for fewer columns than the rank", 70, 520, 520, 40, 8, BF16, FP32, residual=True), (2, 2)),
    (Call("a ring of stages used again, 64", 200, 1160, 520, 56, 56, FP16, BF16, hand=(0, 40), residual=True), (1, 1)),
    (Call("a ring of stages used again, 128", 130, 1032, 776, 120, 72, BF16, BF16, residual=True), (1, 1)),
]
EXACT = [call for call in CALLS if call.p in (0.0, 0.5)]


def name_of(value: object) -> str | None:
    return value.why if isinstance(value, Call) else None


@pytest.fixture(autouse=True)
def extension(hopper_extension: Path | None) -> Path | None:
    return hopper_extension


@pytest.fixture(params=hopper.VARIANTS)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(hopper.VARIABLE, request.param)
    return request.param


@pytest.fixture(params=hopper.ONE_PASS_VARIANTS)
def in_one_pass(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(hopper.VARIABLE, request.param)
    return request.param


def run_one_pass(call: Call, values: dict) -> dict[str, torch.Tensor]:
    """Forward and backward, u beside y and dh beside dx by the one-pass variant that the environment names."""
    results, made = launched(call, values, "augmented_matmul")
    number = hopper.ONE_PASS_VARIANTS[hopper.setting()]
    assert [("a" in given, given["hopper"]) for given in made] == [(True, number)] * 2
    return results


def forward(call: Call, values: dict) -> tuple[torch.Tensor, ...]:
    stacks, side = ((values["a_cat"],), (values["b_cat"],)), SideChannel(call.c, call.scaling, *call.hand)
    found = cuda.forward(values["x"], values["weight"], values["bias"], *stacks, values["residual"], side, None)
    return tuple(tensor for tensor in found if tensor is not None)


def run_twice(call: Call, values: dict) -> dict[str, torch.Tensor]:
    """Forward and backward, both with the variant of the Hopper kernel that the environment names."""
    results, made = launched(call, values, "augmented_matmul")
    number = hopper.VARIANTS[hopper.setting()]
    expected = 2 if call.rank else 1  # without a rank of its own the backward pass has nothing to fuse
    assert [given["hopper"] for given in made] == [number] * expected
    return results


@pytest.mark.parametrize("call", EXACT, ids=name_of)
def test_integers_come_out_bit_for_bit(call: Call, variant: str, device: torch.device, poisoned: None) -> None:
    values = draw(call, device, integers=True)
    expected = truth(call, values)
    for name, result in run_twice(call, values).items():
        assert torch.equal(result, expected[name].to(result.dtype)), name


@pytest.mark.parametrize("call", ONE_PASS, ids=name_of)
def test_one_pass(call: Call, in_one_pass: str, device: torch.device, poisoned: None) -> None:
    values = draw(call, device, integers=True)
    expected = truth(call, values)
    for name, result in run_one_pass(call, values).items():
        assert torch.equal(result, expected[name].to(result.dtype)), name
    values = draw(call, device, integers=False)
    expected, plain = truth(call, values), run(call, values)
    for name, result in run_one_pass(call, values).items():
        assert_close_to_truth(result, expected[name], plain[name], name)


@pytest.mark.parametrize("call", [ONE_PASS[0], ONE_PASS[-1]], ids=name_of)
def test_one_pass_is_one_launch_that_reads_each_tile_once_whatever_the_schedule(
    call: Call, in_one_pass: str, extension: Path | None, device: torch.device, poisoned: None
) -> None:
    values = draw(call, device, integers=False)
    before = forward(call, values)
    first = -(-call.m // 128)
    tiles = first * -(-call.n // 256)
    steps, steps_of_ranks = -(-call.k // 64), -(-call.rank // 16)
    for seed in range(4 if extension else 250):
        if extension:
            cuda_on_cpu.set_seed(extension, seed)
            cuda_on_cpu.take_statistics(extension)
        assert all(map(torch.equal, before, forward(call, values)))
        if extension:
            counted = cuda_on_cpu.take_statistics(extension)
            assert counted.launches == 1
            # x, W and, where u is made, A; then B and, where it is not, u.
            assert counted.tensor_loads == first * (3 * steps + 1) + (tiles - first) * (2 * steps + 2)
            products = 2 * (4 * steps + steps_of_ranks)  # of y, of u and B
            assert counted.group_multiplications == tiles * products + first * 4 * steps * 2  # of x and A


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_one_pass_keeps_what_is_not_finite_in_its_row(
    value: float, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(hopper.VARIABLE, "one-pass")
    values = draw(ONE_PASS[0], device, integers=False)
    values["x"][7, 99] = value
    for result in forward(ONE_PASS[0], values):
        assert (~result.isfinite().all(1)).nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize(
    "call",
    [
        Call("few rows", 63, 72, 264, 16, 16),
        Call("odd rank", 70, 72, 264, 16, 12),
        Call("odd width", 70, 72, 261, 16, 16),
        Call("w by columns", 70, 72, 264, 16, 16, layout="transposed weight"),
        Call("everything by columns", 72, 72, 264, 16, 16, layout="transposed"),
    ],
    ids=name_of,
)
def test_one_pass_that_it_cannot_take_goes_to_the_portable_kernel(
    call: Call, extension: Path | None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(hopper.VARIABLE, "cooperative")
    values = draw(call, device, integers=True)
    expected = truth(call, values)
    if extension:
        cuda_on_cpu.take_statistics(extension)
    y, u = forward(call, values)
    assert torch.equal(y, expected["y"].to(y.dtype))
    assert torch.equal(u, expected["u"].to(u.dtype))
    if extension:
        counted = cuda_on_cpu.take_statistics(extension)
        assert (counted.launches, counted.tensor_loads) == (1, 0)


@pytest.mark.parametrize(("call", "parts"), PROJECTED, ids=name_of)
def test_projected_integers_come_out_bit_for_bit(
    call: Call, parts: tuple[int, int], monkeypatch: pytest.MonkeyPatch, device: torch.device, poisoned: None
) -> None:
    monkeypatch.setenv(hopper.VARIABLE, "cooperative")
    values = draw(call, device, integers=True)
    expected = truth(call, values)
    results, made = launched(call, values, "project")
    for name, result in results.items():
        assert torch.equal(result, expected[name].to(result.dtype)), name
    assert [given["hopper"] for given in made] == [True, True]
    if device.type == "cpu":
        assert tuple(given["parts"] for given in made) == parts


@pytest.mark.parametrize("call", [call for call, _ in PROJECTED[1:3]], ids=name_of)
def test_projected_error_at_most_twice_plain_pytorchs(
    call: Call, monkeypatch: pytest.MonkeyPatch, device: torch.device, poisoned: None
) -> None:
    monkeypatch.setenv(hopper.VARIABLE, "cooperative")
    values = draw(call, device, integers=False)
    expected, plain = truth(call, values), run(call, values)
    for name, result in launched(call, values, "project")[0].items():
        assert_close_to_truth(result, expected[name], plain[name], name)


@pytest.mark.parametrize(
    ("call", "streamed"),
    [
        (Call("dropout", 70, 72, 520, 8, 8, p=0.5), [False, True]),
        (Call("more ranks than a block holds", 70, 72, 520, 136, 136), [False, False]),
        (Call("few rows", 63, 72, 520, 8, 8), [False, False]),
        (Call("rows of B that the copy engine cannot have", 70, 72, 520, 36, 36), [True, False]),
    ],
    ids=name_of,
)
def test_what_cannot_be_streamed_is_projected_by_the_portable_kernel(
    call: Call, streamed: list[bool], monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    values = draw(call, device, integers=True)
    expected = truth(call, values)
    monkeypatch.setenv(hopper.VARIABLE, "cooperative")
    results, made = launched(call, values, "project")
    assert [given["hopper"] for given in made] == streamed
    for name, result in results.items():
        assert torch.equal(result, expected[name].to(result.dtype)), name
    monkeypatch.setenv(hopper.VARIABLE, "off")
    assert [given["hopper"] for given in launched(call, values, "project")[1]] == [False, False]


@pytest.mark.parametrize("call", CALLS, ids=name_of)
def test_error_at_most_twice_plain_pytorchs(call: Call, variant: str, device: torch.device, poisoned: None) -> None:
    values = draw(call, device, integers=False)
    expected, plain = truth(call, values), run(call, values)
    for name, result in run_twice(call, values).items():
        assert_close_to_truth(result, expected[name], plain[name], name)


def test_same_bits_whatever_the_schedule(variant: str, extension: Path | None, device: torch.device) -> None:
    call = CALLS[2]
    values = draw(call, device, integers=False)
    first = run_twice(call, values)
    for seed in range(2 if extension else 250):
        if extension:
            cuda_on_cpu.set_seed(extension, seed)
        again = run(call, values, cuda)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_what_is_not_finite_comes_out_in_its_row_only(value: float, variant: str, device: torch.device) -> None:
    call = Call("", 130, 104, 520, 24, 24)
    values = draw(call, device, integers=False)
    values["x"][7, 99] = values["dy"][5, 71] = value
    results = run_twice(call, values)
    for name, row in (("y", 7), ("u", 7), ("dx", 5)):
        assert (~results[name].isfinite().all(1)).nonzero().flatten().tolist() == [row], name


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (Call("", 63, 72, 520, 40, 40), "fewer than 64 rows"),
        (Call("", 70, 72, 520, 40, 40, FP32), "float16 or bfloat16"),
        (Call("", 70, 72, 521, 40, 40), "not a multiple of 16 bytes"),
        (Call("", 70, 72, 520, 36, 36), "not aligned"),
        (Call("", 70, 72, 520, 40, 40, layout="sliced"), "not aligned"),
    ],
    ids=["few rows", "float32", "odd width", "odd rank", "odd addresses"],
)
def test_what_it_cannot_take_goes_to_the_portable_kernel(
    call: Call, reason: str, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setenv(hopper.VARIABLE, "cooperative")
    values = draw(call, device, integers=True)
    x, others = values["x"], (values["weight"].T, values["b_cat"].T.to(values["x"].dtype))
    assert reason in (hopper.unsupported_reason(native.load(), x, *others, columns=call.n) or "")
    expected = truth(call, values)
    for name, result in run(call, values, cuda).items():
        assert torch.equal(result, expected[name].to(result.dtype)), name

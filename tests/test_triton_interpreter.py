"""The patched interpreter: what it computes is right, and each planted fault is caught."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
InterpreterError = pytest.importorskip("triton.runtime.errors").InterpreterError
TensorDescriptor = pytest.importorskip("triton.tools.tensor_descriptor").TensorDescriptor

SIZE = 64


@pytest.fixture(autouse=True)
def interpreted(triton_interpreter: bool) -> None:
    if not triton_interpreter:
        pytest.skip("kernels run on the GPU here")


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# Numbers


@triton.jit
def twice(value):
    return value * 2.0


@triton.jit
def arithmetic(x, y, out, SIZE: tl.constexpr):
    lanes = tl.arange(0, SIZE)
    a, b = tl.load(x + lanes), tl.load(y + lanes)
    tl.store(out + lanes, a + b)
    tl.store(out + SIZE + lanes, a * b)
    tl.store(out + 2 * SIZE + lanes, a - b)
    tl.store(out + 3 * SIZE + lanes, -a)
    tl.store(out + 4 * SIZE + lanes, tl.maximum(a, b))
    tl.store(out + 5 * SIZE + lanes, tl.where(a > b, a, tl.full((SIZE,), 0.1, a.dtype)))
    tl.store(out + 6 * SIZE + lanes, tl.abs(twice(a)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_arithmetic_is_that_of_torch(dtype: torch.dtype) -> None:
    a, b = draw(SIZE, dtype=dtype), draw(SIZE, dtype=dtype, seed=1)
    out = torch.full((7, SIZE), torch.nan, dtype=dtype)
    arithmetic[(1,)](a, b, out, SIZE)
    expected = [a + b, a * b, a - b, -a, a.maximum(b), a.where(a > b, torch.tensor(0.1, dtype=dtype)), (2 * a).abs()]
    assert torch.equal(out, torch.stack(expected))


@triton.jit
def scaled_by_argument(x, out, scale, SIZE: tl.constexpr):
    lanes = tl.arange(0, SIZE)
    tl.store(out + lanes, tl.load(x + lanes) * scale)


def test_a_float_argument_is_float32() -> None:
    x, out = draw(SIZE, dtype=torch.bfloat16), torch.full((SIZE,), torch.nan)
    scaled_by_argument[(1,)](x, out, 0.1, SIZE)
    assert torch.equal(out, x.float() * torch.tensor(0.1))


@triton.jit
def to_bf16(x, out, SIZE: tl.constexpr, ROUNDING: tl.constexpr):
    lanes = tl.arange(0, SIZE)
    tl.store(out + lanes, tl.load(x + lanes).to(tl.bfloat16, fp_downcast_rounding=ROUNDING))


def test_casts_round_to_nearest_even() -> None:
    """Ties in both directions, a carry into the exponent, overflow, a denormal, infinity; NaN stays NaN."""
    x = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 1.9999999, 3.4e38, 1e-40, -torch.inf, torch.nan])
    out, truncated = torch.zeros(8, dtype=torch.bfloat16), torch.zeros(8, dtype=torch.bfloat16)
    to_bf16[(1,)](x, out, 8, None)
    assert torch.equal(out[:7], x.bfloat16()[:7]) and out[7].isnan()
    to_bf16[(1,)](x, truncated, 8, "rtz")
    assert truncated[2] == 1 and out[2] == 1 + 2**-7, "a kernel that truncates is told from one that rounds"


@triton.jit
def dot(x, y, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(x + m[:, None] * K + k[None, :])
    b = tl.trans(tl.load(y + n[:, None] * K + k[None, :]))
    tl.store(out + m[:, None] * N + n[None, :], tl.dot(a, b, input_precision=PRECISION))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dot_accumulates_in_float32(dtype: torch.dtype) -> None:
    """Sums of 1/3 as bfloat16 would stop growing at 64 of 256 terms."""
    x, y = torch.full((16, 256), 1 / 3, dtype=dtype), torch.ones(16, 256, dtype=dtype)
    out = torch.full((16, 16), torch.nan)
    dot[(1,)](x, y, out, 16, 16, 256, "ieee")
    torch.testing.assert_close(out, (x.double() @ y.double().T).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("precision", "kept"), [("ieee", 2**-12), ("tf32", 0.0), ("tf32x3", 2**-12)])
def test_tf32_loses_low_bits(precision: str, kept: float) -> None:
    x, y, out = torch.full((16, 16), 1 + 2**-12), torch.eye(16), torch.zeros(16, 16)
    dot[(1,)](x, y, out, 16, 16, 16, precision)
    assert torch.equal(out, torch.full((16, 16), 1 + kept))


def test_dots_too_small_for_the_hardware_are_refused() -> None:
    x = torch.ones(16, 4)
    with pytest.raises(InterpreterError, match="K >= "):
        dot[(1,)](x, x, torch.zeros(16, 16), 16, 16, 4, "ieee")


@triton.jit
def product_of_words(x, y, low, high, halves, SIZE: tl.constexpr):
    lanes = tl.arange(0, SIZE)
    a, b = tl.load(x + lanes).to(tl.uint32, bitcast=True), tl.load(y + lanes).to(tl.uint32, bitcast=True)
    tl.store(low + lanes, (a * b).to(tl.int32, bitcast=True))
    tl.store(high + lanes, tl.umulhi(a, b).to(tl.int32, bitcast=True))
    tl.store(halves + lanes, (((a >> 16) | (a << 16)) ^ b).to(tl.int32, bitcast=True))


def test_unsigned_words_wrap() -> None:
    """What a counter-based generator needs: product, upper half of the product, shifts."""
    words = torch.randint(0, 2**32, (2, SIZE), generator=torch.Generator().manual_seed(0))
    a, b = words.tolist()
    out = torch.zeros(3, SIZE, dtype=torch.int32)
    product_of_words[(1,)](*words.to(torch.int32), *out, SIZE)
    unsigned = (out.long() % 2**32).tolist()
    assert unsigned[0] == [x * y % 2**32 for x, y in zip(a, b, strict=True)]
    assert unsigned[1] == [x * y >> 32 for x, y in zip(a, b, strict=True)]
    assert unsigned[2] == [(x >> 16 | x << 16) % 2**32 ^ y for x, y in zip(a, b, strict=True)]


@triton.jit
def rearranged(x, out, SIZE: tl.constexpr, ROWS: tl.constexpr):
    values = tl.load(x + tl.arange(0, SIZE))
    grid = tl.reshape(values, (ROWS, SIZE // ROWS))
    sums = tl.sum(grid, axis=1)
    for row in tl.static_range(2):
        sums += tl.where(tl.arange(0, ROWS) == row, 1.0, 0.0)
    left, right = tl.split(tl.join(values, values + 1))
    tl.store(out + tl.arange(0, SIZE), tl.reshape(tl.trans(grid), (SIZE,)))
    tl.store(out + SIZE + tl.arange(0, SIZE), right - left)
    tl.store(out + 2 * SIZE + tl.arange(0, ROWS), sums + tl.max(grid, axis=1))


def test_shapes() -> None:
    x, out = torch.arange(SIZE).float(), torch.zeros(3, SIZE)
    rearranged[(1,)](x, out, SIZE, 8)
    grid = x.view(8, 8)
    assert torch.equal(out[0], grid.T.reshape(SIZE)) and torch.equal(out[1], torch.ones(SIZE))
    assert torch.equal(out[2, :8], grid.sum(1) + grid.amax(1) + torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 0]))


# Addresses


@triton.jit
def copy_lanes(x, out, first, limit, SIZE: tl.constexpr):
    lanes = first + tl.arange(0, SIZE)
    tl.store(out + lanes, tl.load(x + lanes, mask=lanes < limit, other=-1.0), mask=lanes < limit)


FAULTY_COPIES = {
    "a load behind the end": lambda: (torch.ones(SIZE - 1), torch.zeros(SIZE), 0, SIZE),
    "a store behind the end": lambda: (torch.ones(SIZE), torch.zeros(SIZE - 1), 0, SIZE),
    "a load before the start": lambda: (torch.ones(SIZE), torch.zeros(SIZE), -1, SIZE),
    "the tensor behind a view": lambda: (torch.ones(2 * SIZE)[:5], torch.zeros(SIZE), 0, SIZE),
    "the gap of a slice": lambda: (torch.ones(SIZE, 2)[:, 0], torch.zeros(SIZE), 0, SIZE),
    "an empty tensor": lambda: (torch.ones(0), torch.zeros(SIZE), 0, SIZE),
}


@pytest.mark.parametrize("make", FAULTY_COPIES.values(), ids=FAULTY_COPIES.keys())
def test_out_of_bounds_is_caught(make: Callable[[], tuple[Tensor, Tensor, int, int]]) -> None:
    with pytest.raises(InterpreterError, match="out-of-bounds"):
        copy_lanes[(1,)](*make(), SIZE)


def test_masked_lanes_may_point_anywhere() -> None:
    x, out = torch.ones(5), torch.zeros(5)
    copy_lanes[(1,)](x, out, 0, 5, SIZE)
    assert torch.equal(out, x)


@triton.jit
def reach_for_neighbour(x, distance, out):
    tl.store(out, tl.load(x + distance))


def test_another_argument_is_out_of_bounds_too() -> None:
    whole = torch.arange(32).float()
    x, neighbour = whole[:16], whole[16:]
    with pytest.raises(InterpreterError, match=r"out-of-bounds load: 1 of 1 lanes leave x \[16\] float32"):
        reach_for_neighbour[(1,)](x, 16, neighbour)


@triton.jit
def copy_tile(source, target, row, column):
    target.store([row, column], source.load([row, column]))


@triton.jit
def copy_tile_on_device(x, out, M, N, row, column, SIZE: tl.constexpr):
    source = tl.make_tensor_descriptor(x, shape=[M, N], strides=[N, 1], block_shape=[SIZE, SIZE])
    copy_tile(source, tl.make_tensor_descriptor(out, [M, N], [N, 1], [SIZE, SIZE]), row, column)


@pytest.mark.parametrize("where", ["host", "device"])
def test_descriptors_read_zero_and_write_nothing_outside(where: str) -> None:
    x = draw(24, 24, dtype=torch.bfloat16)
    guarded = torch.full((40, 24), 7.0, dtype=torch.bfloat16)
    out = guarded[8:32]
    if where == "host":
        copy_tile[(1,)](*(TensorDescriptor.from_tensor(t, [16, 16]) for t in (x, out)), 16, 16)
    else:
        copy_tile_on_device[(1,)](x, out, 24, 24, 16, 16, 16)
    expected = torch.full_like(out, 7.0)
    expected[16:, 16:] = x[16:, 16:]
    assert torch.equal(out, expected) and (guarded[:8] == 7).all() and (guarded[32:] == 7).all()


@triton.jit
def load_tile(source, out, SIZE: tl.constexpr):
    lanes = tl.arange(0, SIZE)
    tl.store(out + lanes[:, None] * SIZE + lanes[None, :], source.load([0, 0]))


def test_descriptor_lanes_outside_its_shape_are_zero() -> None:
    x, out = torch.ones(8, 8), torch.full((16, 16), torch.nan)
    load_tile[(1,)](TensorDescriptor(x, [5, 8], [8, 1], [16, 16]), out, 16)
    assert out.sum() == 40 and not out.isnan().any()


def test_a_descriptor_larger_than_its_tensor_is_caught() -> None:
    x, out = torch.ones(8, 8), torch.zeros(16, 16)
    with pytest.raises(InterpreterError, match="out-of-bounds load"):
        load_tile[(1,)](TensorDescriptor(x, [9, 8], [8, 1], [16, 16]), out, 16)


# Integers


@triton.jit
def last_row(x, out, rows, stride, WIDE: tl.constexpr):
    row = rows - 1
    if WIDE:
        row = row.to(tl.int64)
    tl.store(out, tl.load(x + row * stride))


@triton.jit
def last_row_by_loop(x, out, rows, stride, WIDE: tl.constexpr):
    value = 0.0
    for row in range(0, rows):
        index = row.to(tl.int64) if WIDE else row
        value = tl.load(x + index * stride)
    tl.store(out, value)


@pytest.mark.parametrize("kernel", [last_row, last_row_by_loop], ids=["scalar", "loop variable"])
def test_int32_overflow_of_an_offset_is_caught(kernel: Any) -> None:
    """Three rows, 2^30 elements apart; only the pages in use take memory."""
    x, out = torch.empty(2 * 2**30 + 1, dtype=torch.float16)[:: 2**30], torch.zeros(1, dtype=torch.float16)
    x.copy_(torch.tensor([1.0, 2.0, 3.0]))
    with pytest.raises(InterpreterError, match="int32 overflow in mul"):
        kernel[(1,)](x, out, 3, 2**30, False)
    kernel[(1,)](x, out, 3, 2**30, True)
    assert out == 3


# Programs


@triton.jit
def add_to_previous(out):
    program = tl.program_id(0)
    previous = tl.load(out + program - 1, mask=program > 0, other=0.0)
    tl.store(out + program, previous + 1)


@triton.jit
def own_number(out):
    program = tl.program_id(0) + tl.num_programs(0) * tl.program_id(1)
    tl.store(out + program, program.to(tl.float32))


def test_dependence_on_program_order_is_caught() -> None:
    from .triton_interpreter import set_program_order

    def run(seed: int) -> Tensor:
        set_program_order(seed)
        out = torch.zeros(32)
        add_to_previous[(32,)](out)
        return out

    ascending = torch.arange(1.0, 33)
    assert not torch.equal(run(0), ascending) and not torch.equal(run(0), run(1)), "a race must show"
    assert torch.equal(run(0), run(0)), "the same seed must repeat it"
    out = torch.full((15,), torch.nan)
    own_number[(5, 3)](out)
    assert torch.equal(out, torch.arange(15.0)), "every program runs once"


def test_what_was_patched_comes_back() -> None:
    """Without the patches Triton's own faults are there again: casts that truncate, programs in ascending order."""
    from .triton_interpreter import install, uninstall

    def run() -> tuple[Tensor, Tensor]:
        rounded, chain = torch.zeros(1, dtype=torch.bfloat16), torch.zeros(32)
        to_bf16[(1,)](torch.tensor([1.999]), rounded, 1, None)
        add_to_previous[(32,)](chain)
        return rounded, chain

    uninstall()
    try:
        rounded, chain = run()
        assert rounded < 2 and torch.equal(chain, torch.arange(1.0, 33))
    finally:
        install()
    rounded, chain = run()
    assert rounded == 2 and not torch.equal(chain, torch.arange(1.0, 33))

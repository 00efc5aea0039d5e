"""The Triton backend against float64: exact on integers, else within twice PyTorch's own error; every result of it.

The kernels of experts too, against the products that PyTorch's own operations make.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from reslora_kernels import ResLoRAConfig, ResLoRALinear, link
from reslora_kernels import dropout as masks
from reslora_kernels.backends import select, triton
from reslora_kernels.backends import torch as plain
from reslora_kernels.cli.doctor import check_case
from reslora_kernels.dropout import Dropout
from reslora_kernels.ops import lora_linear
from reslora_kernels.ops.grouped import Groups, add_low_rank, fused_experts
from reslora_kernels.side_channel import Needs, SideChannel
from reslora_kernels.testing import GoldenCase, assert_close_to_truth, golden_cases
from reslora_kernels.tuning import gpus, launch

from .calls import SEED, Call, draw, run, truth

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CALLS = [
    Call("one token, as in generation", 1, 257, 100, 16, 8, BF16, FP32, "one_pass", hand=(8, 16), residual=True),
    Call("everything one", 3, 1, 1, 1, 1, BF16, form="one_pass"),
    Call("rank over a block, several tiles", 100, 100, 257, 34, 17, BF16, BF16, hand=(17, 34), residual=True, c=2.0),
    Call("the same in one pass", 100, 100, 257, 34, 17, BF16, BF16, "one_pass", hand=(17, 34), residual=True, c=2.0),
    Call("dropout, columns not a multiple of 8", 70, 100, 72, 8, 8, FP32, FP32, p=0.5, hand=(0, 8)),
    Call("dropout in every pass, sliced", 40, 257, 64, 24, 8, BF16, FP32, p=0.5, residual=True, layout="sliced"),
    Call("most dropped", 17, 24, 64, 3, 3, FP16, FP16, p=0.9, bias=False),
    Call("rank above width", 17, 8, 24, 64, 64, BF16, BF16, hand=(0, 64), form="one_pass"),
    Call("stack beyond a block of ranks", 20, 40, 48, 255, 255, FP16, FP32),
    Call("more rank than one product holds", 20, 24, 40, 300, 300, FP32, FP32, p=0.5),
    Call("column-major operands", 33, 72, 40, 16, 16, BF16, FP32, layout="transposed", residual=True),
    Call("transposed weight", 33, 72, 40, 16, 16, FP32, FP32, layout="transposed weight", hand=(0, 16)),
    Call("few rows, long reduction: K in parts", 3, 520, 40, 80, 80, BF16, FP32, p=0.5),
    Call("Hopper's tiles", 300, 130, 520, 32, 16, BF16, BF16, generation="sm_90", hand=(16, 32), residual=True),
    Call("Hopper's tiles with dropout", 140, 520, 130, 16, 16, BF16, FP32, generation="sm_90", p=0.1),
    Call("Hopper's tiles, one pass", 300, 136, 264, 16, 16, FP16, FP16, "one_pass", "sm_90", scaling=0.5),
    Call("Ampere's tiles", 140, 128, 264, 16, 16, FP32, FP32, generation="sm_80"),
    Call("tiles of a small GPU", 70, 128, 72, 16, 16, BF16, BF16, generation="default", p=0.1),
    Call("dy read twice", 100, 100, 257, 34, 17, BF16, FP32, hand=(17, 34), residual=True, c=2.0, reads_of_dy=2),
    Call("the same with dropout", 70, 100, 72, 24, 8, FP32, BF16, p=0.5, hand=(8, 24), residual=True, reads_of_dy=2),
    Call("the same on Hopper", 300, 264, 136, 64, 64, BF16, BF16, generation="sm_90", reads_of_dy=2, residual=True),
    Call("the same on Ampere", 40, 72, 136, 130, 130, BF16, FP32, generation="sm_80", p=0.1, reads_of_dy=2),
    Call("the library's matmul on the product", 40, 72, 100, 24, 8, BF16, FP32, "library", hand=(8, 24), residual=True),
    Call("AMD's tiles", 140, 72, 136, 16, 16, BF16, BF16, "one_pass", "gfx942", hand=(0, 16)),
    Call("u is given, nothing to project", 70, 100, 136, 0, 12, residual=True),
]
EXACT = [call for call in CALLS if call.p in (0.0, 0.5)]  # 1 / (1 - p) is a power of two


def name_of(value: object) -> str | None:
    return value.why if isinstance(value, Call) else None


@pytest.mark.parametrize("call", EXACT, ids=name_of)
def test_integers_come_out_bit_for_bit(call: Call, device: torch.device, poisoned: None) -> None:
    values = draw(call, device, integers=True)
    expected, plain = truth(call, values), run(call, values)
    for name, result in run(call, values, triton).items():
        assert result.dtype == plain[name].dtype
        assert torch.equal(result, expected[name].to(result.dtype)), name


@pytest.mark.parametrize("call", CALLS, ids=name_of)
@pytest.mark.slow
def test_error_at_most_twice_plain_pytorchs(call: Call, device: torch.device, poisoned: None) -> None:
    values = draw(call, device, integers=False)
    expected, plain = truth(call, values), run(call, values)
    for name, result in run(call, values, triton).items():
        assert_close_to_truth(result, expected[name], plain[name], name)


@pytest.mark.parametrize(
    ("form", "rank", "p", "ahead"),
    [
        ("two_pass", 16, 0.0, True),
        ("two_pass", 9, 0.5, True),
        ("two_pass", 40, 0.0, False),
        ("one_pass", 16, 0.0, False),
    ],
)
def test_programs_with_several_tiles(
    form: str, rank: int, p: float, ahead: bool, device: torch.device, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of three processors has some of the tiles, as of a large layer; few ranks are loaded a tile ahead."""
    monkeypatch.setitem(gpus.GENERATIONS, "sm_90", replace(gpus.GENERATIONS["sm_90"], processors=3))
    call = Call("", 520, 136, 776, rank, rank, BF16, BF16, form, "sm_90", p=p, residual=True)
    values = draw(call, device, integers=True)
    expected = truth(call, values)
    with launch.recording() as launches:
        results = run(call, values, triton)
    for name, result in results.items():
        assert torch.equal(result, expected[name].to(result.dtype)), name
    forward = next(entry for entry in launches if entry.name == "augmented_matmul")
    assert (forward.grid, forward.arguments["AHEAD"]) == ((3,), ahead)


@pytest.mark.parametrize("call", [CALLS[2], CALLS[5], CALLS[12]], ids=name_of)
@pytest.mark.slow
def test_same_bits_in_any_order_of_programs(call: Call, device: torch.device, interpreted: bool) -> None:
    values = draw(call, device, integers=False)
    first = run(call, values, triton)
    for attempt in range(3 if interpreted else 250):
        if interpreted:
            from ..triton_interpreter import set_program_order

            set_program_order(attempt)
        again = run(call, values, triton)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(("rows", "columns", "p"), [(9, 1030, 0.1), (3, 5, 0.5), (0, 8, 0.5)])
def test_the_mask_by_itself_is_every_backends(rows: int, columns: int, p: float, device: torch.device) -> None:
    from reslora_kernels.kernels.device import keep_mask

    seed = torch.tensor(SEED, device=device)
    assert torch.equal(keep_mask(seed, rows, columns, p), masks.keep_mask(seed, rows, columns, p))


def test_library_calls_take_their_mask_from_one_kernel(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Call("", 9, 72, 40, 8, 8, FP32, FP32, p=0.5)
    values = draw(call, device, integers=True)
    monkeypatch.setattr(plain, "_kernel_draws", lambda seed: False)
    expected = run(call, values)
    monkeypatch.setattr(plain, "_kernel_draws", lambda seed: True)
    with launch.recording() as launches:
        results = run(call, values)
    assert [entry.name for entry in launches] == ["keep_mask", "keep_mask"]  # in forward and in backward
    for name, result in results.items():
        assert torch.equal(result, expected[name]), name


@pytest.mark.parametrize("form", ["one_pass", "two_pass"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_what_is_not_finite_comes_out_in_its_row_only(value: float, form: str, device: torch.device) -> None:
    call = Call("", 40, 100, 72, 24, 8, BF16, FP32, form, hand=(8, 24), residual=True)
    values = draw(call, device, integers=False)
    values["x"][7, 99] = values["dy"][5, 71] = value
    results = run(call, values, triton)
    for name, row in (("y", 7), ("u", 7), ("handed", 7), ("dx", 5), ("dresidual", 5)):
        broken = ~results[name].isfinite().all(1)
        assert broken.nonzero().flatten().tolist() == [row], name


def test_large_float16_stays_finite(device: torch.device) -> None:
    """s u is beyond float16 where y is not: the factor belongs to the float32 accumulator."""
    call = Call("", 20, 16, 16, 8, 8, FP16, FP32, "one_pass", scaling=64.0, bias=False)
    values = draw(call, device, integers=False)
    values["x"].fill_(4000.0)
    values["a_cat"].fill_(0.25)
    values["b_cat"].fill_(1e-3)
    values["weight"].zero_()
    result = run(call, values, triton)["y"]
    assert torch.equal(result, truth(call, values)["y"].to(FP16))


@pytest.mark.parametrize("wanted", ["dx", "da_cat", "db_cat", "dresidual"])
def test_only_what_is_asked_for(wanted: str, device: torch.device, poisoned: None) -> None:
    call = Call("", 40, 72, 100, 24, 8, FP32, FP32, p=0.5, hand=(8, 24), residual=True)
    values = draw(call, device, integers=True)
    everything = run(call, values, triton)
    names = ("dx", "da_cat", "db_cat", "dresidual")
    gradients = triton.backward(
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
    assert select.choose("triton", values["x"], values["weight"], 4) is plain


@pytest.mark.parametrize("case", golden_cases(), ids=lambda case: case.name)
def test_golden_vectors(case: GoldenCase) -> None:
    check = check_case(case, "triton")
    assert check.dtype == "float32"
    assert check.failure is None


@pytest.mark.parametrize(("shortcut", "pre_num"), [("none", 0), ("input", 1), ("block", 2), ("middle", -1)])
def test_layers_with_dropout_draw_the_masks_of_the_torch_backend(
    shortcut: str, pre_num: int, device: torch.device
) -> None:
    """Through autograd, three layers deep, 3-dimensional input."""
    results = {}
    for name, backend, dtype in (
        ("truth", "torch", torch.float64), ("plain", "torch", FP32), ("triton", "triton", FP32)
    ):  # fmt: skip
        torch.manual_seed(3)
        config = ResLoRAConfig(r=4, shortcut=shortcut, pre_num=pre_num, lora_dropout=0.25, backend=backend)
        layers = [ResLoRALinear(24, 24, device=device, dtype=FP32, config=config).to(dtype) for _ in range(3)]
        for layer in layers:
            torch.nn.init.normal_(layer.lora_B)
        stack = torch.nn.Sequential(*layers)
        link(layers, root=stack)
        x = torch.randn(2, 9, 24, device=device).to(dtype).requires_grad_()
        torch.manual_seed(4)
        y = stack(x)
        y.square().mean().backward()
        adapters = {f"{n}.{part}": getattr(layers[n], part).grad for n in range(3) for part in ("lora_A", "lora_B")}
        results[name] = {"y": y.detach(), "dx": x.grad, **adapters}
    for name, result in results["triton"].items():
        assert_close_to_truth(result, results["truth"][name], results["plain"][name], name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8, dtype=torch.float64), "weight": torch.zeros(4, 8, dtype=torch.float64)}, "x must be"),
        ({"a_stack": [torch.zeros(1025, 8)], "b_stack": [torch.zeros(4, 1025)]}, "a_stack's total rank must be"),
        ({"x": torch.zeros(2, 8, device="meta")}, "weight must be on x's device"),
    ],
    ids=["float64", "rank beyond the limit", "another device"],
)
def test_bad_input_is_refused_before_any_launch(change: dict, message: str, device: torch.device) -> None:
    arguments = {
        "x": torch.zeros(2, 8), "weight": torch.zeros(4, 8), "bias": None,
        "a_stack": [torch.zeros(2, 8)], "b_stack": [torch.zeros(4, 2)],
    }  # fmt: skip
    with launch.recording() as launches, pytest.raises(ValueError, match=message):
        lora_linear(**(arguments | change), scaling=1.0, backend="triton")
    assert launches == []


def test_the_op_passes_opcheck(device: torch.device) -> None:
    call = Call("", 5, 24, 16, 6, 3, FP32, FP32, p=0.5, hand=(3, 6), residual=True, layout="sliced")
    v, seed = draw(call, device, integers=False), torch.tensor(1, device=device)
    for values in (v, {**v, "x": v["x"][:0], "residual": v["residual"][:0]}):
        torch.library.opcheck(
            torch.ops.reslora_kernels.lora_linear_forward.default,
            (values["x"], v["weight"], v["bias"], v["a_cat"], v["b_cat"], values["residual"], seed,
             1.0, 2.0, 0.5, 3, 6, "triton"),
        )  # fmt: skip


EXPERTS = {  # experts, their rows, K, N, R, dtype
    "odd sizes, an expert without rows, rows of three tiles": ((130, 0, 5), 40, 72, 3, torch.float32),
    "one row": ((0, 1, 0, 0), 32, 16, 16, torch.float32),
    "half precision": ((7, 9, 64), 64, 64, 8, torch.bfloat16),
    "rank of two blocks": ((5, 6), 16, 24, 80, torch.float32),
    "no rows": ((0, 0), 16, 16, 4, torch.float32),
}


def results(compute: Callable[..., Tensor], given: list[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
    inputs = [t.detach().clone().requires_grad_() for t in given]
    y = compute(*inputs)
    return (y.detach(), *torch.autograd.grad(y, inputs, dy.to(y.dtype)))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("order", ["sorted", "shuffled"])
@pytest.mark.parametrize("layout", ["as it comes", "transposed"])
@pytest.mark.parametrize("case", EXPERTS)
def test_products_and_gradients_of_experts(case: str, layout: str, order: str, device: torch.device) -> None:
    counts, k, n, r, dtype = EXPERTS[case]
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    count = len(counts)
    experts = torch.repeat_interleave(torch.arange(count), torch.tensor(counts))
    if order == "shuffled":
        experts = experts[torch.randperm(len(experts), generator=generator)]
    groups = Groups.of(experts.to(device), count)
    groups = groups if order == "shuffled" else Groups(groups.offsets)
    x, a, b, dy = random(len(experts), k), random(count, r, k), random(count, n, r), random(len(experts), n)
    weight = random(count, n, k) if layout == "as it comes" else random(count, k, n).mT

    def dense(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        low = torch.einsum("snr,srk,sk->sn", b[experts], a[experts], x)
        return torch.einsum("snk,sk->sn", weight.to(x.dtype)[experts], x) + 0.5 * low

    def plain(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        at = experts.to(device)
        y = torch.einsum("snk,sk->sn", weight.to(device, dtype)[at], x)
        return add_low_rank(y.contiguous(), x, a, b, Groups.of(at, count), 0.5)

    def fused(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return fused_experts(x, weight.to(device, dtype), a, b, groups, 0.5)

    given = [t.to(device, dtype) for t in (x, a, b)]
    truth = results(dense, [t.cpu().double() for t in given], dy.to(dtype).double())
    mine, theirs = (results(compute, given, dy.to(device, dtype)) for compute in (fused, plain))
    for name, got, true, rounded in zip(("y", "dx", "da", "db"), mine, truth, theirs, strict=True):
        assert_close_to_truth(got.cpu(), true, rounded.cpu(), name)
    again = results(fused, given, dy.to(device, dtype))
    assert all(torch.equal(first, second) for first, second in zip(mine, again, strict=True))


@pytest.mark.parametrize("how", ["batched_mm", "grouped_mm"])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts_in_a_model(kind: str, how: str) -> None:
    pytest.importorskip("transformers", minversion="5.0")
    from tests.test_experts import adapted, loss_and_gradients, model_of

    def run(**settings: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return loss_and_gradients(adapted(model_of(kind, how), "block", **settings))

    logits, gradients = run(backend="triton")
    expected, expected_gradients = run(backend="torch")
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-3, atol=1e-5)

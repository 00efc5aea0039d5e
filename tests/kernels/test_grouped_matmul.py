"""The Triton kernels of experts against the products that PyTorch's own operations make, and within a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from reslora_kernels.ops.grouped import Groups, add_low_rank, fused_experts
from reslora_kernels.testing import assert_close_to_truth

CASES = {  # experts, their rows, K, N, R, dtype
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
@pytest.mark.parametrize("case", CASES)
def test_products_and_gradients(case: str, layout: str, order: str, device: torch.device) -> None:
    counts, k, n, r, dtype = CASES[case]
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
def test_in_a_model(kind: str, how: str) -> None:
    pytest.importorskip("transformers", minversion="5.0")
    from tests.test_experts import adapted, loss_and_gradients, model_of

    def run(**settings: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return loss_and_gradients(adapted(model_of(kind, how), "block", **settings))

    logits, gradients = run(backend="triton")
    expected, expected_gradients = run(backend="torch")
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-3, atol=1e-5)

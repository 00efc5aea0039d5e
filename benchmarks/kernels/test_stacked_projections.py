"""Forward and backward of q, k and v under pytest-benchmark: one projection for the three, against one for each.

Each round runs frozen, apart and stacked one right after the other; ratios are medians over the rounds' ratios.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from reslora_kernels import ResLoRAConfig, apply_reslora
from reslora_kernels.adapt.record import record_of
from reslora_kernels.bench.clocks import clock_of
from reslora_kernels.bench.timing import relative

ROUNDS, WARMUP = 25, 3
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
M, K, N, R = (8192, 4096, 4096, 16) if DEVICE.type == "cuda" else (1024, 1024, 1024, 16)
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(K, N, bias=False, device=DEVICE, dtype=DTYPE) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q(x), self.k(x), self.v(x)


def built(stacked: bool) -> nn.Module:
    config = ResLoRAConfig(r=R, shortcut="none", stack_projections=stacked)
    model = apply_reslora(Attention(), config, example_inputs=torch.zeros(2, K, device=DEVICE, dtype=DTYPE))
    assert bool(record_of(model).groups) is stacked
    return model


def step(model: nn.Module, x: Tensor, dy: Tensor) -> None:
    outputs = model(x)
    torch.autograd.backward(outputs, [dy] * 3)
    x.grad = None
    clock_of(DEVICE).drain()


def test_three_projections_of_one_input(benchmark: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(M, K, device=DEVICE, dtype=DTYPE, requires_grad=True)
    dy = torch.randn(M, N, device=DEVICE, dtype=DTYPE)
    frozen, apart, stacked = Attention().requires_grad_(False), built(False), built(True)
    apart.load_state_dict(stacked.state_dict())
    for own, other in zip(stacked(x), apart(x), strict=True):
        torch.testing.assert_close(own, other)
    seconds: dict[str, list[float]] = {"frozen": [], "apart": []}

    def run_others() -> None:
        for name, model in (("frozen", frozen), ("apart", apart)):
            start = time.perf_counter()
            step(model, x, dy)
            seconds[name].append(time.perf_counter() - start)

    benchmark.pedantic(step, args=(stacked, x, dy), setup=run_others, rounds=ROUNDS, warmup_rounds=WARMUP, iterations=1)
    own = benchmark.stats.stats.data
    benchmark.extra_info.update(
        shape=f"3 x {K} -> {N}, M = {M}, r = {R}, {DTYPE}",
        stacked_times_frozen=relative(own, seconds["frozen"][-ROUNDS:]).median,
        apart_times_frozen=relative(seconds["apart"], seconds["frozen"]).median,
        speedup_over_apart=relative(seconds["apart"][-ROUNDS:], own).median,
    )

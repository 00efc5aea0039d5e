"""Forward and backward through layers on this machine under pytest-benchmark: frozen, plain ResLoRA, PEFT, ours.

The providers are those of ``reslora bench``, which measures more; this entry is for pytest-benchmark's own tools. Each
round runs the competitors right before the provider that is timed, so every ratio is of one run: the median over the
rounds, kept in ``extra_info``. Nothing is timed before its outputs and gradients agree with the reference in float64.
Of q, k and v, which read one input, one projection for the three is timed against one for each.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reslora_kernels import ResLoRAConfig, apply_reslora
from reslora_kernels.adapt.record import record_of
from reslora_kernels.bench.cases import LORA, Case, Method
from reslora_kernels.bench.providers import PROVIDERS
from reslora_kernels.bench.suite import Judge
from reslora_kernels.bench.timing import clock_of, percentiles, relative
from reslora_kernels.bench.workload import Pass, draw

ROUNDS, WARMUP = 15, 2
METHODS = [LORA, Method("input", 1), Method("middle", 1), Method("middle", -1), Method("block", 1), Method("block", 3)]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASE = Case(8192, 4096, 4096) if torch.cuda.is_available() else Case(2048, 1024, 1024, dtype="float32")
COMPETITORS = ("frozen", "plain", "peft")


def wait() -> None:
    """Until the device is done; a round is timed from rest to rest."""
    clock_of(DEVICE).drain()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.shortcut}-{method.pre_num}")
def test_forward_and_backward(method: Method, benchmark: Any) -> None:
    workload = draw(CASE, DEVICE)
    judge, passes = Judge(workload), {}
    for name in ("ours-torch" if DEVICE.type == "cpu" else "ours", *COMPETITORS):
        provider = PROVIDERS[name]
        served = LORA if provider.lora_only else method
        assert (verdict := judge.check(provider, served)).refusal is None, verdict
        passes[name] = Pass(provider.build(workload, served), workload)
    subject, *others = passes.values()
    seconds: dict[str, list[float]] = {name: [] for name in COMPETITORS}

    def step(one: Pass) -> None:
        one.backward(one.forward())
        wait()

    def run_competitors() -> None:
        for name, other in zip(COMPETITORS, others, strict=True):
            wait()
            start = time.perf_counter()
            step(other)
            seconds[name].append(time.perf_counter() - start)

    benchmark.pedantic(step, args=(subject,), setup=run_competitors, rounds=ROUNDS, warmup_rounds=WARMUP, iterations=1)
    own = benchmark.stats.stats.data
    low, _, high = percentiles(own)
    benchmark.extra_info.update(
        shortcut=method.shortcut,
        pre_num=method.pre_num,
        shape=f"{CASE.layers} x {CASE.k} -> {CASE.n}, M = {CASE.m}, r = {CASE.r}, {CASE.dtype}",
        seconds_20=low,
        seconds_80=high,
        times_frozen=relative(own, seconds["frozen"][-ROUNDS:]).median,
        speedup_over_plain=relative(seconds["plain"][-ROUNDS:], own).median,
        speedup_over_peft=relative(seconds["peft"][-ROUNDS:], own).median,
    )


QKV_ROUNDS, QKV_WARMUP = 25, 3

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

    benchmark.pedantic(
        step, args=(stacked, x, dy), setup=run_others, rounds=QKV_ROUNDS, warmup_rounds=QKV_WARMUP, iterations=1
    )
    own = benchmark.stats.stats.data
    benchmark.extra_info.update(
        shape=f"3 x {K} -> {N}, M = {M}, r = {R}, {DTYPE}",
        stacked_times_frozen=relative(own, seconds["frozen"][-QKV_ROUNDS:]).median,
        apart_times_frozen=relative(seconds["apart"], seconds["frozen"]).median,
        speedup_over_apart=relative(seconds["apart"][-QKV_ROUNDS:], own).median,
    )

"""Forward and backward through four linears on this machine under pytest-benchmark: frozen, plain ResLoRA, PEFT, ours.

The providers are those of ``reslora bench``, which measures more; this entry is for pytest-benchmark's own tools. Each
round runs the competitors right before the provider that is timed, so every ratio is of one run: the median over the
rounds, kept in ``extra_info``. Nothing is timed before its outputs and gradients agree with the reference in float64.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from reslora_kernels.bench.accuracy import Judge
from reslora_kernels.bench.capture import Pass
from reslora_kernels.bench.cases import LORA, Case, Method
from reslora_kernels.bench.clocks import clock_of
from reslora_kernels.bench.providers import PROVIDERS
from reslora_kernels.bench.timing import percentiles, relative
from reslora_kernels.bench.workload import draw

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

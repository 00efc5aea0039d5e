"""Forward and backward through four linears on this machine: frozen, plain ResLoRA, PEFT LoRA, ours.

Each round runs the competitors right before the provider that is timed, so every ratio is of one run: the median over
the rounds, kept in ``extra_info``. Nothing is timed before its outputs and gradients agree with the plain layers'.
"""

from __future__ import annotations

import time
from statistics import median, quantiles
from typing import Any

import pytest
import torch

from benchmarks.kernels.providers import Case, Provider, frozen, ours, peft, plain, step
from reslora_kernels.testing import relative_error

ROUNDS, WARMUP = 15, 2
CASES = [Case("none", 0), Case("input", 1), Case("middle", 1), Case("middle", -1), Case("block", 1), Case("block", 3)]


def refuse_wrong(provider: Provider, case: Case, x: torch.Tensor, dy: torch.Tensor) -> None:
    """A provider that does not compute what the plain layers compute is not timed."""
    truth = Case(case.shortcut, case.pre_num, case.m, case.k, case.r, case.layers, torch.float64)
    exact = step(plain(truth), x.double(), dy.double())
    for got, expected in zip(step(provider, x, dy), exact, strict=True):
        assert relative_error(got, expected) < 1e-5, f"{provider.name} is wrong for {case}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.shortcut}-{case.pre_num}")
def test_forward_and_backward(case: Case, benchmark: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    x, dy = torch.randn(case.m, case.k, generator=generator), torch.randn(case.m, case.k, generator=generator)
    subject, competitors = ours(case), [frozen(case), plain(case), peft(case)]
    refuse_wrong(subject, case, x, dy)
    if case.shortcut == "none":
        refuse_wrong(competitors[-1], case, x, dy)
    seconds: dict[str, list[float]] = {competitor.name: [] for competitor in competitors}

    def run_competitors() -> None:
        for competitor in competitors:
            start = time.perf_counter()
            step(competitor, x, dy)
            seconds[competitor.name].append(time.perf_counter() - start)

    benchmark.pedantic(
        step, args=(subject, x, dy), setup=run_competitors, rounds=ROUNDS, warmup_rounds=WARMUP, iterations=1
    )
    own = benchmark.stats.stats.data
    fifths = quantiles(own, n=5)
    benchmark.extra_info.update(
        shortcut=case.shortcut,
        pre_num=case.pre_num,
        shape=f"{case.layers} x {case.k} -> {case.k}, M = {case.m}, r = {case.r}, {case.dtype}".replace("torch.", ""),
        seconds_20=fifths[0],
        seconds_80=fifths[-1],
        times_frozen=median(t / f for t, f in zip(own, seconds["frozen"][-ROUNDS:], strict=True)),
        speedup_over_plain=median(p / t for t, p in zip(own, seconds["plain"][-ROUNDS:], strict=True)),
        speedup_over_peft=median(p / t for t, p in zip(own, seconds["peft"][-ROUNDS:], strict=True)),
    )

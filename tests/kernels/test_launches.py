"""What a call costs, counted without a GPU: launches, bytes moved, memory kept for backward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.bytes_moved import cuda_traffic, floors, split, traffic
from benchmarks.shipped_launches import STANDARD, Call, record
from reslora_kernels.backends import hopper, triton
from reslora_kernels.side_channel import SideChannel
from reslora_kernels.tuning import gpus, launch
from reslora_kernels.tuning.forms import assume

HOPPER = gpus.GENERATIONS["sm_90"]


@pytest.mark.parametrize("form", ["one_pass", "two_pass"])
@pytest.mark.parametrize(
    "call", [STANDARD[0], Call(16, 4096, 4096), Call(512, 768, 768), Call(8192, 4096, 1024, 64)], ids=str
)
def test_launches(call: Call, form: str) -> None:
    forward, backward = split(record(call, HOPPER, (form, "two_pass")))
    parts = sum(entry.name == "finish_projection" for entry in forward)  # few rows: K in parts, added up at the end
    assert len(forward) == (1 if form == "one_pass" else 2 + parts)
    assert not (parts and call.m == 8192)
    passes = ["pass_over_dy", "pass_over_x"] if call.rank <= 32 else ["project", "outer_products"]
    assert [entry.name for entry in backward] == [*passes, "augmented_matmul"]


@pytest.mark.parametrize(("rank", "p"), [(8, 0.0), (16, 0.1), (64, 0.0)])
@pytest.mark.parametrize("call", STANDARD, ids=str)
def test_bytes_moved(call: Call, rank: int, p: float) -> None:
    """Against what any implementation must move, and the one operand that each direction reads again."""
    forward, backward = traffic(replace(call, rank=rank, p=p), HOPPER)
    assert forward.overhead <= 0.10
    assert backward.overhead <= 0.15


@pytest.mark.parametrize("rank", [8, 16])
@pytest.mark.parametrize("call", STANDARD, ids=str)
def test_one_pass_moves_what_must_be_moved(call: Call, rank: int) -> None:
    """Forward is one launch: one read of x and W, one write of y. Backward reads dy once more, for dB."""
    call = replace(call, rank=rank)
    for setting in hopper.ONE_PASS_VARIANTS:
        forward, backward = cuda_traffic(call, setting)
        assert (forward.launches, backward.launches) == (1, 3)
        assert 0 <= forward.overhead <= 0.03 and 0 <= backward.overhead <= 0.04
    launches, _ = split(record(call, HOPPER, ("one_pass", "two_pass")))
    assert len(launches) == 1 and launches[0].bytes_moved() <= 1.03 * floors(call)[0]


def test_nothing_the_size_of_x_is_allocated_between_the_passes() -> None:
    """Workspaces stay below a tenth of x, the mask's packed bits included."""
    call = Call(8192, 4096, 4096, 16, p=0.1, hand=8)
    forward, _ = split(record(call, HOPPER, ("two_pass",)))
    project = forward[0]
    sizes = {name: t.numel() for name, t in project.arguments.items() if isinstance(t, torch.Tensor)}
    assert max(size for name, size in sizes.items() if name != "x") <= call.m * call.rank
    bits = record(call, HOPPER, ("two_pass",))[-1].arguments["bits"]
    assert bits.numel() * bits.element_size() == call.m * call.k // 8


def test_recording_runs_nothing_when_told_so(device: torch.device) -> None:
    x, weight = torch.ones(16, 32, device=device), torch.ones(8, 32, device=device)
    a, b = torch.ones(4, 32, device=device), torch.ones(8, 4, device=device)
    arguments = (x, weight, None, (a,), (b,), None, SideChannel(), None)
    forms = ("two_pass",)
    with assume(gpus.gpu_of(device), forms), launch.recording() as executed:
        y, _, u = triton.forward(*arguments)
    assert y.unique().tolist() == [32 + 4 * 32]
    assert u.unique().tolist() == [32]
    with assume(gpus.gpu_of(device), forms), launch.recording(execute=False) as planned:
        triton.forward(*arguments)
    assert [entry.name for entry in planned] == [entry.name for entry in executed] == ["project", "augmented_matmul"]
    assert "BLOCK_M=" in str(planned[1])

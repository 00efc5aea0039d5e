"""What only a GPU can show: addresses beyond 2^31, captured graphs, streams, devices, no wait for the device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from reslora_kernels.backends import torch as library
from reslora_kernels.backends import triton
from reslora_kernels.dropout import new_seed
from reslora_kernels.ops import lora_linear
from reslora_kernels.side_channel import Needs, SideChannel

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16


def operands(m: int, k: int, n: int, r: int, device: str = "cuda") -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=BF16)

    a, b = draw(r, k).float() * k**-0.5, draw(n, r).float() * r**-0.5
    return {"x": draw(m, k), "weight": draw(n, k) * k**-0.5, "a": a.requires_grad_(), "b": b.requires_grad_()}


def step(v: dict[str, Tensor], p: float = 0.0, seed: Tensor | None = None) -> tuple[Tensor, ...]:
    """y and every gradient of one forward and backward pass."""
    x, a, b = (v[name].detach().requires_grad_() for name in ("x", "a", "b"))
    y, _ = lora_linear(x, v["weight"], None, [a], [b], scaling=2.0, p=p, seed=seed, backend="triton")
    return y.detach(), *torch.autograd.grad(y, (x, a, b), torch.ones_like(y))


def test_addresses_beyond_two_to_the_31() -> None:
    """y and dx have 2.4e9 elements. Every row holds one of 64 rows of x, so 64 rows are the whole truth."""
    m, width, distinct = 300_032, 8192, 64
    v = operands(distinct, 128, width, 16)
    truth, _, u = library.forward(v["x"], v["weight"], None, (v["a"],), (v["b"],), None, SideChannel(1.0, 2.0), None)
    x = v["x"].repeat(m // distinct, 1)
    y, _, _ = triton.forward(x, v["weight"], None, (v["a"],), (v["b"],), None, SideChannel(1.0, 2.0), None)
    assert y.numel() > 2**31
    for start in (0, m // 2 // distinct * distinct, m - distinct):
        torch.testing.assert_close(y[start : start + distinct], truth, rtol=0.02, atol=0.05)
    dx, *_ = triton.backward(
        x, None, y, v["weight"].T.contiguous(), (v["b"].T.contiguous(),), (v["a"].T.contiguous(),), u,
        SideChannel(1.0, 2.0), None, Needs(da=False, db=False),
    )  # fmt: skip
    torch.testing.assert_close(dx[-distinct:], dx[:distinct], rtol=0, atol=0)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_captured_graph_replays(p: float) -> None:
    """With dropout each replay draws another mask: the seed is a tensor that the graph draws anew."""
    v = operands(512, 1024, 768, 16)

    def once() -> tuple[Tensor, ...]:
        return step(v, p, new_seed(torch.device("cuda")) if p else None)

    eager = once()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            once()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = once()
    replays = []
    for _ in range(3):
        graph.replay()
        replays.append([t.clone() for t in captured])
    same = [torch.equal(one, other) for one, other in zip(replays[0], replays[1], strict=True)]
    if p:
        assert not any(same)
    else:
        assert all(same)
        assert all(torch.equal(one, other) for one, other in zip(eager, replays[2], strict=True))


def test_two_streams_at_once() -> None:
    v = operands(2048, 1024, 1024, 16)
    expected = step(v)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = []
    for stream in streams:
        with torch.cuda.stream(stream):
            results.append([step(v) for _ in range(10)][-1])
    torch.cuda.synchronize()
    for result in results:
        assert all(torch.equal(one, other) for one, other in zip(result, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one() -> None:
    on_first, on_second = (step(operands(256, 512, 384, 16, f"cuda:{index}")) for index in (0, 1))
    assert torch.cuda.current_device() == 0
    assert all(t.device.index == 1 for t in on_second)
    assert [t.shape for t in on_first] == [t.shape for t in on_second]


def waits(call: Callable[[], object]) -> bool:
    """Whether the call waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def test_no_wait_for_the_device() -> None:
    v = operands(512, 1024, 768, 16)
    seed = new_seed(torch.device("cuda"))
    step(v, 0.1, seed)
    assert not waits(lambda: step(v, 0.1, seed))
    assert waits(lambda: seed.item())


def test_peak_memory_of_a_step() -> None:
    """Beside inputs and outputs: the saved u, and workspaces below a quarter of x."""
    v = operands(8192, 4096, 4096, 16)
    step(v)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = step(v)
    peak = torch.cuda.max_memory_allocated() - before
    outputs = sum(t.numel() * t.element_size() for t in results)
    ones = results[0].numel() * results[0].element_size()
    x_bytes = v["x"].numel() * v["x"].element_size()
    assert peak <= outputs + ones + x_bytes // 4 + (32 << 20)

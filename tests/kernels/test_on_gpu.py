"""What only a GPU can show: golden vectors and the error rule on the chip, graphs, streams, no wait for the device."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from reslora_kernels import ResLoRAConfig, ResLoRALinear, link
from reslora_kernels.backends import hopper, select, triton
from reslora_kernels.backends import torch as library
from reslora_kernels.dropout import new_seed
from reslora_kernels.ops import lora_linear
from reslora_kernels.side_channel import Needs, SideChannel
from reslora_kernels.testing import (
    GoldenCase,
    assert_close_to_truth,
    chain_inputs,
    golden_cases,
    max_error,
    reference_results,
)

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


@pytest.mark.parametrize("shortcut", ["none", "block"])
def test_blocks_become_graphs_by_make_graphed_callables(shortcut: str) -> None:
    """Shortcuts that hand nothing on: what one block hands to another is no argument of a graph."""
    config = ResLoRAConfig(r=8, shortcut=shortcut, pre_num=1)
    layers = [ResLoRALinear(64, 64, device="cuda", config=config) for _ in range(3)]
    for layer in layers:
        nn.init.normal_(layer.lora_B)
    link(layers)
    x = torch.randn(16, 64, device="cuda", requires_grad=True)

    def results(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        wanted = [x, *(layer.lora_A for layer in layers)]
        y = run(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), wanted)]

    expected = results(nn.Sequential(*layers))
    samples = tuple((torch.randn_like(x).requires_grad_(),) for _ in layers)
    graphed = torch.cuda.make_graphed_callables(tuple(layers), samples)
    for found, plain in zip(results(nn.Sequential(*graphed)), expected, strict=True):
        torch.testing.assert_close(found, plain)


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


def make_chain(
    config: ResLoRAConfig, values: dict[str, list[torch.Tensor | None]], dtype: torch.dtype
) -> nn.Sequential:
    layers = []
    for n, weight in enumerate(values["weight"]):
        layer = ResLoRALinear(weight.shape[1], weight.shape[0], True, "cuda", dtype, config=config)
        for name in ("weight", "lora_A", "lora_B"):
            getattr(layer, name).data.copy_(values[name][n])
        layer.bias.data.copy_(values["bias"][n]) if values["bias"][n] is not None else layer.bias.data.zero_()
        layers.append(layer)
    link(layers)
    return nn.Sequential(*layers)


@pytest.mark.parametrize("case", golden_cases(), ids=lambda case: case.name)
def test_golden_vectors(case: GoldenCase) -> None:
    values = {name: case.series(name) for name in ("weight", "lora_A", "lora_B")} | {"bias": case.biases()}
    chain = make_chain(case.config, values, torch.float64)
    xs = [x.cuda().requires_grad_() for x in case.series("x")]
    with chain[0].chain.forward_pass():
        ys = [layer(x) for layer, x in zip(chain, xs, strict=True)]
    torch.autograd.backward(ys, [dy.cuda() for dy in case.series("dy")])
    for n, layer in enumerate(chain):
        for name, actual in (
            ("y", ys[n]),
            ("dx", xs[n].grad),
            ("dlora_A", layer.lora_A.grad),
            ("dlora_B", layer.lora_B.grad),
        ):
            assert max_error(actual.cpu(), case.tensors[f"{name}.{n}"]) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shortcut", "pre_num"), [("none", 0), ("input", 1), ("block", 2), ("middle", -1)])
def test_error_at_most_twice_plain_pytorchs(shortcut: str, pre_num: int, dtype: torch.dtype) -> None:
    config = ResLoRAConfig(r=16, lora_alpha=16, shortcut=shortcut, pre_num=pre_num)
    drawn = chain_inputs(3, (500,), 384, 384, 16)
    rounded = {name: [t.to(dtype).double().cuda() for t in tensors] for name, tensors in drawn.items()}
    truth = reference_results(config, rounded)
    baseline = reference_results(config, rounded, dtype)
    chain = make_chain(config, rounded, dtype)
    for layer in chain:
        layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.to(dtype), layer.lora_B.data.to(dtype)
    xs = [x.to(dtype).requires_grad_() for x in rounded["x"]]
    with chain[0].chain.forward_pass():
        ys = [layer(x) for layer, x in zip(chain, xs, strict=True)]
    torch.autograd.backward(ys, [dy.to(dtype) for dy in rounded["dy"]])
    for n, layer in enumerate(chain):
        for name, actual in (
            ("y", ys[n]),
            ("dx", xs[n].grad),
            ("dlora_A", layer.lora_A.grad),
            ("dlora_B", layer.lora_B.grad),
        ):
            assert_close_to_truth(actual, truth[name][n], baseline[name][n], f"{name}.{n}")


@pytest.mark.parametrize("shortcut", ["none", "input", "block", "middle"])
def test_a_training_step_never_waits_for_the_device(shortcut: str) -> None:
    """With dropout on."""
    config = ResLoRAConfig(r=8, lora_dropout=0.1, shortcut=shortcut)
    layers = [ResLoRALinear(128, 128, device="cuda", dtype=torch.bfloat16, config=config) for _ in range(3)]
    stack = nn.Sequential(*layers)
    link(layers, root=stack)
    x = torch.randn(64, 128, device="cuda", dtype=torch.bfloat16)
    stack(x).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        stack(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Adapters in x's type: nothing is converted by a kernel of PyTorch's before ours encodes its tensor maps.
SCRIPT = """
import sys
import torch
from reslora_kernels.ops import lora_linear

backend, dtype = sys.argv[1], torch.bfloat16
x, w, a, b = (torch.randn(*size, device="cuda", dtype=dtype) for size in ((256, 512), (768, 512), (16, 512), (768, 16)))
leaves = [tensor.requires_grad_() for tensor in (x, a, b)]
y, _ = lora_linear(x, w, None, [a], [b], scaling=2.0, backend=backend)
for gradient in torch.autograd.grad(y, leaves, torch.ones_like(y)):
    assert bool(gradient.isfinite().all())
"""


@pytest.mark.parametrize("setting", ["off", "cooperative-pair", "one-pass"])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_backward_pass_is_the_first_of_its_thread(
    backend: str, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason := select.unavailable_reason(backend):
        pytest.skip(reason)
    if backend == "triton" and setting != "off":
        pytest.skip("it has no such setting")
    monkeypatch.setenv(hopper.VARIABLE, setting)
    finished = subprocess.run([sys.executable, "-c", SCRIPT, backend], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr

"""What a step of training costs, counted: calls of Python and the dispatcher, bytes kept for backward, leaks of none.

For times: ``reslora bench --set host``.
"""

from __future__ import annotations

import gc
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from reslora_kernels import ResLoRAConfig, ResLoRALinear, apply_reslora, host, link
from reslora_kernels.backends import torch as library
from reslora_kernels.side_channel import Needs, SideChannel

from .models import randomize

WIDTH, RANK = 32, 8
# Python calls of one layer's forward; operators of a fused forward and backward pass
CALLS = {"none": 34, "block": 42, "middle": 51, "input": 57}
CALLS_WITH_EXTENSION = {"none": 28, "block": 36, "middle": 44, "input": 48}
OPERATORS = {"none": (6, 8), "block": (8, 10), "middle": (7, 9), "input": (8, 10)}  # the draw of dy is among the latter


def middle_of_three(shortcut: str) -> tuple[nn.Sequential, ResLoRALinear]:
    config = ResLoRAConfig(r=RANK, shortcut=shortcut, pre_num=1)
    layers = [ResLoRALinear(WIDTH, WIDTH, config=config) for _ in range(3)]
    stack = nn.Sequential(*layers)
    link(layers, root=stack)
    return stack, layers[1]


@pytest.mark.parametrize("shortcut", CALLS)
def test_python_calls_of_a_layer(shortcut: str) -> None:
    stack, layer = middle_of_three(shortcut)
    x, called, inside = torch.randn(4, WIDTH, requires_grad=True), [], [False]
    stack(x)

    def count(frame: Any, event: str, argument: Any) -> None:
        if inside[0] and event == "call":
            called.append(frame.f_code.co_name)

    layer.register_forward_pre_hook(lambda *_: inside.__setitem__(0, True))
    layer.register_forward_hook(lambda *_: inside.__setitem__(0, False))
    sys.setprofile(count)
    try:
        stack(x)
    finally:
        sys.setprofile(None)
    most = (CALLS if host.module is None else CALLS_WITH_EXTENSION)[shortcut]
    most += 3 if torch.__version__ < "2.9" else 0  # of its own, written in Python then
    assert 0 < len(called) <= most, called


class Operators(TorchDispatchMode):
    """How many operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("shortcut", OPERATORS)
def test_operators_of_the_fused_passes(shortcut: str) -> None:
    def matrix(*shape: int) -> Tensor:
        return torch.randn(shape)

    x, w, bias, a, b = matrix(4, WIDTH), matrix(WIDTH, WIDTH), matrix(WIDTH), matrix(RANK, WIDTH), matrix(WIDTH, RANK)
    stacks = {"none": ((a,), (b,)), "block": ((a, a), (b, b)), "middle": ((a,), (b,)), "input": ((a, a), (b,))}
    hand = {"middle": (0, RANK), "input": (RANK, 2 * RANK)}.get(shortcut, (0, 0))
    residual = matrix(4, RANK) if shortcut in ("middle", "input") else None
    side = SideChannel(1.0, 2.0, *hand)
    with Operators() as forward:
        _, handed, u = library.forward(x, w, bias, *stacks[shortcut], residual, side, None)
    with Operators() as backward:
        needs = Needs(dresidual=residual is not None)
        library.backward(matrix(4, WIDTH), handed, x, w, *stacks[shortcut], u, side, None, needs)
    assert forward.count <= OPERATORS[shortcut][0] and backward.count <= OPERATORS[shortcut][1]


M, K, R, LAYERS = 256, 128, 8, 4


def saved_for_backward(shortcut: str, pre_num: int) -> tuple[int, set[tuple[int, ...]]]:
    """Values kept beside parameters, each storage once, and their shapes; one chain whose inputs are outputs before."""
    config = ResLoRAConfig(r=R, shortcut=shortcut, pre_num=pre_num)
    layers = [ResLoRALinear(K, K, config=config) for _ in range(LAYERS)]
    chain = link(layers)
    parameters = {p.data_ptr() for layer in layers for p in layer.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.randn(M, K, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), chain.forward_pass():
        y = nn.Sequential(*layers)(x)
    y.sum().backward()
    return sum(t.untyped_storage().nbytes() // 4 for t in kept.values()), {tuple(t.shape) for t in kept.values()}


@pytest.mark.parametrize(("shortcut", "pre_num"), [("input", 1), ("middle", 1), ("middle", -1), ("block", 2)])
def test_a_shortcut_keeps_rank_sized_tensors_only(shortcut: str, pre_num: int) -> None:
    plain, plain_shapes = saved_for_backward("none", 0)
    assert plain == LAYERS * M * (K + R)
    values, shapes = saved_for_backward(shortcut, pre_num)
    handed = (LAYERS - 1) * M * R
    if shortcut == "block":  # nothing is handed on; u has one [M, r] part per block used
        handed = sum(min(pre_num, n) for n in range(LAYERS)) * M * R
    assert values <= plain + handed
    assert {shape for shape in shapes if shape[-1] >= K} == {shape for shape in plain_shapes if shape[-1] >= K}


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(8, 8)}) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block["proj"](x))
        return x


def tensors() -> list[torch.Tensor]:
    """All tensors that Python can reach."""
    gc.collect()
    return [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of a deprecated object that isinstance looks at
@pytest.mark.parametrize(("shortcut", "pre_num"), [("input", 1), ("middle", -1), ("block", 2)])
def test_a_thousand_steps(shortcut: str, pre_num: int) -> None:
    of_others = tensors()  # held, so that none of them goes meanwhile
    known = {id(tensor) for tensor in of_others}
    torch.manual_seed(0)
    config = ResLoRAConfig(r=2, shortcut=shortcut, pre_num=pre_num, lora_dropout=0.1)
    model = randomize(apply_reslora(Stack(), config, example_inputs=torch.zeros(1, 8))).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    x = torch.randn(2, 8)
    counts = []
    for step in range(1, 1001):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if step in (20, 500, 1000):
            own = [tensor for tensor in tensors() if id(tensor) not in known]
            counts.append((len(own), sum(tensor.untyped_storage().nbytes() for tensor in own)))
            del own
    assert counts[1:] == counts[:-1], counts


class NoHostReads(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold: a value that Python reads, and a tensor whose size is a value."""

    REFUSED = ("_local_scalar_dense", "nonzero", "item", "masked_select", "unique", "is_nonzero", "equal", "to_sparse")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().removeprefix("aten::").partition(".")[0]
        assert name not in self.REFUSED, f"{function} reads a value of the device"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("shortcut", CALLS)
@pytest.mark.parametrize("p", [0.0, 0.1], ids=["", "dropout"])
def test_a_training_step_reads_nothing_of_the_device(shortcut: str, p: float) -> None:
    config = ResLoRAConfig(r=RANK, shortcut=shortcut, pre_num=1, lora_dropout=p)
    layers = [ResLoRALinear(WIDTH, WIDTH, config=config) for _ in range(3)]
    stack = nn.Sequential(*layers)
    link(layers, root=stack)
    trained = [parameter for parameter in stack.parameters() if parameter.requires_grad]
    with NoHostReads():
        stack(torch.randn(2, 3, WIDTH)).square().mean().backward()
        with torch.no_grad():
            torch._foreach_add_(trained, [parameter.grad for parameter in trained], alpha=-0.1)
    assert all(parameter.grad is not None for parameter in trained)
    with pytest.raises(AssertionError, match="reads a value"), NoHostReads():
        torch.ones(1).item()


@pytest.mark.parametrize("autocast", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "autocast"])
@pytest.mark.parametrize(
    "shortcut", ["block", *(pytest.param(name, marks=pytest.mark.slow) for name in CALLS if name != "block")]
)
def test_three_hundred_lengths_take_a_handful_of_graphs(shortcut: str, autocast: bool) -> None:
    torch.compiler.reset()
    stack, _ = middle_of_three(shortcut)
    graphs = CompileCounter()
    compiled = torch.compile(stack, backend=graphs, dynamic=True)
    for m in range(1, 301):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = compiled(torch.randn(m, WIDTH))
        assert y.shape == (m, WIDTH)
    assert graphs.frame_count <= 3
    torch.compiler.reset()

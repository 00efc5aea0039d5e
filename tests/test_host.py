"""What an eager call asks of Python and of PyTorch's dispatcher, counted. For times: ``reslora bench --set host``."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from reslora_kernels import ResLoRAConfig, ResLoRALinear, link
from reslora_kernels.backends import torch as library
from reslora_kernels.side_channel import Needs, SideChannel

WIDTH, RANK = 32, 8
# Python calls from one layer's forward to its operators; operators of a fused forward and backward pass
CALLS = {"none": 31, "block": 38, "middle": 47, "input": 53}
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
    x, counted, inside = torch.randn(4, WIDTH, requires_grad=True), [0], [False]
    stack(x)

    def count(frame: Any, event: str, argument: Any) -> None:
        counted[0] += inside[0] and event == "call"

    layer.register_forward_pre_hook(lambda *_: inside.__setitem__(0, True))
    layer.register_forward_hook(lambda *_: inside.__setitem__(0, False))
    sys.setprofile(count)
    try:
        stack(x)
    finally:
        sys.setprofile(None)
    assert 0 < counted[0] <= CALLS[shortcut]


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

"""What flows between layers belongs to one forward: never to the next, never to another thread, never left behind."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import Tensor, nn

from reslora_kernels import ResLoRAConfig, apply_reslora, reference
from reslora_kernels.forward_state import ForwardState
from reslora_kernels.testing import max_error

HANDING = [("input", 1), ("middle", 2), ("middle", -1)]


class Stack(nn.Module):
    """A residual stack of linears that can fail, skip a layer or change the token shape on request."""

    def __init__(self, depth: int = 4, width: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(width, width)}) for _ in range(depth))

    def forward(self, x: Tensor, fail_at: int = -1, skip: tuple[int, ...] = (), shorten_at: int = -1) -> Tensor:
        for n, block in enumerate(self.blocks):
            if n == fail_at:
                raise ArithmeticError("planted")
            if n == shorten_at:
                x = x[:, ::2]
            if n not in skip:
                x = x + torch.tanh(block["proj"](x))
        return x


def adapted(shortcut: str, pre_num: int, seed: int = 0) -> Stack:
    torch.manual_seed(seed)
    model = Stack().double()
    config = ResLoRAConfig(r=2, lora_alpha=4, shortcut=shortcut, pre_num=pre_num)
    apply_reslora(model, config, example_inputs=torch.zeros(1, 2, 8, dtype=torch.float64))
    for block in model.blocks:
        nn.init.normal_(block["proj"].lora_B)
    return model


def by_reference(model: Stack, x: Tensor, runs: list[int], shortcut: str, pre_num: int, shorten_at: int = -1) -> Tensor:
    """The same network by the reference. A layer whose predecessor did not run, or saw other tokens, starts a chain."""
    done: list[int] = []
    xs: list[Tensor] = []
    for n in runs:
        if n == shorten_at:
            x = x[:, ::2]
        if done and (done[-1] != n - 1 or n == shorten_at):
            done, xs = [], []
        done, xs = [*done, n], [*xs, x]
        layers = [model.blocks[j]["proj"] for j in done]
        a, b = [layer.lora_A for layer in layers], [layer.lora_B for layer in layers]
        term = reference.low_rank_term(shortcut, pre_num, layers[0].scaling, len(xs) - 1, xs, a, b)
        x = x + torch.tanh(nn.functional.linear(x, layers[-1].weight, layers[-1].bias) + term)
    return x


def gradients(model: Stack, losses: list[Tensor]) -> list[Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(sum(losses), parameters, allow_unused=True))


def left_behind(model: Stack) -> list[object]:
    return [chain for chain in (block["proj"].chain for block in model.blocks) if chain.passes.current() is not None]


@pytest.mark.parametrize(("shortcut", "pre_num"), HANDING)
def test_two_forwards_before_one_backward(shortcut: str, pre_num: int) -> None:
    model = adapted(shortcut, pre_num)
    x1, x2 = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 3, 8, dtype=torch.float64)
    together = gradients(model, [model(x1).square().mean(), -2 * model(x2).square().mean()])
    one, two = gradients(model, [model(x1).square().mean()]), gradients(model, [-2 * model(x2).square().mean()])
    for both, first, second in zip(together, one, two, strict=True):
        assert max_error(both, first + second) < 1e-14


@pytest.mark.parametrize(("shortcut", "pre_num"), HANDING)
def test_an_exception_leaves_nothing(shortcut: str, pre_num: int) -> None:
    model, x = adapted(shortcut, pre_num), torch.randn(2, 3, 8, dtype=torch.float64)
    expected = model(x)
    with pytest.raises(ArithmeticError, match="planted"):
        model(x, fail_at=2)
    assert not left_behind(model)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(("shortcut", "pre_num"), HANDING)
@pytest.mark.parametrize("skip", [(0,), (1,), (2, 3), (1, 2)], ids=str)
def test_a_layer_whose_predecessor_did_not_run_is_layer_zero(
    shortcut: str, pre_num: int, skip: tuple[int, ...]
) -> None:
    model, x = adapted(shortcut, pre_num), torch.randn(2, 3, 8, dtype=torch.float64)
    runs = [n for n in range(4) if n not in skip]
    assert max_error(model(x, skip=skip), by_reference(model, x, runs, shortcut, pre_num)) < 1e-13


@pytest.mark.parametrize(("shortcut", "pre_num"), HANDING)
def test_a_chain_is_cut_where_the_token_shape_changes(shortcut: str, pre_num: int) -> None:
    model, x = adapted(shortcut, pre_num), torch.randn(2, 4, 8, dtype=torch.float64)
    expected = by_reference(model, x, [0, 1, 2, 3], shortcut, pre_num, shorten_at=2)
    assert max_error(model(x, shorten_at=2), expected) < 1e-13


@pytest.mark.parametrize(("shortcut", "pre_num"), HANDING)
def test_a_chain_run_twice_in_one_forward_starts_anew(shortcut: str, pre_num: int) -> None:
    """Siamese use: the second sweep sees nothing of the first, even when it skips the first layer."""
    model = adapted(shortcut, pre_num)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = model

        def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
            return self.stack(x1) + self.stack(x2, skip=(0,))

    x1, x2 = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 3, 8, dtype=torch.float64)
    assert torch.equal(Twice()(x1, x2), model(x1) + model(x2, skip=(0,)))
    chain = model.blocks[0]["proj"].chain
    with chain.forward_pass():  # the same inside one pass
        first, second = model(x1), model(x2, skip=(0,))
    assert torch.equal(first, model(x1)) and torch.equal(second, model(x2, skip=(0,)))


def test_outside_a_pass_is_an_error_that_names_the_fix() -> None:
    model = adapted("input", 1)
    with pytest.raises(RuntimeError, match=r"outside a forward pass.*link\(.*root.*forward_pass"):
        model.blocks[1]["proj"](torch.zeros(1, 8, dtype=torch.float64))
    block = adapted("block", 1)
    block.blocks[1]["proj"](torch.zeros(1, 8, dtype=torch.float64))  # needs no state


@pytest.mark.parametrize(("shortcut", "pre_num"), HANDING)
def test_threads_do_not_meet(shortcut: str, pre_num: int) -> None:
    """One model in four threads at once, many times over, exact every time."""
    model = adapted(shortcut, pre_num)
    inputs = [torch.randn(2, 3, 8, dtype=torch.float64) for _ in range(4)]
    expected = [model(x) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(50):
            if not torch.equal(model(inputs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not left_behind(model)


def test_an_interrupt_in_a_forward_does_not_reach_the_next() -> None:
    """Ctrl-C is no Exception, so torch runs no post-hook; the next forward must still start clean."""
    model, x = adapted("input", 1), torch.randn(2, 3, 8, dtype=torch.float64)
    expected = model(x)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model.blocks[2]["proj"].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    handle.remove()
    assert torch.equal(model(x), expected) and not left_behind(model)


def test_handed_tensors_are_freed_with_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[weakref.ref[Tensor]] = []
    original = ForwardState.hand_on
    monkeypatch.setattr(ForwardState, "hand_on", lambda self, n, h: (seen.append(weakref.ref(h)), original(self, n, h)))
    model = adapted("middle", -1)
    with torch.no_grad():
        model(torch.randn(2, 3, 8, dtype=torch.float64))
    gc.collect()
    assert len(seen) == 3 and all(ref() is None for ref in seen)

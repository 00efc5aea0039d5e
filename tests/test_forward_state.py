"""What flows between layers belongs to one forward; layers that read one input project it once for all of them."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reslora_kernels import (
    ResLoRAConfig,
    apply_reslora,
    collect_statistics,
    load_adapter,
    merge_reslora,
    reference,
    save_adapter,
)
from reslora_kernels.adapt.record import adapted_layers, record_of
from reslora_kernels.forward_state import ForwardState, version_of
from reslora_kernels.ops import lora_linear
from reslora_kernels.testing import max_error, relative_error

from .models import FAMILIES, llama, randomize

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


SHORTCUTS = ("none", "input", "block", "middle")
ROUNDING = 1e-9  # float64; the same sums in another order
GROUPS = (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"])


def sharing(shortcut: str, stacked: bool = True, family: str = "llama", **changes: Any) -> nn.Module:
    config = ResLoRAConfig(**({
        "r": 3, "lora_alpha": 5, "shortcut": shortcut, "pre_num": 2, "stack_projections": stacked
    } | changes))  # fmt: skip
    return randomize(apply_reslora(FAMILIES[family].make().double(), config))


def batch(family: str = "llama") -> dict[str, Any]:
    values = FAMILIES[family].batch(5)
    return {key: v.double() if v.is_floating_point() else v for key, v in values.items()}


def results(model: nn.Module, family: str = "llama", run: Any = None) -> dict[str, Tensor]:
    """The outputs and all gradients; ``run`` is what to call, if not the model."""
    model.zero_grad()
    outputs = FAMILIES[family].outputs(model if run is None else run, batch(family))
    outputs.square().mean().backward()
    return {"outputs": outputs} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@contextmanager
def projections() -> Iterator[dict[str, list[int]]]:
    """The rows of A in every call of the two ops."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls: dict[str, list[int]] = {"forward": [], "backward": []}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.reslora_kernels.lora_linear_forward.default:
                calls["forward"].append(args[3].shape[0])
            if func is torch.ops.reslora_kernels.lora_linear_backward.default:
                calls["backward"].append(args[4].shape[0])
            return func(*args, **(kwargs or {}))

    with Count():
        yield calls


@pytest.mark.parametrize("family", ["llama", "roberta", "t5", pytest.param("unet", marks=pytest.mark.slow)])
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_same_values_and_gradients(shortcut: str, family: str) -> None:
    stacked, apart = sharing(shortcut, True, family), sharing(shortcut, False, family)
    assert record_of(stacked).groups and not record_of(apart).groups
    own, expected = results(stacked, family), results(apart, family)
    assert own.keys() == expected.keys()
    for name in own:
        assert relative_error(own[name], expected[name]) < ROUNDING, name


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_one_projection_for_each_group(shortcut: str) -> None:
    """x is read once by the forward and once by dA for q, k, v, not three times; every row of A takes part once."""
    stacked, apart = sharing(shortcut), sharing(shortcut, False)
    assert record_of(stacked).same_input == [
        [f"model.layers.{n}.{name}" for name in names] for n in range(3) for names in GROUPS
    ]
    with projections() as once:
        results(stacked)
    with projections() as each:
        results(apart)
    layers = len(adapted_layers(stacked))
    for calls in (once, each):
        assert len(calls["forward"]) == len(calls["backward"]) == layers
    for kind in ("forward", "backward"):
        assert sum(once[kind]) == sum(each[kind])
        assert sum(rows > 0 for rows in each[kind]) == layers
        assert sum(rows > 0 for rows in once[kind]) == layers - 3 * 3


def test_nothing_outlives_the_forward_and_less_is_kept() -> None:
    """The layers whose input another one projects save u [M, r] for backward, not x; no group holds a tensor after."""
    saved: dict[bool, set[int]] = {}
    for stacked in (True, False):
        model, kept = sharing("none", stacked), []

        def keep(tensor: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(**batch())
        saved[stacked] = {t.untyped_storage().data_ptr() for t in kept if t.dim() == 3 and t.shape[-1] == 32}
        assert all(group.passes.current() is None for group in record_of(model).groups)
    assert len(saved[True]) <= len(saved[False])


def test_dropout_has_a_mask_for_each_layer() -> None:
    model = sharing("block", lora_dropout=0.2).train()
    with projections() as calls:
        results(model)
    assert all(calls["forward"])
    model.eval()
    with projections() as calls:
        results(model)
    assert not all(calls["forward"])


@pytest.mark.parametrize("shortcut", ["input", "block", "middle"])
@pytest.mark.slow
def test_with_checkpointing_compile_copies_and_files(shortcut: str, tmp_path: Path) -> None:
    model = sharing(shortcut)
    expected = results(sharing(shortcut, False))

    def check(other: nn.Module, run: Any = None) -> None:
        own = results(other, run=run)
        assert own.keys() == expected.keys()
        for name in own:
            assert relative_error(own[name], expected[name]) < ROUNDING, name

    check(copy.deepcopy(model))
    save_adapter(model, tmp_path)
    loaded = load_adapter(llama().double(), tmp_path)
    assert record_of(loaded).same_input == record_of(model).same_input
    check(loaded)
    checkpointed = sharing(shortcut).train()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    check(checkpointed)
    torch._dynamo.reset()
    check(model, torch.compile(model, backend="aot_eager", fullgraph=True))


def test_statistics_and_sequential_merges_see_each_layer() -> None:
    stacked, apart = sharing("middle"), sharing("middle", False)
    reports = []
    for model in (stacked, apart):
        with collect_statistics(model) as statistics, torch.no_grad():
            model(**batch())
        reports.append({name: layer.gram for name, layer in statistics.layers.items()})
        merge_reslora(model, calibration=[batch()], sequential=True)
    for name, gram in reports[0].items():
        assert relative_error(gram, reports[1][name]) < ROUNDING
    with torch.no_grad():
        own, expected = (model(**batch()).logits for model in (stacked, apart))
    assert relative_error(own, expected) < 1e-6


def test_a_layer_called_by_itself_or_on_another_tensor_projects_for_itself() -> None:
    model, apart = sharing("none"), sharing("none", False)
    x = torch.randn(2, 3, 32, dtype=torch.float64)
    for own, other in zip(adapted_layers(model).values(), adapted_layers(apart).values(), strict=True):
        if own.in_features == 32:
            assert torch.equal(own(x), other(x))

    class Apart(nn.Module):
        """One group by the run at the start; later its layers read different tensors."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.split = False

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x * 2 if self.split else x)

    config = ResLoRAConfig(r=2, shortcut="none")
    module = randomize(apply_reslora(nn.Sequential(Apart()).double(), config, example_inputs=x[..., :4]))
    assert len(record_of(module).groups) == 1
    y = torch.randn(3, 4, dtype=torch.float64)
    module[0].split = True
    merged = copy.deepcopy(module)
    merge_reslora(merged)
    torch.testing.assert_close(module(y), merged(y))


def test_without_any_a_the_residual_is_u() -> None:
    torch.manual_seed(0)
    x, w, u, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((5, 7), (6, 7), (5, 2), (6, 2)))
    y, handed = lora_linear(x, w, None, (), (b,), u, scaling=0.5)
    assert handed is None
    torch.testing.assert_close(y, x @ w.T + 0.5 * u @ b.T)
    assert torch.autograd.gradcheck(
        lambda *t: lora_linear(t[0], t[1], None, (), (t[3],), t[2], scaling=0.5)[0], (x, w, u, b)
    )
    with pytest.raises(ValueError, match="only with a residual"):
        lora_linear(x, w, None, (), (b,), scaling=0.5)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = (nn.Linear(8, 8, dtype=torch.float64) for _ in range(2))
        self.change: Callable[[Tensor], Any] = lambda x: x

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0
        u = self.a(x)
        self.change(x)
        return u + self.b(x)


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_change_in_place_between_layers_that_read_one_tensor(without: Any, compiled: bool) -> None:
    x, found = torch.randn(4, 8, dtype=torch.float64), []
    for stack in (True, False):
        model = nn.Sequential(InPlace())
        config = ResLoRAConfig(r=2, shortcut="none", stack_projections=stack)
        randomize(apply_reslora(model, config, example_inputs=x))
        assert bool(record_of(model).groups) == stack
        model[0].change = lambda x: x.mul_(3)
        torch._dynamo.reset()
        with without():
            found.append((torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model)(x))
    assert max_error(*found) < 1e-12


def test_writes_are_counted_but_to_inference_tensors() -> None:
    with torch.inference_mode():
        assert version_of(torch.zeros(1).add_(1)) == 0
    x = torch.zeros(1)
    assert version_of(x.add_(1)) == version_of(x) == 1

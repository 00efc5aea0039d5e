"""Layers that read one tensor, as q, k and v do: the same values and gradients as apart, and what is counted less.

Each layer is still a module that the model calls, and a node of autograd: the first projects x for all of them, and x
goes on from call to call, so that its gradients are added up inside the products of the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from reslora_kernels import ResLoRAConfig, apply_reslora, host
from reslora_kernels.adapt.record import record_of
from reslora_kernels.testing import relative_error

from .models import randomize

WIDTH, RANK, DEPTH = 64, 4, 3
SHORTCUTS = {"none": 0, "block": 1, "middle": 2, "input": 1}


class Attention(nn.Module):
    """Three projections of unequal widths, called in an order that can be changed, with something in between."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, n) for n in (WIDTH, WIDTH, WIDTH // 2))
        self.order = "qkv"
        self.between: Callable[[Tensor, str], Any] = lambda x, name: None

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = []
        for name in self.order:
            outputs.append(getattr(self, name)(x))
            self.between(x, name)
        return outputs


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(DEPTH))

    def forward(self, x: Tensor) -> list[list[Tensor]]:
        outputs = []
        for block in self.blocks:
            x = x + 0.5
            outputs.append(block(x))
            x = torch.tanh(sum(y[..., : WIDTH // 2] for y in outputs[-1])).repeat_interleave(2, -1)
        return outputs


def adapted(shortcut: str, stacked: bool, dtype: torch.dtype = torch.float64) -> Any:
    config = ResLoRAConfig(
        r=RANK, lora_alpha=6, shortcut=shortcut, pre_num=SHORTCUTS[shortcut], stack_projections=stacked
    )
    torch.manual_seed(0)
    model = randomize(apply_reslora(Model().to(dtype), config, example_inputs=torch.ones(2, WIDTH, dtype=dtype)))
    assert len(record_of(model).groups) == (DEPTH if stacked else 0)
    return model


def gradients(model: Any, x: Tensor, outputs: list[list[Tensor]], of: slice) -> dict[str, Tensor | None]:
    """Of all that is trained, and of x, for a loss that reads some outputs of each block only."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad} | {"x": x}
    loss = sum(y.square().sum() for each in outputs for y in each[of] if y.requires_grad)
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
    return dict(zip(named, found, strict=True))


def as_it_is(model: Any) -> None:
    """Nothing is done to the model."""


def other_orders(model: Any) -> None:
    for block, order in zip(model.blocks, ("vqk", "qv", "kqkv"), strict=True):
        block.order = order


def without_gradients_in_part(model: Any) -> None:
    """Of the first block q runs without gradients, k and v with them; of the second the other way round."""

    def switched(enabled: bool) -> Callable[..., None]:
        def switch(*_: Any) -> None:
            torch.set_grad_enabled(enabled)

        return switch

    for layer in (model.blocks[0].q, model.blocks[1].k):
        layer.register_forward_pre_hook(switched(False))
        layer.register_forward_hook(switched(True))


def a_changed_in_between(model: Any) -> None:
    def change(layer: Any, args: Any) -> None:
        with torch.no_grad():
            layer.lora_A.mul_(1.5)

    model.blocks[1].k.register_forward_pre_hook(change)


def another_a_in_between(model: Any) -> None:
    layer = model.blocks[1].v
    other = nn.Parameter(layer.lora_A.detach() + 1)
    layer.register_forward_pre_hook(lambda layer, _: layer._parameters.update(lora_A=other))


def x_changed_in_between(model: Any) -> None:
    """Between k and v, of no gradient: q's would need x as it was."""

    def change(x: Tensor, name: str) -> None:
        if name == "q":
            with torch.no_grad():
                x.add_(1)

    for block in model.blocks:
        block.between = change


def hooks_on_gradients(model: Any) -> None:
    """Each sees its own layer's gradients and changes them."""
    model.blocks[0].k.register_full_backward_hook(lambda layer, given, out: (given[0] * 2,))
    model.blocks[1].v.register_forward_hook(lambda layer, args, y: y.register_hook(lambda dy: dy * 3) and None)


def trained_weights(model: Any) -> None:
    for block in model.blocks:
        block.k.weight.requires_grad_()
        block.q.weight.requires_grad_()
        block.q.bias.requires_grad_()


SCENES = [as_it_is, other_orders, without_gradients_in_part, another_a_in_between, hooks_on_gradients, trained_weights]
CHANGES = [a_changed_in_between, x_changed_in_between]
OUTPUTS = {"all": slice(None), "first": slice(1), "last": slice(2, None), "no first": slice(1, None)}


@pytest.fixture(params=["host", "library"])
def served(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who computes: the host extension, or the passes that every other device has too."""
    if request.param == "host" and host.module is None:
        pytest.skip(f"the host extension is not in use: {host.why}")
    if request.param == "library":
        monkeypatch.setattr(host, "module", None)
        monkeypatch.setattr("reslora_kernels.ops.function.FEW_VALUES", 0)
    return str(request.param)


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_the_same_as_apart(shortcut: str, scene: Callable[[Any], None], served: str) -> None:
    found = []
    for stacked in (True, False):
        model = adapted(shortcut, stacked)
        scene(model)
        x = torch.randn(2, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        outputs = model(x)
        found.append([each.detach() for block in outputs for each in block])
        for of in OUTPUTS.values():  # more than one backward through one graph
            found[-1] += gradients(model, x, outputs, of).values()
    for own, expected in zip(*found, strict=True):
        if own is None or expected is None:  # of a layer whose output nothing came of: none, or zeros
            assert all(gradient is None or not gradient.any() for gradient in (own, expected))
        else:
            torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_what_is_changed_in_between_is_seen(shortcut: str, change: Callable[[Any], None], served: str) -> None:
    """Without gradients. With them autograd refuses, as what q has saved is not there any more."""
    found = []
    for stacked in (True, False):
        model = adapted(shortcut, stacked)
        change(model)
        x = torch.randn(5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            found.append([y for block in model(x) for y in block])
    for own, expected in zip(*found, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-10)
    model = adapted(shortcut, True)
    change(model)
    outputs = model(torch.randn(5, WIDTH, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.stack([y.sum() for block in outputs for y in block]).sum().backward()


def test_old_hooks_on_gradients_have_calls_of_their_own() -> None:
    seen: dict[bool, list[Tensor]] = {}
    for stacked in (True, False):
        model, kept = adapted("none", stacked), []
        with pytest.warns(FutureWarning, match="non-full backward hook"):
            model.blocks[2].q.register_backward_hook(
                lambda layer, given, out, kept=kept: kept.append(given[0]) and None
            )
            x = torch.ones(3, WIDTH, dtype=torch.float64, requires_grad=True)
            torch.stack([y.sum() for y in model(x)[2]]).sum().backward()
        seen[stacked] = kept
    assert len(seen[True]) == 1 and relative_error(seen[True][0], seen[False][0]) < 1e-9


def test_gradients_of_gradients_of_a_small_group() -> None:
    """Differentiable twice where a layer alone is, through what is handed on and through x as it is passed on."""
    model = adapted("input", True)
    x = torch.randn(2, WIDTH, dtype=torch.float64, requires_grad=True)

    def first_gradient(x: Tensor) -> Tensor:
        loss = sum(y.pow(3).sum() for block in model(x) for y in block)
        return torch.autograd.grad(loss, x, create_graph=True)[0]

    assert torch.autograd.gradcheck(first_gradient, (x,), fast_mode=True)


@pytest.mark.parametrize("shortcut", ["none", "input"])
def test_autocast_casts_x_once_for_a_group(shortcut: str, served: str) -> None:
    results, casts = [], []
    for stacked in (True, False):
        model = adapted(shortcut, stacked, torch.float32)
        x = torch.randn(256, WIDTH, generator=torch.Generator().manual_seed(2)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as p:
            outputs = model(x)[0]
        casts.append(sum(e.name == "aten::_to_copy" and e.input_shapes[0] == [256, WIDTH] for e in p.events()))
        results.append(torch.autograd.grad([y.sum() for y in outputs], x)[0])
        assert all(y.dtype == torch.bfloat16 for y in outputs)
    assert casts == [1, 3]  # of the first block; x is what it adds to
    assert relative_error(*results) < 1e-2


class Blocks(nn.Module):
    """The same blocks, each on an input of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(DEPTH))

    def forward(self, xs: list[Tensor]) -> list[list[Tensor]]:
        return [block(x) for block, x in zip(self.blocks, xs, strict=True)]


# Of the middle block's three layers, by PyTorch's operations as on any device: nodes of autograd; products forward and
# backward; other operators that work, forward and backward; those of them in backward that begin with as much as x.
PEFT = (21, 9, 15, 12, 11, 7)
APART = {
    "none": (3, 9, 15, 3, 5, 2),
    "block": (3, 9, 15, 9, 11, 2),
    "middle": (3, 9, 15, 6, 5, 2),
    "input": (3, 9, 15, 9, 14, 2),
}
COUNTS = {
    "none": (3, 7, 11, 5, 6, 0),
    "block": (3, 7, 11, 8, 9, 0),
    "middle": (3, 7, 11, 7, 11, 0),
    "input": (3, 7, 11, 7, 12, 0),
}
PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_"}
WORK = {f"aten::{name}" for name in ("add", "add_", "mul", "cat", "copy_", "zero_", "fill_")}
TOKENS = 8192  # with which a further read of x costs more than a further operator


def nodes_of(outputs: list[Tensor]) -> set[Any]:
    """Nodes of autograd that outputs come from, but for those of parameters and inputs."""
    seen: set[Any] = set()
    waiting = [y.grad_fn for y in outputs]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen and type(node).__name__ != "AccumulateGrad":
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return seen


def costs(model: Any, asked: str = "lora") -> tuple[int, ...]:
    """What ``COUNTS`` says, with gradients of x and of the parameters with ``asked`` in their names."""
    xs = [torch.randn(TOKENS, WIDTH, requires_grad=True) for _ in range(DEPTH)]
    with profile(activities=[ProfilerActivity.CPU]):  # starting it for the first time does work of its own
        model(xs)
    block = model.get_submodule("base_model.model" if hasattr(model, "base_model") else "").blocks[1]
    forward = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
    block.register_forward_pre_hook(lambda *_: forward.start())
    block.register_forward_hook(lambda *_: forward.stop())
    before, outputs, _ = model(xs)
    directions = [torch.randn_like(y) for y in outputs]
    wanted = [xs[1], *(p for name, p in block.named_parameters() if p.requires_grad and asked in name)]
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as backward:
        torch.autograd.grad(outputs, wanted, directions)
    passes = forward.events(), backward.events()
    on_x = sum([TOKENS, WIDTH] in e.input_shapes[:1] and e.name in WORK for e in backward.events())
    return (
        len(nodes_of(outputs) - nodes_of(before)),
        *(sum(e.name in PRODUCTS for e in each) for each in passes),
        *(sum(e.name in WORK for e in each) for each in passes),
        on_x,
    )


@pytest.mark.parametrize("stacked", [True, False], ids=["group", "apart"])
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_what_a_group_costs(shortcut: str, stacked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "module", None)  # whose products no profiler sees one by one
    config = ResLoRAConfig(
        r=RANK, shortcut=shortcut, pre_num=SHORTCUTS[shortcut], lora_dropout=0.0, stack_projections=stacked
    )
    model = apply_reslora(Blocks(), config, example_inputs=([torch.ones(2, WIDTH) for _ in range(DEPTH)],))
    assert len(record_of(model).groups) == (DEPTH if stacked else 0)
    # A that looks ahead has a gradient of the block before, too: its own is made here whether it is asked for or not.
    assert costs(model, "lora_B" if shortcut == "input" else "lora") == (COUNTS if stacked else APART)[shortcut]


def test_what_the_same_layers_cost_in_peft() -> None:
    from peft import LoraConfig, get_peft_model

    assert costs(get_peft_model(Blocks(), LoraConfig(r=RANK, target_modules=["q", "k", "v"]))) == PEFT


def in_one_dimension(model: Any, x: Tensor) -> Tensor:
    return torch.cat([y for block in model(x[0]) for y in block])


def by_forward_mode(model: Any, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        outputs = model(forward_ad.make_dual(x, x.cos()))
        return torch.cat([forward_ad.unpack_dual(y).tangent for block in outputs for y in block], -1)


def of_many_directions(model: Any, x: Tensor) -> Tensor:
    y, trained = model(x)[-1][0], [p for p in model.parameters() if p.requires_grad]
    directions = torch.linspace(-1, 1, 3 * y.numel(), dtype=y.dtype).view(3, *y.shape)
    found = torch.autograd.grad(y, trained, directions, is_grads_batched=True, allow_unused=True)
    given = [torch.zeros(3, *p.shape) if each is None else each for p, each in zip(trained, found, strict=True)]
    return torch.cat([each.flatten() for each in given])


def of_unequal_lengths(model: Any, x: Tensor) -> Tensor:
    parts = [x[:3], x[3:8], x[8:]]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    outputs = [y for block in model(nested) for y in block]
    assert all(y.is_nested and y.shape[:2] == nested.shape[:2] for y in outputs)
    return torch.cat([y.values() for y in outputs], -1)


def in_a_row(model: Any, x: Tensor) -> Tensor:
    return torch.cat([y for block in model(x) for y in block], -1)


@pytest.mark.parametrize("extension", [True, False])
@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("call", [in_one_dimension, by_forward_mode, of_many_directions, of_unequal_lengths])
def test_calls_that_a_linear_layer_takes(
    call: Any, shortcut: str, extension: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unbatched, with tangents, with several directions at once and of nested tensors: as layers apart give them."""
    if not extension:
        monkeypatch.setattr(host, "module", None)
    x = torch.randn(40, WIDTH, dtype=torch.float64)
    model, apart = adapted(shortcut, True), adapted(shortcut, False)
    found = call(model, x)
    assert relative_error(found, call(apart, x)) < 1e-12
    if call is of_unequal_lengths:
        assert relative_error(found, in_a_row(apart, x)) < 1e-12
    if call is in_one_dimension:
        assert relative_error(found, torch.cat([y[0] for block in apart(x) for y in block])) < 1e-12
    if call is by_forward_mode:
        step = 1e-6 * x.cos()
        assert relative_error(found, (in_a_row(apart, x + step) - in_a_row(apart, x - step)) / 2e-6) < 1e-6


def test_products_are_counted() -> None:
    x = torch.ones(2, WIDTH)
    counted = []
    for model in (Model(), adapted("none", True, torch.float32)):
        with FlopCounterMode(display=False) as counter:
            sum(y.sum() for block in model(x) for y in block).backward()
        counted.append(counter.get_total_flops())
    base, found = counted
    low_rank = 2 * 2 * DEPTH * (3 * WIDTH * RANK + (2 * WIDTH + WIDTH // 2) * RANK)
    assert base * 2 // 3 <= found <= base + 3 * low_rank  # no gradients of weights
    assert found % low_rank == base % low_rank or found > base // 3 + low_rank


def test_a_backward_pass_for_each_of_the_layers_says_what_to_set() -> None:
    model, x = adapted("none", True), torch.randn(3, WIDTH, dtype=torch.float64)
    q, k, _ = model.blocks[0](x)
    q.sum().backward()
    with pytest.raises(RuntimeError, match=r"second time.*adapt with stack_projections=False"):
        k.sum().backward()
    q, k, _ = adapted("none", False).blocks[0](x)
    q.sum().backward()
    k.sum().backward()


@pytest.mark.parametrize("trains", ["nothing", "B"])
@pytest.mark.parametrize("rows", [5, 5000])
def test_x_may_be_written_to_where_no_gradient_needs_it(trains: str, rows: int) -> None:
    """As with PyTorch's layers, whatever the size; a backward of the backward then says so."""
    model = adapted("none", False).blocks[0].q
    model.lora_A.requires_grad_(False)
    model.lora_B.requires_grad_(trains == "B")
    x = torch.randn(rows, WIDTH, dtype=torch.float64, requires_grad=True)
    h = x * 1
    y = model(h)
    h += 1
    (y.square().sum() + h.sum()).backward()
    small = x.detach()[:5].requires_grad_()
    h = small * 1
    y = model(h)
    (dx,) = torch.autograd.grad(y.square().sum(), h, create_graph=True)
    assert dx.square().sum().backward() is None and small.grad is not None
    y = model(h)
    h += 1
    with pytest.raises(RuntimeError, match="has been written to since"):
        torch.autograd.grad(y.square().sum(), small, create_graph=True)


def test_x_by_the_name_that_a_linear_layer_has_for_it() -> None:
    layer, x = adapted("none", False).blocks[0].q, torch.randn(3, WIDTH, dtype=torch.float64)
    assert torch.equal(layer(input=x), layer(x))

"""ResLoRALinear as a drop-in for nn.Linear, alone and in a chain linked by hand; the mask of its dropout."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reslora_kernels import ResLoRAConfig, ResLoRALinear, dropout, link, reference
from reslora_kernels.layers.shortcuts import carried
from reslora_kernels.testing import chain_inputs, max_error, reference_results

SHORTCUTS = [("none", 0), ("input", 1), ("block", 1), ("block", -1), ("middle", 2), ("middle", -1)]


def make_chain(config: ResLoRAConfig, inputs: dict[str, list[Tensor]], dtype: torch.dtype = torch.float64):
    layers = []
    for n, weight in enumerate(inputs["weight"]):
        layer = ResLoRALinear(weight.shape[1], weight.shape[0], bool(inputs["bias"]), dtype=dtype, config=config)
        for name in ("weight", "bias", "lora_A", "lora_B"):
            if inputs[name]:
                getattr(layer, name).data.copy_(inputs[name][n])
        layers.append(layer)
    return layers, link(layers, name="test")


def test_looks_like_the_linear_it_replaces() -> None:
    linear = nn.Linear(12, 5).eval()
    seen = []
    handle = linear.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    layer = ResLoRALinear.from_linear(linear, ResLoRAConfig(r=3, lora_alpha=6))
    assert isinstance(layer, nn.Linear) and (layer.in_features, layer.out_features) == (12, 5)
    assert layer.weight is linear.weight and layer.bias is linear.bias and not layer.training
    assert not layer.weight.requires_grad and not layer.bias.requires_grad
    assert layer.lora_A.shape == (3, 12) and layer.lora_B.shape == (5, 3) and layer.scaling == 2.0
    x = torch.randn(4, 12)
    assert torch.equal(layer(x), linear(x)), "B is zero at the start"
    assert seen == [ResLoRALinear, nn.Linear]
    handle.remove()
    layer(x)
    assert len(seen) == 2


def test_base_checkpoint_loads_unchanged_and_adapters_round_trip() -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    adapted = nn.Sequential(ResLoRALinear(4, 4), ResLoRALinear(4, 4))
    before = adapted[0].lora_A.clone()
    adapted.load_state_dict(base.state_dict(), strict=True)
    assert torch.equal(adapted[1].weight, base[1].weight) and torch.equal(adapted[0].lora_A, before)
    state = adapted.state_dict()
    assert set(state) == {f"{i}.{n}" for i in (0, 1) for n in ("weight", "bias", "lora_A", "lora_B")}
    del state["1.lora_A"]
    with pytest.raises(RuntimeError, match=r"Missing key.*1\.lora_A"):
        adapted.load_state_dict(state, strict=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_adapters_of_half_precision_weights_are_float32(dtype: torch.dtype) -> None:
    layer = ResLoRALinear(8, 8, dtype=dtype)
    assert layer.lora_A.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert layer(torch.randn(2, 8, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize(("shortcut", "pre_num"), SHORTCUTS)
def test_chain_equals_reference(shortcut: str, pre_num: int) -> None:
    """Values and every gradient, six layers, all inputs leaves."""
    config = ResLoRAConfig(r=3, lora_alpha=5, shortcut=shortcut, pre_num=pre_num)
    inputs = chain_inputs(6, (2, 7), 10, 9, 3)
    truth = reference_results(config, inputs)
    layers, chain = make_chain(config, inputs)
    xs = [x.clone().requires_grad_() for x in inputs["x"]]
    with chain.forward_pass():
        ys = [layer(x) for layer, x in zip(layers, xs, strict=True)]
    torch.autograd.backward(ys, inputs["dy"])
    for n, layer in enumerate(layers):
        for name, actual in (
            ("y", ys[n]), ("dx", xs[n].grad), ("dlora_A", layer.lora_A.grad), ("dlora_B", layer.lora_B.grad),
        ):  # fmt: skip
            assert max_error(actual, truth[name][n]) < 1e-12, f"{name}.{n}"


@pytest.mark.parametrize(("shortcut", "pre_num"), SHORTCUTS)
def test_dropout_reuses_each_layers_own_mask(shortcut: str, pre_num: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """x_n is dropped once; later layers meet that same dropped x_n (math of the shortcut table)."""
    config = ResLoRAConfig(r=3, lora_dropout=0.4, shortcut=shortcut, pre_num=pre_num)
    inputs = chain_inputs(4, (6,), 10, 10, 3)
    seeds = [torch.tensor(100 + n) for n in range(4)]
    drawn = iter(seeds)
    monkeypatch.setattr(dropout, "new_seed", lambda device: next(drawn))
    layers, chain = make_chain(config, inputs)
    xs = [x.clone().requires_grad_() for x in inputs["x"]]
    with chain.forward_pass():
        ys = [layer(x) for layer, x in zip(layers, xs, strict=True)]
    torch.autograd.backward(ys, inputs["dy"])

    def dropped(n: int, x: Tensor) -> Tensor:
        return dropout.apply_mask(x, dropout.keep_mask(seeds[n], *x.shape, 0.4), 0.4)

    leaves, a, b = ([t.clone().requires_grad_() for t in inputs[name]] for name in ("x", "lora_A", "lora_B"))
    expected = reference.chain_forward(
        shortcut, pre_num, config.scaling, leaves, inputs["weight"], inputs["bias"], a, b, dropped
    )
    torch.autograd.backward(expected, inputs["dy"])
    for n, layer in enumerate(layers):
        assert max_error(ys[n], expected[n]) < 1e-12
        assert max_error(xs[n].grad, leaves[n].grad) < 1e-12
        assert max_error(layer.lora_A.grad, a[n].grad) < 1e-12
        assert max_error(layer.lora_B.grad, b[n].grad) < 1e-12


def test_dropout_only_in_training() -> None:
    layer = ResLoRALinear(64, 8, config=ResLoRAConfig(lora_dropout=0.5))
    nn.init.normal_(layer.lora_B)
    x = torch.randn(16, 64)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_trained_bias_and_unfrozen_weight_get_their_gradients() -> None:
    """The frozen weight gets none; one that the user unfreezes is never silently left behind."""
    layer, x = ResLoRALinear(6, 5, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    nn.init.normal_(layer.lora_B)
    layer.requires_grad_(True)
    layer(x).square().sum().backward()
    y = nn.functional.linear(x, layer.weight, layer.bias) + layer.scaling * x @ layer.lora_A.T @ layer.lora_B.T
    expected = torch.autograd.grad(y.square().sum(), [layer.weight, layer.bias, layer.lora_A, layer.lora_B])
    for parameter, gradient in zip((layer.weight, layer.bias, layer.lora_A, layer.lora_B), expected, strict=True):
        assert max_error(parameter.grad, gradient) < 1e-12


def test_deepcopy_of_a_chain_is_a_chain_of_copies() -> None:
    layers, _ = make_chain(ResLoRAConfig(r=2, shortcut="block"), chain_inputs(3, (1,), 4, 4, 2))
    copies = copy.deepcopy(nn.ModuleList(layers))
    assert copies[0].chain is not layers[0].chain
    assert copies[0].chain.layers == list(copies)
    assert [copy_.position for copy_ in copies] == [0, 1, 2]


def test_root_opens_the_pass() -> None:
    """link(layers, root=module): every call of the module is one pass."""
    inputs = chain_inputs(3, (4,), 6, 6, 2)
    config = ResLoRAConfig(r=2, lora_alpha=4, shortcut="input")

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(ResLoRALinear(6, 6, dtype=torch.float64, config=config) for _ in range(3))
            link(list(self.layers), root=self)

        def forward(self, xs: list[Tensor]) -> list[Tensor]:
            return [layer(x) for layer, x in zip(self.layers, xs, strict=True)]

    stack = Stack()
    for n, layer in enumerate(stack.layers):
        for name in ("weight", "bias", "lora_A", "lora_B"):
            getattr(layer, name).data.copy_(inputs[name][n])
    truth = reference_results(config, inputs)["y"]
    for n, y in enumerate(stack(inputs["x"])):
        assert max_error(y, truth[n]) < 1e-12


@pytest.mark.parametrize("change", [Tensor.relu_, lambda y: y.mul_(y.detach().cos()), lambda y: y[..., 0].zero_()])
@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 4)], ids=str)
@pytest.mark.parametrize(("shortcut", "pre_num"), SHORTCUTS)
def test_outputs_may_be_changed_in_place(
    shortcut: str, pre_num: int, shape: tuple[int, ...], change: Callable[[Tensor], Tensor]
) -> None:
    config = ResLoRAConfig(r=2, shortcut=shortcut, pre_num=pre_num)
    layers, chain = make_chain(config, chain_inputs(3, shape[:-1], 4, 4, 2))
    x, gradients = torch.randn(shape, dtype=torch.float64, requires_grad=True), []
    for in_place in (True, False):
        y = x
        with chain.forward_pass():
            for layer in layers:
                y = layer(y) if in_place else layer(y).clone()
                change(y)
        gradients.append(torch.autograd.grad(y.square().sum(), [x, *(layer.lora_A for layer in layers)]))
    assert all(torch.equal(got, wanted) for got, wanted in zip(*gradients, strict=True))


ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]
) -> None:
    """Known answers for philox4x32 with 7 rounds, from the authors' Random123 distribution."""
    assert [int(word) for word in dropout.philox(counter, [torch.tensor(part) for part in key])] == list(words)


def test_mask_is_the_documented_layout() -> None:
    """Element (row, column) reads 16 bits of word (column % 8) // 2 of the call at (column // 8, row)."""
    seed, p = torch.tensor(0x123456789ABCDEF0), 0.3
    mask = dropout.keep_mask(seed, 5, 19, p)
    key = [seed & ONES, seed >> 32]
    for row, column in ((0, 0), (0, 1), (3, 7), (4, 8), (2, 18)):
        word = int(dropout.philox((column // 8, row, 0, 0), key)[column % 8 // 2])
        assert bool(mask[row, column]) == ((word >> 16 * (column % 2)) & 0xFFFF >= round(p * 65536))


def test_any_part_of_the_mask_is_drawn_alike() -> None:
    """A kernel may draw any tile: a smaller mask is the corner of a larger one, also across chunks of the CPU path."""
    seed = torch.tensor(7)
    large = dropout.keep_mask(seed, 1500, 203, 0.5)
    assert torch.equal(dropout.keep_mask(seed, 33, 50, 0.5), large[:33, :50])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_dropped_is_p(p: float) -> None:
    """Within five standard deviations of the binomial, over all and in every one of the 8 lanes."""
    mask = dropout.keep_mask(torch.tensor(11), 1000, 512, p)
    for part in (mask, *(mask[:, lane::8] for lane in range(8))):
        deviation = (p * (1 - p) / part.numel()) ** 0.5
        assert abs(float((~part).double().mean()) - p) < 5 * deviation + 2**-16


def test_seeds_come_from_torchs_generator() -> None:
    """Checkpointing restores the generator's state and must get the same mask back."""
    torch.manual_seed(3)
    first, second = dropout.new_seed(torch.device("cpu")), dropout.new_seed(torch.device("cpu"))
    torch.manual_seed(3)
    assert torch.equal(first, dropout.new_seed(torch.device("cpu")))
    assert not torch.equal(first, second)


def test_dropped_infinity_is_zero() -> None:
    """0 times Inf would be NaN; a dropped element contributes nothing whatever it was."""
    x = torch.tensor([[float("inf"), 2.0]])
    assert dropout.apply_mask(x, torch.tensor([[False, True]]), 0.5).tolist() == [[0.0, 4.0]]


@pytest.mark.parametrize(
    ("options", "kept", "value"),
    [
        ({"shortcut": "input", "pre_num": -1}, 0, 1),
        ({"shortcut": "input", "pre_num": 3}, 0, 1),
        ({"shortcut": "middle", "pre_num": -1}, 0, 6),
        ({"shortcut": "middle", "pre_num": -1, "gates": "scalar"}, 2, 1),
        ({"shortcut": "middle", "pre_num": 2}, 1, 1),
    ],
)
def test_what_goes_to_the_next_layer(options: dict[str, Any], kept: int, value: float) -> None:
    handed, h = (torch.full((2, 1), 5.0), torch.full((2, 1), 7.0)), torch.ones(2, 1)
    before, own = carried(ResLoRAConfig(r=1, **options), handed, h)
    assert [id(each) for each in before] == [id(each) for each in handed[:kept]]
    assert torch.equal(own, torch.full((2, 1), value))
    assert carried(ResLoRAConfig(r=1, **options), handed, h.to("meta"))[1].device.type == "meta"

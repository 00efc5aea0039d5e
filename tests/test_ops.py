"""The functional core against plain PyTorch: exact on integers, else within twice its own error; all gradients.

Also on shapes, strides and stacks that hypothesis chooses, and under functorch's transforms.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jacrev, vmap

from reslora_kernels import ResLoRAConfig, apply_reslora, dropout
from reslora_kernels.ops import lora_linear
from reslora_kernels.ops.function import FEW_VALUES
from reslora_kernels.testing import assert_close_to_truth, max_error, relative_error

from .models import randomize

SEED = torch.tensor(2024)

# (id, M, K, N, ranks of A, ranks of B, hand, residual, bias, p): each size is there for the reason its id gives
SHAPES = [
    ("empty-batch", 0, 24, 8, (3,), (3,), None, False, True, 0.0),
    ("one-token-generation", 1, 257, 100, (8, 8), (8,), (8, 16), True, False, 0.0),
    ("everything-one", 3, 1, 1, (1,), (1,), None, False, True, 0.1),
    ("odd-rank-over-a-tile", 17, 100, 257, (17, 17), (17,), (17, 34), True, True, 0.1),
    ("rank-above-width", 17, 8, 24, (64,), (64,), (0, 64), False, True, 0.9),
    ("block-stack", 128, 257, 512, (16, 16, 16), (16, 16, 16), None, False, False, 0.0),
    ("middle-residual", 128, 512, 257, (3,), (3,), (0, 3), True, True, 0.1),
    ("largest-rank", 1000, 512, 100, (255,), (255,), None, True, False, 0.0),
]


def draw(case: tuple, integers: bool) -> dict[str, Tensor | list[Tensor] | None]:
    _, m, k, n, ranks_a, ranks_b, hand, residual, bias, _ = case
    generator = torch.Generator().manual_seed(m + k)

    def tensor(*shape: int, scale: float = 1.0) -> Tensor:
        if integers:
            return torch.randint(-2, 3, shape, generator=generator).double()
        return torch.randn(shape, generator=generator, dtype=torch.float64) * scale

    return {
        "x": tensor(m, k),
        "weight": tensor(n, k, scale=k**-0.5),
        "bias": tensor(n) if bias else None,
        "a": [tensor(r, k, scale=k**-0.5) for r in ranks_a],
        "b": [tensor(n, r, scale=r**-0.5) for r in ranks_b],
        "residual": tensor(m, sum(ranks_b)) if residual else None,
        "dy": tensor(m, n),
        "dh": tensor(m, hand[1] - hand[0]) if hand else None,
    }


def plain(v: dict, hand: tuple[int, int] | None, p: float, scaling: float, c: float) -> tuple[Tensor, Tensor | None]:
    """The three equations as anyone would write them."""
    x = v["x"]
    mask = dropout.keep_mask(SEED, *x.shape, p) if p else None
    h = (dropout.apply_mask(x, mask, p) if mask is not None else x) @ torch.cat(v["a"]).T
    b = torch.cat(v["b"], dim=1)
    u = c * h[:, : b.shape[1]]
    if v["residual"] is not None:
        u = u + v["residual"]
    y = torch.nn.functional.linear(x, v["weight"], v["bias"]) + scaling * (u @ b.T)
    return y, h[:, hand[0] : hand[1]] if hand else None


def run(function, values: dict, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs and every gradient. All inputs are leaves in ``dtype``."""

    def leaf(value):
        if value is None:
            return None
        return (
            [leaf(item) for item in value]
            if isinstance(value, list)
            else value.detach().to(dtype, copy=True).requires_grad_()
        )

    v = {name: leaf(value) for name, value in values.items() if name not in ("dy", "dh")}
    y, h = function(v)
    outputs, gradients = [y], [values["dy"].to(dtype)]
    if h is not None:
        outputs, gradients = [y, h], [*gradients, values["dh"].to(dtype)]
    torch.autograd.backward(outputs, gradients)
    results = {"y": y.detach()} | ({"h": h.detach()} if h is not None else {})
    for name, value in v.items():
        for i, item in enumerate(value if isinstance(value, list) else [value]):
            if item is not None:
                results[f"d{name}{i if isinstance(value, list) else ''}"] = item.grad
    return results


def ours(case: tuple, scaling: float, c: float):
    hand, p = case[6], case[9]
    return lambda v: lora_linear(
        v["x"], v["weight"], v["bias"], v["a"], v["b"], v["residual"],
        scaling=scaling, c=c, p=p, seed=SEED, hand=hand, backend="torch",
    )  # fmt: skip


@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case[0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_at_most_twice_plain_pytorchs(case: tuple, dtype: torch.dtype) -> None:
    values, c = draw(case, integers=False), 2.0 if case[0].startswith("o") else 1.0
    rounded = {  # the truth starts from the same rounded inputs
        name: value if value is None else [t.to(dtype).double() for t in value] if isinstance(value, list)
        else value.to(dtype).double()
        for name, value in values.items()
    }  # fmt: skip
    truth = run(lambda v: plain(v, case[6], case[9], 0.5, c), rounded, torch.float64)
    baseline = run(lambda v: plain(v, case[6], case[9], 0.5, c), rounded, dtype)
    actual = run(ours(case, 0.5, c), rounded, dtype)
    assert actual.keys() == truth.keys()
    for name in truth:
        assert_close_to_truth(actual[name], truth[name], baseline[name], f"{case[0]} {name}")


@pytest.mark.parametrize("case", [c for c in SHAPES if c[0] != "largest-rank"], ids=lambda case: case[0])
def test_integers_are_exact(case: tuple) -> None:
    """Small integers have exact float32 results; dropout keeps them so with p = 0.5."""
    case = (*case[:9], 0.5 if case[9] else 0.0)
    values = draw(case, integers=True)
    truth = run(lambda v: plain(v, case[6], case[9], 2.0, 1.0), values, torch.float64)
    actual = run(ours(case, 2.0, 1.0), values, torch.float32)
    for name in truth:
        assert torch.equal(actual[name].double(), truth[name]), name


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradcheck(p: float) -> None:
    """Numerical derivatives in float64 of both outputs by every input."""
    case = ("gradcheck", 3, 5, 4, (2, 3), (2,), (2, 5), True, True, p)
    values = draw(case, integers=False)
    leaves = [values["x"], values["weight"], values["bias"], *values["a"], *values["b"], values["residual"]]

    def function(x, weight, bias, a0, a1, b0, residual):
        return lora_linear(
            x, weight, bias, [a0, a1], [b0], residual, scaling=0.7, c=2.0, p=p, seed=SEED, hand=(2, 5), backend="torch"
        )

    assert torch.autograd.gradcheck(function, [leaf.requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("layout", ["contiguous", "permuted", "sliced", "empty"])
def test_opcheck(layout: str) -> None:
    """Schema, fake tensors, autograd registration and compiled dispatch of both ops."""
    m = 0 if layout == "empty" else 6
    x = {
        "permuted": torch.randn(10, m).T,
        "sliced": torch.randn(2 * m, 12)[::2, 1:11],
    }.get(layout, torch.randn(m, 10))
    weight = torch.randn(10, 7).T if layout == "permuted" else torch.randn(7, 10)
    a, b, residual, seed = torch.randn(4, 10), torch.randn(7, 2), torch.randn(m, 2), torch.tensor(5)
    ops = torch.ops.reslora_kernels
    forward = (x, weight, torch.randn(7), a, b, residual, seed, 2.0, 0.5, 0.1, 2, 4, "torch")
    torch.library.opcheck(ops.lora_linear_forward.default, forward)
    one_or_all = (
        [(True,) * 4] if layout != "contiguous" else [(True,) * 4, *(tuple(i == j for j in range(4)) for i in range(4))]
    )
    for needs in one_or_all:
        arguments = (torch.randn(m, 7), torch.randn(m, 2), x, weight, a, b, torch.randn(m, 2), seed)
        torch.library.opcheck(ops.lora_linear_backward.default, (*arguments, 2.0, 0.5, 0.1, 2, *needs, "torch"))


@pytest.mark.parametrize("needed", ["x", "weight", "bias", "a", "b", "residual"])
def test_only_what_needs_a_gradient_gets_one(needed: str) -> None:
    case = ("one", 5, 6, 7, (2, 2), (2,), (2, 4), True, True, 0.0)
    values = draw(case, integers=False)
    everything = run(ours(case, 0.5, 1.0), values, torch.float64)
    chosen = values[needed] if isinstance(values[needed], list) else [values[needed]]
    for tensor in chosen:
        tensor.requires_grad_()
    y, h = ours(case, 0.5, 1.0)(values)
    outputs = [(t, values[d]) for t, d in ((y, "dy"), (h, "dh")) if t.requires_grad]
    torch.autograd.backward(*map(list, zip(*outputs, strict=True)))
    for i, tensor in enumerate(chosen):
        name = f"d{needed}{i if isinstance(values[needed], list) else ''}"
        assert torch.equal(tensor.grad, everything[name]), name


def test_mixed_dtypes_without_a_cast_copy_of_x() -> None:
    """bfloat16 x and weight, float32 adapters: gradients in each parameter's dtype, saved tensors in bfloat16."""
    x = torch.randn(64, 96, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(48, 96, dtype=torch.bfloat16)
    a, b = torch.randn(8, 96, requires_grad=True), torch.randn(48, 8, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y, _ = lora_linear(x, weight, None, [a], [b], scaling=1.0)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, a.grad.dtype, b.grad.dtype) == (
        torch.bfloat16, torch.bfloat16, torch.float32, torch.float32,
    )  # fmt: skip
    own = {t.data_ptr() for t in (x, weight, a, b)}
    extra = [t for t in saved if t.data_ptr() not in own]
    assert [(tuple(t.shape), t.dtype) for t in extra] == [((64, 8), torch.bfloat16)]


def test_autocast_computes_in_its_dtype() -> None:
    x, weight, bias = torch.randn(5, 16), torch.randn(8, 16), torch.randn(8)
    a, b = torch.randn(4, 16, requires_grad=True), torch.randn(8, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = lora_linear(x, weight, bias, [a], [b], scaling=1.0)
    low, _ = lora_linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), [a.detach()], [b], scaling=1.0)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, low)
    y.sum().backward()
    assert a.grad.dtype == torch.float32


def test_nan_and_inf_in_x_come_out_where_they_belong() -> None:
    x = torch.randn(4, 8)
    x[1, 2], x[2, 3] = float("nan"), float("inf")
    y, h = lora_linear(x, torch.randn(6, 8), None, [torch.randn(2, 8)], [torch.randn(6, 2)], scaling=1.0, hand=(0, 2))
    assert torch.isfinite(y[[0, 3]]).all() and not torch.isfinite(y[1]).any() and not torch.isfinite(y[2]).any()
    assert torch.isnan(h[1]).all()


def test_leading_dimensions() -> None:
    """1-, 2-, 3- and 4-dimensional x give the same numbers."""
    x, weight, a, b = torch.randn(2, 3, 4, 8), torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)
    flat, handed = lora_linear(x.reshape(24, 8), weight, None, [a], [b], scaling=1.0, hand=(0, 2))
    for shape in ((2, 3, 4), (6, 4)):
        y, h = lora_linear(x.reshape(*shape, 8), weight, None, [a], [b], scaling=1.0, hand=(0, 2))
        assert torch.equal(y, flat.reshape(*shape, 6)) and torch.equal(h, handed.reshape(*shape, 2))
    y, _ = lora_linear(x[0, 0, 0], weight, None, [a], [b], scaling=1.0)
    assert y.shape == (6,)
    torch.testing.assert_close(y, flat[0])


def test_second_derivative_of_the_fused_form_is_refused() -> None:
    """What is so small that it is made of PyTorch's own operations has one."""
    a, b, weight = torch.randn(1, 4), torch.randn(2, 1), torch.randn(2, 4)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    matrices = [t.double() for t in (weight, a, b)]
    assert torch.autograd.gradgradcheck(
        lambda x: lora_linear(x, matrices[0], None, matrices[1:2], matrices[2:], scaling=1.0)[0].square(), x
    )
    x = torch.randn(FEW_VALUES, 4, requires_grad=True)
    y, _ = lora_linear(x, weight, None, [a], [b], scaling=1.0)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


SIZES = st.integers(1, 19)
LAYOUTS = st.sampled_from(["contiguous", "transposed", "every other", "offset"])


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values in other memory."""
    if layout == "transposed":
        return values.transpose(-2, -1).contiguous().transpose(-2, -1)
    if layout == "every other":
        *outer, rows, columns = values.shape
        wide = values.new_zeros(*outer, 2 * rows, columns)
        wide[..., ::2, :] = values
        return wide[..., ::2, :]
    if layout == "offset":
        wide = values.new_zeros(*values.shape[:-1], values.shape[-1] + 1)
        wide[..., 1:] = values
        return wide[..., 1:]
    return values


@settings(deadline=None, max_examples=150)
@given(
    leading=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    k=SIZES,
    n=SIZES,
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    layouts=st.tuples(LAYOUTS, LAYOUTS, LAYOUTS),
    p=st.sampled_from([0.0, 0.4]),
    c=st.sampled_from([1.0, 2.0]),
    with_bias=st.booleans(),
    with_residual=st.booleans(),
    ahead=st.integers(0, 4),
    seed=st.integers(0, 2**62),
)
def test_any_shape_equals_plain_pytorch(
    leading: list[int], k: int, n: int, ranks: list[int], layouts: tuple[str, str, str], p: float, c: float,
    with_bias: bool, with_residual: bool, ahead: int, seed: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed % 1000)

    def draw(*shape: int, layout: str = "contiguous") -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return laid_out(values, layout).detach().requires_grad_()

    x = draw(*leading, k, layout=layouts[0]) if len(leading) > 1 or leading[0] else draw(*leading, k)
    weight = draw(n, k, layout=layouts[1])
    b_stack = [draw(n, r, layout=layouts[2]) for r in ranks]
    a_stack = [draw(r, k, layout=layouts[2]) for r in ranks] + ([draw(ahead, k)] if ahead else [])
    bias = draw(n) if with_bias else None
    residual = draw(*leading, sum(ranks)) if with_residual else None
    hand = (sum(ranks), sum(ranks) + ahead) if ahead else None
    seed_tensor = torch.tensor(seed)
    y, h = lora_linear(
        x, weight, bias, a_stack, b_stack, residual, scaling=0.5, c=c, p=p, seed=seed_tensor, hand=hand, backend="torch"
    )
    inputs = [t for t in (x, weight, bias, residual, *a_stack, *b_stack) if t is not None]
    outputs, upstream = [y], [torch.randn(y.shape, generator=generator, dtype=torch.float64)]
    if h is not None:
        outputs, upstream = [y, h], [*upstream, torch.randn(h.shape, generator=generator, dtype=torch.float64)]
    gradients = torch.autograd.grad(outputs, inputs, upstream)

    mask = dropout.keep_mask(seed_tensor, x.shape[:-1].numel(), k, p).reshape(x.shape) if p else None
    every_h = (dropout.apply_mask(x, mask, p) if mask is not None else x) @ torch.cat(a_stack).T
    u = c * every_h[..., : sum(ranks)] + (residual if residual is not None else 0)
    plain = [torch.nn.functional.linear(x, weight, bias) + 0.5 * u @ torch.cat(b_stack, dim=1).T]
    if hand is not None:
        plain.append(every_h[..., hand[0] : hand[1]])
    expected = torch.autograd.grad(plain, inputs, upstream)
    for actual, truth in zip((*outputs, *gradients), (*plain, *expected), strict=True):
        assert actual.shape == truth.shape
        assert relative_error(actual, truth) < 1e-13


SHORTCUTS = [("input", 1), ("block", 2), ("middle", 2)]


class Blocks(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(6, 6, bias=bias, dtype=torch.float64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return x


def blocks(shortcut: str, pre_num: int, bias: bool = True, p: float = 0.0) -> nn.Module:
    config = ResLoRAConfig(r=2, lora_alpha=6, shortcut=shortcut, pre_num=pre_num, lora_dropout=p)
    return randomize(apply_reslora(Blocks(bias), config))


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("shortcut", "pre_num"), SHORTCUTS)
@pytest.mark.filterwarnings("error::UserWarning")
class TestTransforms:
    def test_gradients_of_each_sample(self, shortcut: str, pre_num: int) -> None:
        model, x = blocks(shortcut, pre_num), torch.randn(4, 3, 6, dtype=torch.float64)

        def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
            return functional_call(model, parameters, (sample,)).square().sum()

        found = vmap(grad(loss), in_dims=(None, 0))(trained(model), x)
        for i, sample in enumerate(x):
            alone = torch.autograd.grad(
                model(sample).square().sum(), [p for p in model.parameters() if p.requires_grad]
            )
            for name, wanted in zip(found, alone, strict=True):
                assert max_error(found[name][i], wanted) < 1e-12

    @pytest.mark.parametrize("kind", ["lora_A", "lora_B"])
    def test_an_ensemble_of_adapters_on_one_input(self, shortcut: str, pre_num: int, kind: str) -> None:
        model, x = blocks(shortcut, pre_num, bias=False), torch.randn(3, 6, dtype=torch.float64)
        several = {name: torch.stack([p, -2 * p]) for name, p in trained(model).items() if kind in name}
        found = vmap(lambda parameters: functional_call(model, parameters, (x,)))(several)
        for i in range(2):
            wanted = functional_call(model, {name: p[i] for name, p in several.items()}, (x,))
            assert max_error(found[i], wanted) < 1e-13

    def test_jacobians(self, shortcut: str, pre_num: int) -> None:
        model, x = blocks(shortcut, pre_num), torch.randn(2, 6, dtype=torch.float64)
        wanted = torch.autograd.functional.jacobian(model, x)
        for transform in (jacrev, jacfwd):
            assert max_error(transform(model)(x), wanted) < 1e-12

    def test_dropout_draws_as_vmap_is_told(self, shortcut: str, pre_num: int) -> None:
        model = blocks(shortcut, pre_num, p=0.5).train()
        x = torch.randn(1, 3, 6, dtype=torch.float64).expand(2, 3, 6)
        one, two = vmap(model, randomness="same")(x)
        assert torch.equal(one, two)
        one, two = vmap(model, randomness="different")(x)
        assert not torch.equal(one, two)

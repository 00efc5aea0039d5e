"""The functional core on shapes, strides and stacks that hypothesis chooses, against plain PyTorch in float64."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reslora_kernels import dropout
from reslora_kernels.ops import lora_linear
from reslora_kernels.testing import relative_error

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

"""The functional core: one frozen matmul with a rank-r side channel, as two torch.library ops and an autograd Function.

    h = D(x) A_catᵀ        u = c h[:, :R_b] + residual        y = x Wᵀ + b + s u B_catᵀ

With no A at all u is the residual: a layer whose input another one has projected for it.

Nothing here knows what a layer or a chain is; ``shortcuts`` says which stacks make which method of the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backends import select
from .backends import torch as plain
from .forward_state import refuse_recomputation

_FORWARD = "reslora_kernels::lora_linear_forward"
_BACKWARD = "reslora_kernels::lora_linear_backward"
_is_exporting = getattr(torch.compiler, "is_exporting", torch.onnx.is_in_onnx_export)  # the former from PyTorch 2.7 on

torch.library.define(
    _FORWARD,
    "(Tensor x, Tensor weight, Tensor? bias, Tensor a_cat, Tensor b_cat, Tensor? residual, Tensor? seed, float c, "
    "float scaling, float p, int hand_start, int hand_stop, str backend) -> (Tensor y, Tensor handed, Tensor u)",
)
torch.library.define(
    _BACKWARD,
    "(Tensor dy, Tensor? dhanded, Tensor x, Tensor weight, Tensor a_cat, Tensor b_cat, Tensor u, Tensor? seed, "
    "float c, float scaling, float p, int hand_start, bool need_dx, bool need_da, bool need_db, bool need_dresidual, "
    "str backend) -> (Tensor dx, Tensor da_cat, Tensor db_cat, Tensor dresidual)",
)


@torch.library.impl(_FORWARD, "CompositeExplicitAutograd")
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, a_cat: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *arguments, backend = rest
    b_cat, residual, *_, hand_start, hand_stop = arguments
    if residual is not None or hand_stop > hand_start:
        refuse_recomputation()
    served_by = select.choose(backend, x, weight, a_cat.shape[0] or b_cat.shape[1])
    outputs: tuple[Tensor, Tensor, Tensor] = served_by.forward(x, weight, bias, a_cat, *arguments)
    return outputs


@torch.library.register_fake(_FORWARD)  # type: ignore[untyped-decorator]
def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, a_cat: Tensor, b_cat: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *_, hand_start, hand_stop, _backend = rest
    rows = x.shape[0]
    return (
        x.new_empty(rows, weight.shape[0]),
        x.new_empty(rows, hand_stop - hand_start),
        x.new_empty(rows if a_cat.shape[0] else 0, b_cat.shape[1]),
    )


@torch.library.impl(_BACKWARD, "CompositeExplicitAutograd")
def _backward(
    dy: Tensor, dhanded: Tensor | None, x: Tensor, weight: Tensor, a_cat: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *arguments, backend = rest
    served_by = select.choose(backend, dy, weight, a_cat.shape[0] or arguments[0].shape[1])
    gradients: tuple[Tensor, Tensor, Tensor, Tensor] = served_by.backward(dy, dhanded, x, weight, a_cat, *arguments)
    return gradients


@torch.library.register_fake(_BACKWARD)  # type: ignore[untyped-decorator]
def _backward_fake(
    dy: Tensor, dhanded: Tensor | None, x: Tensor, weight: Tensor, a_cat: Tensor, b_cat: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, need_dx, need_da, need_db, need_dresidual, _backend = rest
    rows = dy.shape[0]
    return (
        dy.new_empty(rows, a_cat.shape[1]) if need_dx else dy.new_empty(0),
        torch.empty_like(a_cat, memory_format=torch.contiguous_format) if need_da else a_cat.new_empty(0),
        torch.empty_like(b_cat, memory_format=torch.contiguous_format) if need_db else b_cat.new_empty(0),
        dy.new_empty(rows, b_cat.shape[1]) if need_dresidual else dy.new_empty(0),
    )


@runtime_checkable
class PackedWeight(Protocol):
    """A frozen weight [N, K] that is held in another form and unpacked for each pass, which does not keep it."""

    @property
    def shape(self) -> torch.Size: ...
    @property
    def device(self) -> torch.device: ...
    def unpacked(self, dtype: torch.dtype) -> Tensor: ...


class _LoRALinear(torch.autograd.Function):
    """Saves x and u only where a gradient needs them, and the stacks as the parameters they are, not as copies."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        # One starred parameter: without gradients torch.compile tells by their number whether there is a ctx.
        x, weight, bias, residual, seed, c, scaling, p, hand, backend, depth, *stacks = arguments
        a_stack, b_stack = stacks[:depth], stacks[depth:]
        ctx.packed = None if isinstance(weight, Tensor) else weight
        weight = weight if ctx.packed is None else ctx.packed.unpacked(x.dtype)
        y, handed, u = torch.ops.reslora_kernels.lora_linear_forward(
            _tokens(x), weight, bias, _rows(a_stack, weight), _columns(b_stack),
            None if residual is None else _tokens(residual), seed, c, scaling, p, *hand, backend,
        )  # fmt: skip
        if not a_stack:
            u = _tokens(residual).to(x.dtype)
        needs = ctx.needs_input_grad[-len(stacks) :]
        ctx.need_da, ctx.need_db = any(needs[:depth]), any(needs[depth:])
        kept_x = x if ctx.need_da or ctx.needs_input_grad[1] else None
        ctx.save_for_backward(kept_x, weight if ctx.packed is None else None, u if ctx.need_db else None, seed, *stacks)
        ctx.set_materialize_grads(False)
        ctx.leading, ctx.dtype = x.shape[:-1], x.dtype
        ctx.scalars, ctx.hand_start, ctx.backend, ctx.depth = (c, scaling, p), hand[0], backend, depth
        # y is shaped here and not by a view afterwards, on which FSDP2 could not count for its hooks; and as no view of
        # the op's output, or autograd refuses to change it in place (nn.ReLU(inplace=True)).
        return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[1]]), handed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dhanded: Tensor | None) -> tuple[Any, ...]:
        x, weight, u, seed, *stacks = ctx.saved_tensors
        a_stack, b_stack = stacks[: ctx.depth], stacks[ctx.depth :]
        if dy is None and dhanded is None:
            return (None,) * len(ctx.needs_input_grad)
        weight = weight if ctx.packed is None else ctx.packed.unpacked(ctx.dtype)
        if dy is None:
            assert dhanded is not None
            dy = dhanded.new_zeros(*ctx.leading, weight.shape[0])
        dy, leading = _tokens(dy), ctx.leading
        x = dy.new_empty(0) if x is None else _tokens(x)
        need_dx, need_dweight, need_dbias, need_dresidual = ctx.needs_input_grad[:4]
        dx, da_cat, db_cat, dresidual = torch.ops.reslora_kernels.lora_linear_backward(
            dy, dhanded, x, weight, _rows(a_stack, weight), _columns(b_stack),
            dy.new_empty(0) if u is None else u, seed, *ctx.scalars, ctx.hand_start,
            need_dx, ctx.need_da, ctx.need_db, need_dresidual, ctx.backend,
        )  # fmt: skip
        das = da_cat.split([a.shape[0] for a in a_stack]) if ctx.need_da else [None] * len(a_stack)
        dbs = db_cat.split([b.shape[1] for b in b_stack], dim=1) if ctx.need_db else [None] * len(b_stack)
        return (
            dx.view(*leading, dx.shape[1]) if need_dx else None,
            dy.T @ x if need_dweight else None,
            dy.sum(0) if need_dbias else None,
            dresidual.view(*leading, dresidual.shape[1]) if need_dresidual else None,
            *(None,) * 7,
            *das,
            *dbs,
        )


def lora_linear(
    x: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None,
    a_stack: Sequence[Tensor],
    b_stack: Sequence[Tensor],
    residual: Tensor | None = None,
    *,
    scaling: float,
    c: float = 1.0,
    p: float = 0.0,
    seed: Tensor | None = None,
    hand: tuple[int, int] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """y = x Wᵀ + b + s u B_catᵀ, with h = D(x) A_catᵀ and u = c h[:, :R_b] + residual; differentiable once.

    Under autocast x, weight, bias and residual are taken in autocast's dtype, as ``F.linear`` would.

    Args:
        x: [..., K], any leading dimensions, M their product.
        weight: [N, K] in x's dtype; usually frozen, and then no gradient is computed for it. A ``PackedWeight`` is
            unpacked in x's dtype, once in forward and once in backward, and not saved.
        bias: [N] or None.
        a_stack: matrices [r_i, K] whose rows, stacked, are A_cat [R_a, K]; any floating dtype, need not be x's. None of
            them: u is ``residual``, which must be given then.
        b_stack: matrices [N, r_j] whose columns, stacked, are B_cat [N, R_b], R_b <= R_a.
        residual: [..., R_b] with x's leading dimensions, or None.
        scaling: s.
        c: factor on the own part of u.
        p: dropout probability in [0, 1); above 0 it needs ``seed``, an int64 tensor [] on x's device.
        hand: (start, stop) columns of h to return for later layers, or None.
        backend: "auto", "torch", "triton" or "cuda".

    Returns:
        y [..., N] and the handed-on part of h [..., stop - start] (None when ``hand`` is None).

    Raises:
        TypeError: an argument has the wrong type; the message names it.
        ValueError: a shape, dtype, device or scalar is not as above, or not one that ``backend`` serves; the message
            names it.
        RuntimeError: ``backend`` cannot run on this machine.
    """
    _check_types(x, weight, bias, a_stack, b_stack, residual, scaling, c, p, seed, hand, backend)
    device_type = x.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        x, bias, residual = (_autocast(t, dtype) for t in (x, bias, residual))  # type: ignore[assignment]
        weight = _autocast(weight, dtype) if isinstance(weight, Tensor) else weight  # type: ignore[assignment]
        with torch.autocast(device_type, enabled=False):
            return lora_linear(
                x, weight, bias, a_stack, b_stack, residual,
                scaling=scaling, c=c, p=p, seed=seed, hand=hand, backend=backend,
            )  # fmt: skip
    _check(x, weight, bias, a_stack, b_stack, residual, p, seed, hand)
    if _is_exporting() or torch.jit.is_tracing():
        return _exported(x, weight, bias, a_stack, b_stack, residual, seed if p > 0 else None, c, scaling, p, hand)
    y, handed = _LoRALinear.apply(  # type: ignore[no-untyped-call]
        x,
        weight,
        bias,
        residual,
        seed if p > 0 else None,
        float(c),
        float(scaling),
        float(p),
        hand or (0, 0),
        backend,
        len(a_stack),
        *a_stack,
        *b_stack,
    )
    return y, handed.reshape(*x.shape[:-1], handed.shape[1]) if hand else None


def _exported(
    x: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None,
    a_stack: Sequence[Tensor],
    b_stack: Sequence[Tensor],
    residual: Tensor | None,
    *scalars: Any,
) -> tuple[Tensor, Tensor | None]:
    """The same in operations that every PyTorch and ONNX knows, for a graph that runs without this package."""
    *seed_to_p, hand = scalars
    weight = weight if isinstance(weight, Tensor) else weight.unpacked(x.dtype)
    y, handed, _ = plain.forward(
        _tokens(x), weight, bias, _rows(a_stack, weight), _columns(b_stack),
        None if residual is None else _tokens(residual), *seed_to_p, *(hand or (0, 0)),
    )  # fmt: skip
    shape = x.shape[:-1]
    return y.reshape(*shape, y.shape[1]), handed.reshape(*shape, handed.shape[1]) if hand else None


def _tokens(x: Tensor) -> Tensor:
    """[..., K] as [M, K]; reshape cannot tell M of an empty tensor, and Size.numel loses a dynamic length."""
    return x if x.dim() == 2 else x.reshape(prod(x.shape[:-1]), x.shape[-1])


def _rows(stack: Sequence[Tensor], weight: Tensor) -> Tensor:
    if not stack:
        return weight.new_empty(0, weight.shape[1])
    return stack[0] if len(stack) == 1 else torch.cat(list(stack))


def _columns(stack: Sequence[Tensor]) -> Tensor:
    return stack[0] if len(stack) == 1 else torch.cat(list(stack), dim=1)


def _autocast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if tensor is None or tensor.dtype == torch.float64 or not tensor.is_floating_point():
        return tensor
    return tensor.to(dtype)


def _check_types(
    x: Any,
    weight: Any,
    bias: Any,
    a_stack: Any,
    b_stack: Any,
    residual: Any,
    scaling: Any,
    c: Any,
    p: Any,
    seed: Any,
    hand: Any,
    backend: Any,
) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor, got {type(x).__name__}")
    if not isinstance(weight, (Tensor, PackedWeight)):
        raise TypeError(f"weight must be a Tensor, got {type(weight).__name__}")
    for name, tensor in (("bias", bias), ("residual", residual), ("seed", seed)):
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor or None, got {type(tensor).__name__}")
    for name, stack in (("a_stack", a_stack), ("b_stack", b_stack)):
        if not isinstance(stack, (list, tuple)) or not all(isinstance(matrix, Tensor) for matrix in stack):
            raise TypeError(f"{name} must be a list or tuple of Tensors, got {type(stack).__name__}")
    for name, number in (("scaling", scaling), ("c", c), ("p", p)):
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError(f"{name} must be a number, got {number!r}")
    if hand is not None and not (
        isinstance(hand, (list, tuple)) and len(hand) == 2 and all(isinstance(at, int) for at in hand)
    ):
        raise TypeError(f"hand must be two ints (start, stop) or None, got {hand!r}")
    if backend not in ("auto", *select.PREFERENCE):
        raise ValueError(f"backend must be one of 'auto', {', '.join(map(repr, select.PREFERENCE))}, got {backend!r}")


def _check(
    x: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None,
    a_stack: Sequence[Tensor],
    b_stack: Sequence[Tensor],
    residual: Tensor | None,
    p: float,
    seed: Tensor | None,
    hand: tuple[int, int] | None,
) -> None:
    if x.dim() < 1 or len(weight.shape) != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x must be [..., K] and weight [N, K] with the same K, got x {list(x.shape)}, weight {list(weight.shape)}"
        )
    dtype = weight.dtype if isinstance(weight, Tensor) else x.dtype
    if not x.is_floating_point() or x.dtype != dtype:
        raise ValueError(f"x must have weight's floating dtype {dtype}, got {x.dtype}")
    n, k = weight.shape
    if not b_stack or (not a_stack and residual is None):
        counts = f"{len(a_stack)} and {len(b_stack)} matrices"
        raise ValueError(f"a_stack and b_stack must not be empty, got {counts}; only with a residual can a_stack be")
    for name, stack, axis, size in (("a_stack", a_stack, 1, k), ("b_stack", b_stack, 0, n)):
        for matrix in stack:
            if matrix.dim() != 2 or matrix.shape[axis] != size or not matrix.is_floating_point():
                expected = f"[r, {k}]" if axis else f"[{n}, r]"
                raise ValueError(
                    f"{name} must hold floating matrices {expected}, got {list(matrix.shape)} of {matrix.dtype}"
                )
    r_a, r_b = sum(a.shape[0] for a in a_stack), sum(b.shape[1] for b in b_stack)
    if r_b > r_a and a_stack:
        raise ValueError(f"b_stack's total rank must not exceed a_stack's, got {r_b} and {r_a}")
    if bias is not None and (bias.shape != (n,) or bias.dtype != x.dtype):
        raise ValueError(f"bias must be [{n}] of {x.dtype}, got {list(bias.shape)} of {bias.dtype}")
    if residual is not None and residual.shape != (*x.shape[:-1], r_b):
        raise ValueError(f"residual must be {[*x.shape[:-1], r_b]}, got {list(residual.shape)}")
    if not 0 <= p < 1:
        raise ValueError(f"p must be a probability with 0 <= p < 1, got {p}")
    if p > 0 and (seed is None or seed.dtype != torch.int64 or seed.numel() != 1):
        raise ValueError(f"seed must be an int64 tensor with one element when p > 0, got {seed!r}")
    if hand is not None and not 0 <= hand[0] < hand[1] <= r_a:
        raise ValueError(f"hand must be (start, stop) with 0 <= start < stop <= {r_a}, got {hand}")
    for name, tensor in (("weight", weight), ("bias", bias), ("residual", residual), ("seed", seed if p > 0 else None)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")
    for name, stack in (("a_stack", a_stack), ("b_stack", b_stack)):
        if any(matrix.device != x.device for matrix in stack):
            raise ValueError(f"{name} must be on x's device {x.device}, got {[str(m.device) for m in stack]}")

"""The functional core: one frozen matmul with a rank-r side channel, differentiable once.

    h = D(x) A_catᵀ        u = c h[:, :R_b] + residual        y = x Wᵀ + b + s u B_catᵀ

With no A at all u is the residual: a layer whose input another one has projected for it.

Nothing here knows what a layer or a chain is; ``layers.shortcuts`` says which stacks make which method of the paper.
``lora_linear`` is the public function. An eager call goes from it through one autograd Function to its backend; the
torch.library ops of ``registered`` serve the callers that need them.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..side_channel import SideChannel
from .arguments import Operands, PackedWeight, check_types
from .function import fused_linear

__all__ = ["Operands", "PackedWeight", "fused_linear", "lora_linear"]


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

    Under functorch's transforms (vmap, grad, jvp) it is plain operations, whatever the backend; so are small calls of
    the torch backend, which are as often differentiable as those.

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
    check_types(x, weight, bias, a_stack, b_stack, residual, scaling, c, p, seed, hand, backend)
    side = SideChannel(float(c), float(scaling), *(hand or (0, 0)))
    operands = Operands(x, weight, bias, residual, seed if p > 0 else None, a_stack, b_stack)
    y, handed = fused_linear(operands, side, p, backend)
    return y, handed

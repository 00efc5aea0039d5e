"""A call in plain operations, none of them in place: what functorch's vmap, grad, jvp and jacrev can take apart.

No backend is asked: their kernels and in-place writes have no rules for batched tensors and dual numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dropout import Dropout, drop
from ..side_channel import SideChannel
from .arguments import Operands


def forward(operands: Operands, side: SideChannel, p: float) -> tuple[Tensor, Tensor | None]:
    """y [..., N] and h[..., hand_start:hand_stop] or None, as ``ops.lora_linear`` has them; the weight is dense."""
    x, weight, bias, residual, seed, a_stack, b_stack = operands
    dropout = None if seed is None else Dropout(seed, p)
    b = torch.cat([part.to(x.dtype) for part in b_stack], 1)
    u, handed = None if residual is None else residual.to(x.dtype), None
    if a_stack:
        dropped = x if dropout is None else drop(x.reshape(-1, x.shape[-1]), dropout).reshape(x.shape)
        h = F.linear(dropped, torch.cat([part.to(x.dtype) for part in a_stack]))
        own = h[..., : b.shape[1]] * side.c
        u = own if u is None else own + u
        handed = h[..., side.hand_start : side.hand_stop] if side.hands_on else None
    assert u is not None
    return F.linear(x, weight, bias) + side.scaling * F.linear(u, b), handed

"""DoRA (Liu et al., arXiv 2402.09353): the direction of a weight's rows is adapted, their length is learnt apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def row_norms(weight: Tensor, a: Tensor, b: Tensor, scaling: float, group: Any = None) -> Tensor:
    """‖W + s B A‖ of each row [N] in float32 or better, without forming B A or a wider copy of W.

    ‖w + s b A‖² = ‖w‖² + 2 s (w Aᵀ)·b + s² b (A Aᵀ)·b for a row w of W [N, K] and b of B [N, r]. All three are sums
    over the columns of W and A, of which each process of ``group`` may hold its own.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    a, b = a.to(wide), b.to(wide) * scaling
    squared: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=wide).square()
    cross = (weight @ a.to(weight.dtype).T).to(wide)
    squared = squared + ((2 * cross + b @ (a @ a.T)) * b).sum(1)
    if group is not None:
        torch.distributed.all_reduce(squared, group=group)
    return squared.clamp_min(torch.finfo(wide).tiny).sqrt()

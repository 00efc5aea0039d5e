"""How A and B start, some from the frozen weight, and the lengths of the adapted rows that DoRA starts from."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ResLoRAConfig


@torch.no_grad()
def fill(config: ResLoRAConfig, lora_A: Tensor, lora_B: Tensor) -> None:
    """A random start: A [r, K] by ``config.init_lora_weights``, B [N, r] zero."""
    if config.init_lora_weights == "gaussian":
        nn.init.normal_(lora_A, std=1 / config.r)
    else:
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
    nn.init.zeros_(lora_B)


@torch.no_grad()
def from_weight(config: ResLoRAConfig, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A [r, K] and B [N, r] with s B A the principal part of W [N, K] ("pissa"), or of its QR decomposition ("olora").

    PiSSA (arXiv 2404.02948), Eqs. 2 to 4: A = (Σ/s)^½ Vᵀ, B = U (Σ/s)^½ with the r largest singular values Σ. OLoRA
    (arXiv 2406.01775), Algorithm 1: W = Q R, B = Q[:, :r], A = R[:r]. Float32, or float64 for such a weight.

    Raises:
        ValueError: the weight has no values (it is on the meta device), holds NaN or Inf, or is smaller than the rank.
    """
    r, how = config.r, str(config.init_lora_weights)
    if weight.is_meta:
        raise ValueError(f"init_lora_weights={how!r} starts from the weight, which is on the meta device")
    if min(weight.shape) < r:
        raise ValueError(f"init_lora_weights={how!r} needs r of at most {min(weight.shape)} here, got r={r}")
    w = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    if not torch.isfinite(w).all():
        raise ValueError(f"init_lora_weights={how!r} starts from the weight, which holds NaN or Inf")
    if how == "olora":
        q, upper = torch.linalg.qr(w)
        return upper[:r], q[:, :r]
    if how == "pissa":
        u, sizes, v = torch.linalg.svd(w, full_matrices=False)
        u, sizes, v = u[:, :r], sizes[:r], v[:r]
    else:
        u, sizes, v = torch.svd_lowrank(w, r, niter=int(how.rpartition("_")[2]))
        v = v.T
    root = (sizes / config.scaling).sqrt()
    return root[:, None] * v, u * root


@torch.no_grad()
def row_norms(weight: Tensor, a: Tensor, b: Tensor, scaling: float, group: Any = None) -> Tensor:
    """‖W + s B A‖ of each row [N] in float32 or better, without forming B A or a wider copy of W.

    DoRA (Liu et al., arXiv 2402.09353) adapts the direction of these rows by B A and learns their length apart.

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

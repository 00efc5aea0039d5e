"""How A and B start, and the start that is taken off again where they start from the frozen weight."""

from __future__ import annotations

import math

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

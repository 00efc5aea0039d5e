"""How A and B start, some from the frozen weight, and the lengths of the adapted rows that DoRA starts from."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ResLoRAConfig


@torch.no_grad()
def fill(config: ResLoRAConfig, lora_A: Tensor, lora_B: Tensor) -> None:
    """A random start: A [r, K] by ``config.init_lora_weights``, B [N, r] zero, or both random with B A = 0."""
    if config.init_lora_weights == "orthogonal":
        a, b = _orthogonal(config.r, lora_A.shape[1], len(lora_B))
        lora_A.copy_(a)
        lora_B.copy_(b)
        return
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


def _orthogonal(r: int, k: int, n: int) -> tuple[Tensor, Tensor]:
    """A [r, K] and B [N, r] that meet in no direction, as PEFT draws them: A = Q₀ᵀ X / 10, B = Y Q₁ / 10.

    Q₀ and Q₁ [r/2, r] are the even and the odd rows of an orthogonal matrix; X [r/2, K] and Y [N, r/2] are normal.
    """
    q = torch.linalg.qr(torch.randn(r, r))[0]
    x = torch.randn(k, r // 2)
    y = torch.randn(r // 2, n)
    return (x @ q[0::2]).T / 10, y.T @ q[1::2] / 10


@torch.no_grad()
def eva(r: int, count: int, total: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """A [r, K]: the r directions in which the inputs vary most (EVA, arXiv 2410.07170, Section 3.2). B is zero.

    Args:
        count: of inputs x; ``total`` [K] is their sum, ``gram`` [K, K] the sum of x xᵀ.

    Returns:
        A, and the share [r] of the inputs' variance along each direction, largest first.
    """
    mean = total.double() / count
    covariance = gram.double() - count * torch.outer(mean, mean)
    variances, columns = torch.linalg.eigh(covariance)
    directions = columns.T.flip(0)[:r]
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    shares: Tensor = variances.flip(0)[:r] / covariance.trace()
    return directions * largest.sign(), shares  # an eigenvector has no sign: its largest entry is positive


@torch.no_grad()
def corda(config: ResLoRAConfig, weight: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """A [r, K] and B [N, r] from W C = U Σ Vᵀ, C [K, K] of the inputs (CorDA, arXiv 2406.05223, Section 3).

    s B A = U_r Σ_r (Vᵀ C⁻¹)_r, of the r largest Σ ("corda", instruction-previewed) or the r smallest ("corda_kpm",
    knowledge-preserved). C is damped by a share of its mean diagonal, 1 % or as much more as its inverse needs.
    """
    w, c = weight.float(), covariance.float()
    unit, share = torch.eye(len(c), device=c.device), 0.01
    while True:
        damped = c + share * c.diagonal().mean() * unit
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, unit) < 0.05:
            break
        share *= 2
        if not math.isfinite(share):
            raise ValueError("init_lora_weights='corda': the inputs hold NaN or Inf")
    u, sizes, v = torch.linalg.svd(w @ damped, full_matrices=False)
    v = v @ inverse
    chosen = slice(-config.r, None) if config.init_lora_weights == "corda_kpm" else slice(config.r)
    root = (sizes[chosen] / config.scaling).sqrt()
    return root[:, None] * v[chosen], u[:, chosen] * root


@torch.no_grad()
def lora_ga(config: ResLoRAConfig, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """A [r, K] and B [N, r] from the gradient of W, G = U Σ Vᵀ (LoRA-GA, arXiv 2407.05000, Section 3).

    A has the first r rows of Vᵀ, B the next r columns of U Σ times N^¼ / √γ, γ = 16, as PEFT has it (its direction
    "ArB2r" and scale "stable"). The singular triplets come from randomised iterations.
    """
    r, g = config.r, gradient.float()
    u, sizes, v = torch.svd_lowrank(g, q=min(4 * r, *g.shape), niter=4)
    columns = slice(r, 2 * r)
    return v.T[:r], u[:, columns] * sizes[columns] * (len(g) ** 0.25 / 16**0.5)


@torch.no_grad()
def loftq(config: ResLoRAConfig, weight: Tensor, quantized: Tensor) -> tuple[Tensor, Tensor]:
    """A [r, K] and B [N, r] with s B A the principal part of W - Q (LoftQ, arXiv 2310.08659, Eq. 8), for a given Q."""
    u, sizes, v = torch.linalg.svd((weight.to(quantized) - quantized).float(), full_matrices=False)
    root = (sizes[: config.r] / config.scaling).sqrt()
    return root[:, None] * v[: config.r], u[:, : config.r] * root

"""Random tensors of a case, the same for every provider, and what is timed on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reslora_kernels.bench.cases import Case

CPU_CACHE_BYTES = 8 << 20  # what a small case may find in cache on a CPU


@dataclass(frozen=True)
class Workload:
    """One of several input sets of a case: weights [N, K], adapters A [r, K] and B [N, r], inputs [M, K], dy [M, N].

    All are in the case's dtype; lists hold one tensor per layer. Random values: zeros would run faster.
    """

    case: Case
    weights: list[Tensor]
    a: list[Tensor]
    b: list[Tensor]
    xs: list[Tensor]
    dys: list[Tensor]

    def linears(self) -> list[nn.Linear]:
        """Frozen linear layers on the workload's own weights, not on copies."""
        layers = []
        for weight in self.weights:
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            layer.weight = nn.Parameter(weight, requires_grad=False)
            layers.append(layer)
        return layers


@dataclass(frozen=True)
class Layers:
    """A provider's layers on one workload: ``run`` maps the inputs to the outputs; parameters are all A, then all B."""

    run: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    parameters: Sequence[Tensor]


def draw(case: Case, device: torch.device, seed: int = 0) -> Workload:
    """The tensors of a case; every seed is another input set."""
    generator = torch.Generator(device).manual_seed(1 + seed)

    def each(*shape: int, scale: float = 1.0) -> list[Tensor]:
        return [
            torch.randn(*shape, generator=generator, device=device).mul_(scale).to(case.torch_dtype)
            for _ in range(case.layers)
        ]

    return Workload(
        case,
        weights=each(case.n, case.k, scale=case.k**-0.5),
        a=each(case.r, case.k, scale=case.k**-0.5),
        b=each(case.n, case.r, scale=case.r**-0.5),
        xs=[x.requires_grad_() for x in each(case.m, case.k)],
        dys=each(case.m, case.n),
    )


def cache_bytes(device: torch.device) -> int:
    """Of the last cache before memory."""
    if device.type != "cuda":
        return CPU_CACHE_BYTES
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20))


def input_sets(case: Case, cache_bytes: int, most: int = 16) -> int:
    """How many input sets of a case in turn keep the cache from serving the next."""
    return sets_of(case.input_bytes(), cache_bytes, most)


def sets_of(size: int, cache_bytes: int, most: int) -> int:
    """How many sets of ``size`` bytes exceed the cache four times over, at least 2."""
    return min(most, max(2, -(-4 * cache_bytes // size)))

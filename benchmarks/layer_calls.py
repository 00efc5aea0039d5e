"""The calls that a layer of each shortcut makes of a backend, ready to be timed: frozen matmul, forward, step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.device_timing import Work
from reslora_kernels import dropout
from reslora_kernels.testing import relative_error


@dataclass(frozen=True)
class Shape:
    """x [m, k], weight [n, k], rank r."""

    m: int
    k: int
    n: int
    r: int = 16
    dtype: torch.dtype = torch.bfloat16
    p: float = 0.0

    def __str__(self) -> str:
        dropped = f", p = {self.p}" if self.p else ""
        return f"{self.m} x {self.k} to {self.n}, r = {self.r}, {str(self.dtype)[6:]}{dropped}"


@dataclass(frozen=True)
class Form:
    """A shortcut as the one kernel form: rows of A_cat, columns of B_cat and of h handed on, in units of r."""

    a: int
    b: int
    hand: tuple[int, int]
    residual: bool


FORMS = {
    "none": Form(1, 1, (0, 0), False),
    "input": Form(2, 1, (1, 2), True),
    "block": Form(2, 2, (0, 0), False),  # pre_num 1
    "middle": Form(1, 1, (0, 1), True),
}


@dataclass
class LayerCall:
    """Tensors of one layer, ``sets`` of those that are read once per step, and what can be timed on them."""

    shape: Shape
    form: Form
    device: torch.device
    sets: int = 4

    def __post_init__(self) -> None:
        shape, form, generator = self.shape, self.form, torch.Generator(self.device).manual_seed(0)

        def draw(*size: int, scale: float = 1.0, dtype: torch.dtype = shape.dtype) -> Tensor:
            return (torch.randn(size, generator=generator, device=self.device) * scale).to(dtype)

        m, k, n, r = shape.m, shape.k, shape.n, shape.r
        self.weight = draw(n, k, scale=k**-0.5)
        self.a = draw(form.a * r, k, scale=k**-0.5, dtype=torch.float32)
        self.b = draw(n, form.b * r, scale=r**-0.5, dtype=torch.float32)
        self.x = [draw(m, k) for _ in range(self.sets)]
        self.dy = [draw(m, n) for _ in range(self.sets)]
        self.residual = draw(m, form.b * r) if form.residual else None
        self.hand = (form.hand[0] * r, form.hand[1] * r)
        self.dhanded = draw(m, self.hand[1] - self.hand[0]) if self.hand[1] else None
        self.seed = dropout.new_seed(self.device) if shape.p else None

    def frozen_forward(self, index: int) -> Tensor:
        return torch.nn.functional.linear(self.x[index], self.weight)

    def frozen_step(self, index: int) -> Tensor:
        torch.nn.functional.linear(self.x[index], self.weight)
        return self.dy[index] @ self.weight

    def forward(self, backend: ModuleType, index: int) -> tuple[Tensor, Tensor, Tensor]:
        results: tuple[Tensor, Tensor, Tensor] = backend.forward(
            self.x[index], self.weight, None, self.a, self.b, self.residual, self.seed,
            1.0, 2.0, self.shape.p, *self.hand,
        )  # fmt: skip
        return results

    def step(self, backend: ModuleType, index: int) -> tuple[Tensor, ...]:
        y, handed, u = self.forward(backend, index)
        gradients = backend.backward(
            self.dy[index], self.dhanded, self.x[index], self.weight, self.a, self.b, u, self.seed,
            1.0, 2.0, self.shape.p, self.hand[0], True, True, True, self.form.residual,
        )  # fmt: skip
        return (y, handed, *gradients)

    def works(self, backend: ModuleType) -> Iterator[tuple[str, Work]]:
        yield "forward", lambda index: self.forward(backend, index)
        yield "step", lambda index: self.step(backend, index)

    def error(self, backend: ModuleType, other: ModuleType) -> float:
        """Largest relative distance of any result of two backends: a wrong one is not timed."""
        pairs = zip(self.step(backend, 0), self.step(other, 0), strict=True)
        return max(relative_error(one, two) for one, two in pairs if two.numel())

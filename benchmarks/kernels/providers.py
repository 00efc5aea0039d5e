"""Who is timed: stacks of linear layers that all compute the same thing, each written the way its users would write it.

Every provider is built from the same weights and adapters, so that outputs and gradients can be compared before
anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reslora_kernels import ResLoRAConfig, ResLoRALinear, link

SHORTCUTS = ("none", "input", "block", "middle")


@dataclass(frozen=True)
class Case:
    """A chain of ``layers`` linears K -> K on M tokens; the next layer's input is this one's output."""

    shortcut: str
    pre_num: int
    m: int = 2048
    k: int = 1024
    r: int = 16
    layers: int = 4
    dtype: torch.dtype = torch.float32

    @property
    def config(self) -> ResLoRAConfig:
        return ResLoRAConfig(r=self.r, lora_alpha=self.r, shortcut=self.shortcut, pre_num=self.pre_num)


@dataclass(frozen=True)
class Provider:
    """``run(x)`` is one forward; ``parameters`` are its adapters, A of every layer first, then B."""

    name: str
    about: str
    run: Callable[[Tensor], Tensor]
    parameters: list[Tensor]


def linears(case: Case) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(case.k, case.k).to(case.dtype).requires_grad_(False) for _ in range(case.layers)]


def adapters(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(case.dtype) * case.k**-0.5

    return [draw(case.r, case.k) for _ in range(case.layers)], [draw(case.k, case.r) for _ in range(case.layers)]


def frozen(case: Case) -> Provider:
    layers = nn.Sequential(*linears(case))
    return Provider("frozen", "the frozen linears alone, forward and dx: the floor", layers, [])


def plain(case: Case) -> Provider:
    """Eqs. 1 to 4 in the form of the paper's released layers, scaling last; autograd does the backward."""
    layers = linears(case)
    a, b = ([t.requires_grad_() for t in group] for group in adapters(case))

    scaling, earlier = case.config.scaling, case.layers if case.pre_num == -1 else case.pre_num

    def run(x: Tensor) -> Tensor:
        xs: list[Tensor] = []
        for n, layer in enumerate(layers):
            xs.append(x)
            y = layer(x)
            if case.shortcut == "none":
                y = y + (x @ a[n].T @ b[n].T) * scaling
            elif case.shortcut == "input":
                y = y + ((x + xs[max(n - 1, 0)]) @ a[n].T @ b[n].T) * scaling
            elif case.shortcut == "block":
                for k in range(min(earlier, n) + 1):
                    y = y + (x @ a[n - k].T @ b[n - k].T) * scaling
            else:
                h = x @ a[n].T
                for k in range(1, min(earlier, n) + 1):
                    h = h + xs[n - k] @ a[n - k].T
                y = y + (h @ b[n].T) * scaling
            x = y
        return x

    return Provider("plain", "the paper's layers written plainly in PyTorch", run, [*a, *b])


def ours(case: Case) -> Provider:
    layers = [ResLoRALinear.from_linear(linear, case.config) for linear in linears(case)]
    for layer, a, b in zip(layers, *adapters(case), strict=True):
        layer.lora_A.data.copy_(a)
        layer.lora_B.data.copy_(b)
    stack = nn.Sequential(*layers)
    link(layers, root=stack)
    parameters = [layer.lora_A for layer in layers] + [layer.lora_B for layer in layers]
    return Provider("ours", "reslora_kernels, backend='auto'", stack, parameters)


def peft(case: Case) -> Provider:
    """PEFT LoRA: the method most people train today, whatever the case's shortcut."""
    from peft import LoraConfig, get_peft_model

    stack = get_peft_model(
        nn.Sequential(*linears(case)),
        LoraConfig(r=case.r, lora_alpha=case.r, target_modules=[str(n) for n in range(case.layers)]),
    )
    named = dict(stack.named_parameters())
    parameters = [
        named[f"base_model.model.{n}.lora_{kind}.default.weight"] for kind in "AB" for n in range(case.layers)
    ]
    for parameter, value in zip(parameters, [t for group in adapters(case) for t in group], strict=True):
        parameter.data.copy_(value)
    return Provider("peft", "PEFT LoRA", stack, parameters)


def step(provider: Provider, x: Tensor, dy: Tensor) -> list[Tensor]:
    """One forward and backward: y, dx and every adapter's gradient."""
    x = x.detach().requires_grad_()
    y = provider.run(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *provider.parameters], dy)]

"""Results against float64, and the refusal of a provider whose results are not what it says it computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reslora_kernels import dropout, reference
from reslora_kernels.bench.capture import Pass
from reslora_kernels.bench.cases import Case, Method
from reslora_kernels.bench.providers import FROZEN, Provider, scaling_of
from reslora_kernels.bench.workload import Workload
from reslora_kernels.testing import assert_close_to_truth, relative_error

SEED = 20240403


@dataclass(frozen=True)
class Verdict:
    """Largest relative error of a layer for y, dx, dA and dB, plain PyTorch's beside it; why it is refused, if so."""

    error: dict[str, float]
    plain_error: dict[str, float]
    refusal: str | None


class Judge:
    """Checks providers on one workload.

    What float64 and plain PyTorch compute for a method is kept until another one is asked for: ask method by method.
    """

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self._known: dict[tuple[str, float], tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]] = {}

    def check(self, provider: Provider, method: Method) -> Verdict:
        """Run the provider once, at the case's dropout if its masks are known and else without dropout, and compare.

        The rule is the one of ``testing.assert_close_to_truth``: at most twice the error of plain PyTorch in the case's
        dtype, in which adapters are compared whatever dtype the provider keeps them in.
        """
        case = self.workload.case
        p = case.p if provider.same_mask else 0.0
        run_at = max(p, provider.least_p)
        twin = Workload(case.replace(p=run_at), *_tensors(self.workload))
        one = Pass(provider.build(twin, method), twin)
        torch.manual_seed(SEED)
        found = one.results()
        return judge(found, *self._references(provider, method, p))

    def _references(
        self, provider: Provider, method: Method, p: float
    ) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
        name = FROZEN if provider.name == FROZEN else str(method)
        if (name, p) not in self._known:
            self._known.clear()
            used = None if name == FROZEN else method
            truth = reference_results(self.workload, used, p, torch.float64)
            plain = reference_results(self.workload, used, p, self.workload.case.torch_dtype)
            self._known = {(name, p): (truth, plain)}
        return self._known[name, p]


def judge(found: dict[str, list[Tensor]], truth: dict[str, list[Tensor]], plain: dict[str, list[Tensor]]) -> Verdict:
    """Errors of all results; a refusal if any is beyond the rule or missing."""
    error, plain_error, refusal = {}, {}, None
    for name, expected in truth.items():
        got = [t.to(p.dtype) for t, p in zip(found[name], plain[name], strict=True)] if name in found else []
        if len(got) != len(expected):
            refusal = refusal or f"gives {len(got)} {name} for {len(expected)} layers"
            continue
        error[name] = max(relative_error(g, e) for g, e in zip(got, expected, strict=True))
        plain_error[name] = max(relative_error(p, e) for p, e in zip(plain[name], expected, strict=True))
        for n, (g, e, p) in enumerate(zip(got, expected, plain[name], strict=True)):
            try:
                assert_close_to_truth(g, e, p, f"{name} of layer {n}")
            except AssertionError as fault:
                refusal = refusal or str(fault)
    return Verdict(error, plain_error, refusal)


def reference_results(
    workload: Workload, method: Method | None, p: float, dtype: torch.dtype
) -> dict[str, list[Tensor]]:
    """y, dx, dA, dB by the package's reference in ``dtype``; without a method those of the frozen linears."""
    case = workload.case
    xs, a, b = ([t.detach().to(dtype).requires_grad_() for t in group] for group in _trained(workload))
    weights = [t.to(dtype) for t in workload.weights]
    masks = _masks(case, p, xs[0].device) if p and method else None

    def drop(n: int, x: Tensor) -> Tensor:
        assert masks is not None
        return dropout.apply_mask(x, masks[n], p)

    if method is None:
        ys, leaves = [torch.nn.functional.linear(x, w) for x, w in zip(xs, weights, strict=True)], xs
    else:
        leaves = [*xs, *a, *b]
        ys = reference.chain_forward(
            method.shortcut, method.pre_num, scaling_of(case), xs, weights, [None] * case.layers, a, b,
            drop if masks else None,
        )  # fmt: skip
    gradients = torch.autograd.grad(ys, leaves, [t.to(dtype) for t in workload.dys])
    count = case.layers
    found = {"y": [y.detach() for y in ys], "dx": list(gradients[:count])}
    if method is not None:
        found |= {"dA": list(gradients[count : 2 * count]), "dB": list(gradients[2 * count :])}
    return found


def _masks(case: Case, p: float, device: torch.device) -> list[Tensor]:
    """The masks that layers draw, first to execute first, from torch's generator as ``Judge.check`` leaves it."""
    torch.manual_seed(SEED)
    return [dropout.keep_mask(dropout.new_seed(device), case.m, case.k, p) for _ in range(case.layers)]


def _trained(workload: Workload) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return workload.xs, workload.a, workload.b


def _tensors(workload: Workload) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    return workload.weights, workload.a, workload.b, workload.xs, workload.dys

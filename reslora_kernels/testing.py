"""What every correctness check shares: the error rule, inputs, golden vectors of the paper's released layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from . import reference
from .config import ResLoRAConfig


@dataclass(frozen=True)
class GoldenCase:
    """One chain computed by the paper's released layers in float64 without dropout: inputs, outputs, gradients, merge.

    Tensors are named ``x.n weight.n bias.n lora_A.n lora_B.n y.n dy.n dx.n dlora_A.n dlora_B.n`` for layer n; every
    x.n is a leaf and dy.n the gradient at y.n. ``calibration.s.x.n`` are further batches; ``y_merged.n`` is the layer
    merged by merge "input", with the norms averaged over x and the calibration batches.
    """

    name: str
    config: ResLoRAConfig
    num_layers: int
    merge_alpha: tuple[float, ...] | None
    tensors: dict[str, Tensor]

    def series(self, name: str) -> list[Tensor]:
        """``name.n`` for every layer n."""
        return [self.tensors[f"{name}.{n}"] for n in range(self.num_layers)]

    def biases(self) -> list[Tensor | None]:
        """Bias [N] of every layer, None where it has none."""
        return [self.tensors.get(f"bias.{n}") for n in range(self.num_layers)]

    def batches(self) -> list[list[Tensor]]:
        """The training batches that norms are averaged over: for each of them the x [..., K] of every layer."""
        return [self.series("x"), *(self.series(f"calibration.{s}.x") for s in (1, 2))]


@cache
def golden_cases() -> tuple[GoldenCase, ...]:
    """Every golden case, by name; none where the installation lacks their file, ``golden.safetensors``.

    A tensor of it is called ``case/tensor``, and its metadata say of each case in JSON what was computed.
    """
    from safetensors.torch import load

    file = resources.files(__package__) / "golden.safetensors"
    if not file.is_file():
        return ()
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    tensors: dict[str, dict[str, Tensor]] = {name: {} for name in header["__metadata__"]}
    for key, tensor in load(content).items():
        name, _, of_case = key.partition("/")
        tensors[name][of_case] = tensor
    return tuple(
        _golden_case(name, json.loads(header["__metadata__"][name]), tensors[name]) for name in sorted(tensors)
    )


def _golden_case(name: str, about: dict[str, Any], tensors: dict[str, Tensor]) -> GoldenCase:
    config = ResLoRAConfig(
        r=about["r"],
        lora_alpha=about["lora_alpha"],
        shortcut=about["shortcut"],
        pre_num=-1 if about["pre_num"] == "all" else about["pre_num"],
        merge="input",
    )
    alpha = tuple(about["merge_alpha"]) if "merge_alpha" in about else None
    return GoldenCase(name, config, about["num_layers"], alpha, tensors)


def max_error(actual: Tensor, truth: Tensor) -> float:
    """Largest elementwise distance, in float64; 0 for empty tensors, NaN if either holds one."""
    distance = (actual.detach().double() - truth.detach().double()).abs()
    return float(distance.max()) if distance.numel() else 0.0


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """‖actual - truth‖ / ‖truth‖ in float64 (the plain norm when the truth is zero)."""
    actual, truth = actual.detach().double(), truth.detach().double()
    size = float(truth.norm())
    return float((actual - truth).norm()) / (size if size > 0 else 1.0)


def assert_close_to_truth(actual: Tensor, truth: Tensor, plain: Tensor, what: str = "result") -> None:
    """The one tolerance rule: at most twice the error that plain PyTorch makes in the same dtype.

    Both the elementwise maximum and the relative norm must hold. On top, each of the two products that make a result
    may round the largest value once more: the maximum over few elements is luck, and plain PyTorch can have it. Of
    float32 the maximum may be four times as large: sums are in float32 as well, and their order is most of the error.

    Args:
        actual: what is tested, ``truth`` the same in float64, ``plain`` the same from plain PyTorch in actual's dtype.

    Raises:
        AssertionError: shape or dtype differ, or the error is larger.
    """
    if actual.shape != truth.shape or actual.dtype != plain.dtype:
        raise AssertionError(
            f"{what}: got {list(actual.shape)} {actual.dtype}, expected {list(truth.shape)} {plain.dtype}"
        )
    if not truth.numel():
        return
    step = torch.finfo(actual.dtype).eps
    largest = float(truth.abs().max())
    most = 4 if actual.dtype == torch.float32 else 2
    for name, error, allowed in (
        ("largest error", max_error(actual, truth), most * (max_error(plain, truth) + step * largest)),
        ("relative error", relative_error(actual, truth), 2 * (relative_error(plain, truth) + step)),
    ):
        if not error <= allowed:
            raise AssertionError(f"{what}: {name} {error:.3e} is above {allowed:.3e}")


def chain_inputs(
    num_layers: int,
    tokens: tuple[int, ...],
    in_features: int,
    out_features: int,
    r: int,
    *,
    bias: bool = True,
    integers: bool = False,
    seed: int = 0,
) -> dict[str, list[Tensor]]:
    """Float64 tensors of a chain: x, weight, bias, lora_A, lora_B, dy, one per layer.

    Args:
        tokens: leading dimensions of x.
        integers: values are integers of magnitude 5 at most, so that exact results are exact in float32 too.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        if integers:
            return torch.randint(-5, 6, shape, generator=generator).double()
        return torch.randn(shape, generator=generator, dtype=torch.float64) * scale

    def each(make: Callable[[], Tensor]) -> list[Tensor]:
        return [make() for _ in range(num_layers)]

    return {
        "x": each(lambda: draw(*tokens, in_features)),
        "weight": each(lambda: draw(out_features, in_features, scale=in_features**-0.5)),
        "bias": each(lambda: draw(out_features)) if bias else [],
        "lora_A": each(lambda: draw(r, in_features, scale=in_features**-0.5)),
        "lora_B": each(lambda: draw(out_features, r, scale=r**-0.5)),
        "dy": each(lambda: draw(*tokens, out_features)),
    }


def reference_results(
    config: ResLoRAConfig, inputs: dict[str, list[Tensor]], dtype: torch.dtype = torch.float64
) -> dict[str, list[Tensor]]:
    """y, dx, dlora_A, dlora_B of the reference in ``dtype``, all layers differentiated together, every x a leaf."""
    x, a, b = ([t.to(dtype, copy=True).requires_grad_() for t in inputs[name]] for name in ("x", "lora_A", "lora_B"))
    weights = [t.to(dtype) for t in inputs["weight"]]
    biases: list[Tensor | None] = [t.to(dtype) for t in inputs["bias"]] or [None] * len(x)
    y = reference.chain_forward(config.shortcut, config.pre_num, config.scaling, x, weights, biases, a, b)
    torch.autograd.backward(y, [t.to(dtype) for t in inputs["dy"]])
    gradients = {
        f"d{name}": [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors]
        for name, tensors in (("x", x), ("lora_A", a), ("lora_B", b))
    }
    return {"y": [t.detach() for t in y], **gradients}

"""``reslora verify``: the paper's golden vectors through every backend of this machine."""

from __future__ import annotations

from typing import NamedTuple

import torch
import typer
from torch import Tensor

from reslora_kernels.backends import select
from reslora_kernels.cli.options import torch_device
from reslora_kernels.layers.kinds import link
from reslora_kernels.layers.linear import ResLoRALinear
from reslora_kernels.testing import GoldenCase, assert_close_to_truth, golden_cases, max_error, reference_results

GOLDEN_ERROR = 1e-10  # float64, elementwise
INPUTS = ("x", "weight", "bias", "lora_A", "lora_B", "dy")


class Check(NamedTuple):
    """One golden case through one backend. ``error`` is the largest over y, dx, dA, dB; ``failure`` None if none."""

    case: str
    backend: str
    dtype: str
    error: float
    failure: str | None


def verify() -> None:
    """Run the golden vectors, values and gradients, through every backend that this machine can run.

    One line for each case and backend, with the largest error. The exit status is 1 if any fails.
    """
    checks = []
    for status in select.status():
        if not status.available:
            typer.echo(f"skip  {status.name:6}  {status.reason}")
            continue
        for case in cases():
            checks.append(check_case(case, status.name))
            typer.echo(line_of(checks[-1]))
    failed = sum(check.failure is not None for check in checks)
    typer.echo(f"{len(checks) - failed} of {len(checks)} checks passed")
    if failed:
        raise typer.Exit(1)


def cases() -> tuple[GoldenCase, ...]:
    """The golden cases; an installation without any is an error, not a pass."""
    found = golden_cases()
    if not found:
        raise FileNotFoundError("reslora_kernels/golden.safetensors holds no golden vectors; reinstall reslora_kernels")
    return found


def line_of(check: Check) -> str:
    verdict = "ok    " if check.failure is None else "FAIL  "
    line = f"{verdict}{check.backend:6}  {check.case:42}  {check.dtype:7}  {check.error:.1e}"
    return line if check.failure is None else f"{line}  {check.failure}"


def check_case(case: GoldenCase, backend: str) -> Check:
    """Compare with the golden values: within 1e-10 in float64, by the tolerance rule where the backend lacks float64.

    An error that the backend raises is a failed check, so that the others still run.
    """
    dtype = served_dtype(case, backend)
    error, failure = float("nan"), None
    try:
        results = chain_results(case, backend, dtype)
        pairs = [(name, n, result) for name, tensors in results.items() for n, result in enumerate(tensors)]
        error = max(max_error(result, case.tensors[f"{name}.{n}"]) for name, n, result in pairs)
        if dtype == torch.float64:
            failure = None if error <= GOLDEN_ERROR else f"above {GOLDEN_ERROR:.0e}"
        else:
            plain = reference_results(case.config, inputs_of(case), dtype)
            for name, n, result in pairs:
                assert_close_to_truth(result, case.tensors[f"{name}.{n}"], plain[name][n], f"{name}.{n}")
    except Exception as fault:
        failure = f"{type(fault).__name__}: {fault}"
    return Check(case.name, backend, str(dtype).removeprefix("torch."), error, failure)


def served_dtype(case: GoldenCase, backend: str) -> torch.dtype:
    """float64, or float32 where the backend cannot serve float64."""
    x, weight = case.series("x")[0].flatten(0, -2), case.series("weight")[0]
    try:
        select.explain(backend, x.to(torch_device("auto")), weight.to(torch_device("auto")), case.config.r)
    except ValueError:
        return torch.float32
    return torch.float64


def inputs_of(case: GoldenCase) -> dict[str, list[Tensor]]:
    """x, weight, bias, lora_A, lora_B, dy, one tensor per layer; an empty list of biases where there are none."""
    return {name: case.series(name) if f"{name}.0" in case.tensors else [] for name in INPUTS}


def chain_results(case: GoldenCase, backend: str, dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """y, dx, dlora_A, dlora_B of linked layers, on the CPU; every x is a leaf, all layers differentiated together."""
    config = case.config.replace(backend=backend)
    device = torch_device("auto")
    inputs = {name: [t.to(device, dtype, copy=True) for t in tensors] for name, tensors in inputs_of(case).items()}
    layers = []
    for n, weight in enumerate(inputs["weight"]):
        out_features, in_features = weight.shape
        layer = ResLoRALinear(in_features, out_features, bool(inputs["bias"]), device, dtype, config=config)
        layer.load_state_dict(
            {name: inputs[name][n] for name in ("weight", "bias", "lora_A", "lora_B") if inputs[name]}
        )
        layers.append(layer)
    x = [t.requires_grad_() for t in inputs["x"]]
    with link(layers).forward_pass():
        y = [layer(t) for layer, t in zip(layers, x, strict=True)]
    torch.autograd.backward(y, inputs["dy"])
    a, b = [layer.lora_A for layer in layers], [layer.lora_B for layer in layers]
    gradients = {
        f"d{name}": [gradient(t) for t in tensors] for name, tensors in (("x", x), ("lora_A", a), ("lora_B", b))
    }
    return {"y": [t.detach().cpu() for t in y], **gradients}


def gradient(leaf: Tensor) -> Tensor:
    """The leaf's gradient on the CPU, zero where none reached it."""
    return (torch.zeros_like(leaf) if leaf.grad is None else leaf.grad).cpu()

"""On the chip itself: golden vectors, the error rule in every dtype, no device synchronisation in a training step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from reslora_kernels import ResLoRAConfig, ResLoRALinear, link
from reslora_kernels.testing import (
    GoldenCase,
    assert_close_to_truth,
    chain_inputs,
    golden_cases,
    max_error,
    reference_results,
)

pytestmark = pytest.mark.gpu


def make_chain(
    config: ResLoRAConfig, values: dict[str, list[torch.Tensor | None]], dtype: torch.dtype
) -> nn.Sequential:
    layers = []
    for n, weight in enumerate(values["weight"]):
        layer = ResLoRALinear(weight.shape[1], weight.shape[0], True, "cuda", dtype, config=config)
        for name in ("weight", "lora_A", "lora_B"):
            getattr(layer, name).data.copy_(values[name][n])
        layer.bias.data.copy_(values["bias"][n]) if values["bias"][n] is not None else layer.bias.data.zero_()
        layers.append(layer)
    link(layers)
    return nn.Sequential(*layers)


@pytest.mark.parametrize("case", golden_cases(), ids=lambda case: case.name)
def test_golden_vectors(case: GoldenCase) -> None:
    values = {name: case.series(name) for name in ("weight", "lora_A", "lora_B")} | {"bias": case.biases()}
    chain = make_chain(case.config, values, torch.float64)
    xs = [x.cuda().requires_grad_() for x in case.series("x")]
    with chain[0].chain.forward_pass():
        ys = [layer(x) for layer, x in zip(chain, xs, strict=True)]
    torch.autograd.backward(ys, [dy.cuda() for dy in case.series("dy")])
    for n, layer in enumerate(chain):
        for name, actual in (
            ("y", ys[n]),
            ("dx", xs[n].grad),
            ("dlora_A", layer.lora_A.grad),
            ("dlora_B", layer.lora_B.grad),
        ):
            assert max_error(actual.cpu(), case.tensors[f"{name}.{n}"]) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shortcut", "pre_num"), [("none", 0), ("input", 1), ("block", 2), ("middle", -1)])
def test_error_at_most_twice_plain_pytorchs(shortcut: str, pre_num: int, dtype: torch.dtype) -> None:
    config = ResLoRAConfig(r=16, lora_alpha=16, shortcut=shortcut, pre_num=pre_num)
    drawn = chain_inputs(3, (500,), 384, 384, 16)
    rounded = {name: [t.to(dtype).double().cuda() for t in tensors] for name, tensors in drawn.items()}
    truth = reference_results(config, rounded)
    baseline = reference_results(config, rounded, dtype)
    chain = make_chain(config, rounded, dtype)
    for layer in chain:
        layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.to(dtype), layer.lora_B.data.to(dtype)
    xs = [x.to(dtype).requires_grad_() for x in rounded["x"]]
    with chain[0].chain.forward_pass():
        ys = [layer(x) for layer, x in zip(chain, xs, strict=True)]
    torch.autograd.backward(ys, [dy.to(dtype) for dy in rounded["dy"]])
    for n, layer in enumerate(chain):
        for name, actual in (
            ("y", ys[n]),
            ("dx", xs[n].grad),
            ("dlora_A", layer.lora_A.grad),
            ("dlora_B", layer.lora_B.grad),
        ):
            assert_close_to_truth(actual, truth[name][n], baseline[name][n], f"{name}.{n}")


@pytest.mark.parametrize("shortcut", ["none", "input", "block", "middle"])
def test_a_training_step_never_waits_for_the_device(shortcut: str) -> None:
    """With dropout on."""
    config = ResLoRAConfig(r=8, lora_dropout=0.1, shortcut=shortcut)
    layers = [ResLoRALinear(128, 128, device="cuda", dtype=torch.bfloat16, config=config) for _ in range(3)]
    stack = nn.Sequential(*layers)
    link(layers, root=stack)
    x = torch.randn(64, 128, device="cuda", dtype=torch.bfloat16)
    stack(x).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        stack(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")

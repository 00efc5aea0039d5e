"""autocast, float32 adapters on half weights, GradScaler: float64's gradients by the one rule, no extra bytes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reslora_kernels import ResLoRAConfig, ResLoRALinear, checkpoint_context, link, reference
from reslora_kernels.forward_state import ForwardState
from reslora_kernels.testing import assert_close_to_truth, chain_inputs, relative_error

from .test_gates import X, residual

SHORTCUTS = [("none", 0), ("input", 1), ("block", 2), ("middle", 2), ("middle", -1)]
HANDING = [("input", 1), ("middle", -1)]
HALF = [torch.bfloat16, torch.float16]
LAYERS, M, K, R = 3, 96, 48, 4

Results = dict[str, list[Tensor]]


def autocast(dtype: torch.dtype | None) -> Any:
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def chain_of(inputs: Results, config: ResLoRAConfig, base: torch.dtype) -> list[ResLoRALinear]:
    layers = []
    for n in range(LAYERS):
        linear = nn.Linear(K, K, dtype=base)
        linear.weight.data.copy_(inputs["weight"][n])
        linear.bias.data.copy_(inputs["bias"][n])
        layer = ResLoRALinear.from_linear(linear, config)
        layer.lora_A.data.copy_(inputs["lora_A"][n])
        layer.lora_B.data.copy_(inputs["lora_B"][n])
        layers.append(layer)
    return layers


def rounded(inputs: Results, base: torch.dtype) -> Results:
    """What the model really holds, in float64: x, W, b and dy in the base's dtype, adapters in float32."""
    own = {"lora_A": torch.float32, "lora_B": torch.float32}
    return {name: [t.to(own.get(name, base)).double() for t in tensors] for name, tensors in inputs.items()}


def backward(y: list[Tensor], inputs: Results, x: list[Tensor], a: list[Tensor], b: list[Tensor]) -> Results:
    torch.autograd.backward(y, [dy.to(one.dtype) for dy, one in zip(inputs["dy"], y, strict=True)])
    gradients = {"dx": x, "dlora_A": a, "dlora_B": b}
    return {"y": [t.detach() for t in y], **{name: [t.grad for t in leaves] for name, leaves in gradients.items()}}


def by_reference(
    config: ResLoRAConfig, inputs: Results, base: torch.dtype, adapters: torch.dtype, cast: torch.dtype | None
) -> Results:
    """Plain PyTorch: the equations, with the adapters cast to x's dtype as PEFT does."""
    x = [t.to(base, copy=True).requires_grad_() for t in inputs["x"]]
    a, b = ([t.to(adapters, copy=True).requires_grad_() for t in inputs[name]] for name in ("lora_A", "lora_B"))
    weights, biases = ([t.to(base) for t in inputs[name]] for name in ("weight", "bias"))
    with autocast(cast):
        y = reference.chain_forward(
            config.shortcut, config.pre_num, config.scaling, x, weights, biases,
            [t.to(base) for t in a], [t.to(base) for t in b],
        )  # fmt: skip
    return backward(y, inputs, x, a, b)


def by_package(config: ResLoRAConfig, inputs: Results, base: torch.dtype, cast: torch.dtype | None) -> Results:
    layers = chain_of(inputs, config, base)
    chain = link(layers)
    x = [t.to(base, copy=True).requires_grad_() for t in inputs["x"]]
    with autocast(cast), chain.forward_pass():
        y = [layer(one) for layer, one in zip(layers, x, strict=True)]
    return backward(y, inputs, x, [layer.lora_A for layer in layers], [layer.lora_B for layer in layers])


@pytest.mark.parametrize("cast", HALF, ids=str)
@pytest.mark.parametrize("base", ["autocast", "half weights", "half weights in autocast"])
@pytest.mark.parametrize(("shortcut", "pre_num"), SHORTCUTS)
def test_values_and_gradients(shortcut: str, pre_num: int, base: str, cast: torch.dtype) -> None:
    """y in the half type, gradients of float32 adapters in float32; errors at most twice plain PyTorch's."""
    config = ResLoRAConfig(r=R, lora_alpha=2 * R, shortcut=shortcut, pre_num=pre_num)
    held, region = (torch.float32 if base == "autocast" else cast), (None if base == "half weights" else cast)
    inputs = rounded(chain_inputs(LAYERS, (M,), K, K, R), held)
    truth = by_reference(config, inputs, torch.float64, torch.float64, None)
    plain = by_reference(config, inputs, held, torch.float32, region)
    actual = by_package(config, inputs, held, region)
    for name, tensors in actual.items():
        for n, tensor in enumerate(tensors):
            if truth[name][n] is None:
                continue
            assert_close_to_truth(tensor, truth[name][n], plain[name][n], f"{name}[{n}]")


@pytest.mark.parametrize("cast", HALF, ids=str)
@pytest.mark.parametrize(("shortcut", "pre_num"), HANDING)
def test_what_is_handed_on_is_in_autocasts_dtype(
    shortcut: str, pre_num: int, cast: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    hand_on = ForwardState.hand_on
    monkeypatch.setattr(ForwardState, "hand_on", lambda self, n, h: (seen.append(h), hand_on(self, n, h)))
    inputs = chain_inputs(LAYERS, (M,), K, K, R)
    by_package(ResLoRAConfig(r=R, shortcut=shortcut, pre_num=pre_num), inputs, torch.float32, cast)
    assert [(h.dtype, tuple(h.shape)) for h in seen] == [(cast, (M, R))] * (LAYERS - 1)


def saved_bytes(run: Callable[[], Tensor], *own: Tensor) -> int:
    """Bytes kept for backward, each storage once, beside those of ``own``."""
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        keeps.append(tensor)
        return tensor

    keeps: list[Tensor] = []  # so that no address is used twice
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = run()
    assert y.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("cast", HALF, ids=str)
@pytest.mark.parametrize(("shortcut", "pre_num"), [("none", 0), ("input", 1), ("block", 1), ("middle", -1)])
def test_no_copy_of_x_beyond_the_one_that_linear_makes(shortcut: str, pre_num: int, cast: torch.dtype) -> None:
    inputs = rounded(chain_inputs(LAYERS, (M,), K, K, R), torch.float32)
    x = inputs["x"][0].float().requires_grad_()
    linear = nn.Linear(K, K)
    with autocast(cast):
        of_linear = saved_bytes(lambda: linear(x), x, linear.weight)
    layers = chain_of(inputs, ResLoRAConfig(r=R, shortcut=shortcut, pre_num=pre_num), torch.float32)
    chain = link(layers)
    adapters = [p for layer in layers for p in layer.parameters()]
    with autocast(cast), chain.forward_pass():
        of_chain = saved_bytes(lambda: sum(layer(x).sum() for layer in layers), x, *adapters)
    size = cast.itemsize
    assert of_linear == size * (M * K + K * K)  # x and W, cast
    u = sum(M * R * (1 + min(pre_num, n) if shortcut == "block" else 1) for n in range(LAYERS))
    assert of_chain <= LAYERS * of_linear + size * u

    half_layers = chain_of(inputs, ResLoRAConfig(r=R, shortcut=shortcut, pre_num=pre_num), cast)
    half_chain, half_x = link(half_layers), x.detach().to(cast).requires_grad_()
    own = [p for layer in half_layers for p in layer.parameters()]
    with half_chain.forward_pass():
        kept = saved_bytes(lambda: sum(layer(half_x).sum() for layer in half_layers), half_x, *own)
    assert kept <= size * u  # nothing of x or W is cast where they are in one dtype already


def stack(shortcut: str, pre_num: int, p: float = 0.0, base: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    config = ResLoRAConfig(r=R, shortcut=shortcut, pre_num=pre_num, lora_dropout=p)
    layers = chain_of(chain_inputs(LAYERS, (M,), K, K, R), config, base)
    model = nn.Sequential(*layers)
    link(layers, root=model)
    return model


@pytest.mark.parametrize("cast", HALF, ids=str)
@pytest.mark.parametrize(("shortcut", "pre_num"), HANDING)
def test_checkpointing_under_autocast(shortcut: str, pre_num: int, cast: torch.dtype) -> None:
    """Recomputed in the same dtypes from the same masks: bit-equal gradients."""
    model, x = stack(shortcut, pre_num, p=0.3), torch.randn(M, K, requires_grad=True)
    parameters = [x, *(p for p in model.parameters() if p.requires_grad)]

    def gradients() -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        with autocast(cast):
            loss = model(x).float().square().mean() - 0.5 * model(x).float().square().mean()
        return torch.autograd.grad(loss, parameters)

    expected, context = gradients(), checkpoint_context(model)

    def checkpointed(x: Tensor) -> Tensor:
        for layer in model:
            x = checkpoint(layer, x, use_reentrant=False, context_fn=context)
        return x

    model.forward = checkpointed
    assert all(torch.equal(one, two) for one, two in zip(gradients(), expected, strict=True))


@pytest.mark.parametrize(("shortcut", "pre_num"), HANDING)
def test_grad_scaler(shortcut: str, pre_num: int) -> None:
    """Scaled fp16 steps train; an overflow skips the step, changes nothing and lowers the scale."""
    model, x = stack(shortcut, pre_num), torch.randn(M, K) / 8
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, scaler = torch.optim.AdamW(parameters, lr=0.02), torch.amp.GradScaler("cpu", init_scale=2.0**6)

    def step(x: Tensor) -> float:
        optimizer.zero_grad()
        with autocast(torch.float16):
            loss = (model(x).float() - 1).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return float(loss.detach())

    losses = [step(x) for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0] and scaler.get_scale() == 2.0**6
    before = [p.detach().clone() for p in parameters]
    assert not step(x * 60000) < 1e3
    assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
    assert scaler.get_scale() == 2.0**5


def test_half_precision_keeps_the_gates_gradient() -> None:
    model = residual(shortcut="middle", pre_num=2)
    half = copy.deepcopy(model).to(torch.bfloat16)
    for layer in half.layers:
        for name in ("lora_A", "lora_B", "lora_gates"):
            layer.register_parameter(name, nn.Parameter(getattr(layer, name).float()))
    for one, x in ((model, X), (half, X.bfloat16())):
        one(x).square().mean().backward()
    for layer, rounded in zip(model.layers, half.layers, strict=True):
        assert rounded.lora_gates.grad.dtype == torch.float32
        assert relative_error(rounded.lora_gates.grad.double(), layer.lora_gates.grad) < 0.1

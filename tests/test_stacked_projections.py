"""Layers that read the same input project it once for all of them, forward and backward, and compute what they did."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reslora_kernels import (  # fmt: skip
    ResLoRAConfig,
    apply_reslora,
    collect_statistics,
    load_adapter,
    merge_reslora,
    save_adapter,
)
from reslora_kernels.adapt.record import adapted_layers, record_of
from reslora_kernels.ops import lora_linear
from reslora_kernels.testing import relative_error

from .models import FAMILIES, llama, randomize

SHORTCUTS = ("none", "input", "block", "middle")
ROUNDING = 1e-9  # float64; the same sums in another order
GROUPS = (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"])


def adapted(shortcut: str, stacked: bool = True, family: str = "llama", **changes: Any) -> nn.Module:
    config = ResLoRAConfig(**({
        "r": 3, "lora_alpha": 5, "shortcut": shortcut, "pre_num": 2, "stack_projections": stacked
    } | changes))  # fmt: skip
    return randomize(apply_reslora(FAMILIES[family].make().double(), config))


def batch(family: str = "llama") -> dict[str, Any]:
    values = FAMILIES[family].batch(5)
    return {key: v.double() if v.is_floating_point() else v for key, v in values.items()}


def results(model: nn.Module, family: str = "llama", run: Any = None) -> dict[str, Tensor]:
    """The outputs and all gradients; ``run`` is what to call, if not the model."""
    model.zero_grad()
    outputs = FAMILIES[family].outputs(model if run is None else run, batch(family))
    outputs.square().mean().backward()
    return {"outputs": outputs} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@contextmanager
def projections() -> Iterator[dict[str, list[int]]]:
    """The rows of A in every call of the two ops."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls: dict[str, list[int]] = {"forward": [], "backward": []}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.reslora_kernels.lora_linear_forward.default:
                calls["forward"].append(args[3].shape[0])
            if func is torch.ops.reslora_kernels.lora_linear_backward.default:
                calls["backward"].append(args[4].shape[0])
            return func(*args, **(kwargs or {}))

    with Count():
        yield calls


@pytest.mark.parametrize("family", ["llama", "roberta", "t5", "unet"])
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_same_values_and_gradients(shortcut: str, family: str) -> None:
    stacked, apart = adapted(shortcut, True, family), adapted(shortcut, False, family)
    assert record_of(stacked).groups and not record_of(apart).groups
    own, expected = results(stacked, family), results(apart, family)
    assert own.keys() == expected.keys()
    for name in own:
        assert relative_error(own[name], expected[name]) < ROUNDING, name


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_one_projection_for_each_group(shortcut: str) -> None:
    """x is read once by the forward and once by dA for q, k, v, not three times; every row of A takes part once."""
    stacked, apart = adapted(shortcut), adapted(shortcut, False)
    assert record_of(stacked).same_input == [
        [f"model.layers.{n}.{name}" for name in names] for n in range(3) for names in GROUPS
    ]
    with projections() as once:
        results(stacked)
    with projections() as each:
        results(apart)
    layers = len(adapted_layers(stacked))
    for calls in (once, each):
        assert len(calls["forward"]) == len(calls["backward"]) == layers
    for kind in ("forward", "backward"):
        assert sum(once[kind]) == sum(each[kind])
        assert sum(rows > 0 for rows in each[kind]) == layers
        assert sum(rows > 0 for rows in once[kind]) == layers - 3 * 3


def test_nothing_outlives_the_forward_and_less_is_kept() -> None:
    """The layers whose input another one projects save u [M, r] for backward, not x; no group holds a tensor after."""
    saved: dict[bool, set[int]] = {}
    for stacked in (True, False):
        model, kept = adapted("none", stacked), []

        def keep(tensor: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(**batch())
        saved[stacked] = {t.untyped_storage().data_ptr() for t in kept if t.dim() == 3 and t.shape[-1] == 32}
        assert all(group.passes.current() is None for group in record_of(model).groups)
    assert len(saved[True]) <= len(saved[False])


def test_dropout_has_a_mask_for_each_layer() -> None:
    model = adapted("block", lora_dropout=0.2).train()
    with projections() as calls:
        results(model)
    assert all(calls["forward"])
    model.eval()
    with projections() as calls:
        results(model)
    assert not all(calls["forward"])


@pytest.mark.parametrize("shortcut", ["input", "block", "middle"])
@pytest.mark.slow
def test_with_checkpointing_compile_copies_and_files(shortcut: str, tmp_path: Path) -> None:
    model = adapted(shortcut)
    expected = results(adapted(shortcut, False))

    def check(other: nn.Module, run: Any = None) -> None:
        own = results(other, run=run)
        assert own.keys() == expected.keys()
        for name in own:
            assert relative_error(own[name], expected[name]) < ROUNDING, name

    check(copy.deepcopy(model))
    save_adapter(model, tmp_path)
    loaded = load_adapter(llama().double(), tmp_path)
    assert record_of(loaded).same_input == record_of(model).same_input
    check(loaded)
    checkpointed = adapted(shortcut).train()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    check(checkpointed)
    torch._dynamo.reset()
    check(model, torch.compile(model, backend="aot_eager", fullgraph=True))


def test_statistics_and_sequential_merges_see_each_layer() -> None:
    stacked, apart = adapted("middle"), adapted("middle", False)
    reports = []
    for model in (stacked, apart):
        with collect_statistics(model) as statistics, torch.no_grad():
            model(**batch())
        reports.append({name: layer.gram for name, layer in statistics.layers.items()})
        merge_reslora(model, calibration=[batch()], sequential=True)
    for name, gram in reports[0].items():
        assert relative_error(gram, reports[1][name]) < ROUNDING
    with torch.no_grad():
        own, expected = (model(**batch()).logits for model in (stacked, apart))
    assert relative_error(own, expected) < 1e-6


def test_a_layer_called_by_itself_or_on_another_tensor_projects_for_itself() -> None:
    model, apart = adapted("none"), adapted("none", False)
    x = torch.randn(2, 3, 32, dtype=torch.float64)
    for own, other in zip(adapted_layers(model).values(), adapted_layers(apart).values(), strict=True):
        if own.in_features == 32:
            assert torch.equal(own(x), other(x))

    class Apart(nn.Module):
        """One group by the run at the start; later its layers read different tensors."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.split = False

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x * 2 if self.split else x)

    config = ResLoRAConfig(r=2, shortcut="none")
    module = randomize(apply_reslora(Apart().double(), config, example_inputs=x[..., :4]))
    assert len(record_of(module).groups) == 1
    y = torch.randn(3, 4, dtype=torch.float64)
    module.split = True
    merged = copy.deepcopy(module)
    merge_reslora(merged)
    torch.testing.assert_close(module(y), merged(y))


def test_without_any_a_the_residual_is_u() -> None:
    torch.manual_seed(0)
    x, w, u, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((5, 7), (6, 7), (5, 2), (6, 2)))
    y, handed = lora_linear(x, w, None, (), (b,), u, scaling=0.5)
    assert handed is None
    torch.testing.assert_close(y, x @ w.T + 0.5 * u @ b.T)
    assert torch.autograd.gradcheck(
        lambda *t: lora_linear(t[0], t[1], None, (), (t[3],), t[2], scaling=0.5)[0], (x, w, u, b)
    )
    with pytest.raises(ValueError, match="only with a residual"):
        lora_linear(x, w, None, (), (b,), scaling=0.5)

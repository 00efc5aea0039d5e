"""What backward keeps, counted with saved-tensor hooks: plain LoRA's x and u, no [M, K] tensor for a shortcut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from reslora_kernels import ResLoRAConfig, ResLoRALinear, link

M, K, R, LAYERS = 256, 128, 8, 4


def saved_for_backward(shortcut: str, pre_num: int) -> tuple[int, set[tuple[int, ...]]]:
    """Values kept beside parameters, each storage once, and their shapes; one chain whose inputs are outputs before."""
    config = ResLoRAConfig(r=R, shortcut=shortcut, pre_num=pre_num)
    layers = [ResLoRALinear(K, K, config=config) for _ in range(LAYERS)]
    chain = link(layers)
    parameters = {p.data_ptr() for layer in layers for p in layer.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.randn(M, K, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), chain.forward_pass():
        y = nn.Sequential(*layers)(x)
    y.sum().backward()
    return sum(t.untyped_storage().nbytes() // 4 for t in kept.values()), {tuple(t.shape) for t in kept.values()}


@pytest.mark.parametrize(("shortcut", "pre_num"), [("input", 1), ("middle", 1), ("middle", -1), ("block", 2)])
def test_a_shortcut_keeps_rank_sized_tensors_only(shortcut: str, pre_num: int) -> None:
    plain, plain_shapes = saved_for_backward("none", 0)
    assert plain == LAYERS * M * (K + R)
    values, shapes = saved_for_backward(shortcut, pre_num)
    handed = (LAYERS - 1) * M * R
    if shortcut == "block":  # nothing is handed on; u has one [M, r] part per block used
        handed = sum(min(pre_num, n) for n in range(LAYERS)) * M * R
    assert values <= plain + handed
    assert {shape for shape in shapes if shape[-1] >= K} == {shape for shape in plain_shapes if shape[-1] >= K}

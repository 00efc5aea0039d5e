"""functorch's transforms through an adapted model: per-sample gradients, ensembles of adapters, Jacobians, dropout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jacrev, vmap

from reslora_kernels import ResLoRAConfig, apply_reslora
from reslora_kernels.testing import max_error

from .models import randomize

SHORTCUTS = [("input", 1), ("block", 2), ("middle", 2)]


class Blocks(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(6, 6, bias=bias, dtype=torch.float64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return x


def blocks(shortcut: str, pre_num: int, bias: bool = True, p: float = 0.0) -> nn.Module:
    config = ResLoRAConfig(r=2, lora_alpha=6, shortcut=shortcut, pre_num=pre_num, lora_dropout=p)
    return randomize(apply_reslora(Blocks(bias), config))


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("shortcut", "pre_num"), SHORTCUTS)
@pytest.mark.filterwarnings("error::UserWarning")
class TestTransforms:
    def test_gradients_of_each_sample(self, shortcut: str, pre_num: int) -> None:
        model, x = blocks(shortcut, pre_num), torch.randn(4, 3, 6, dtype=torch.float64)

        def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
            return functional_call(model, parameters, (sample,)).square().sum()

        found = vmap(grad(loss), in_dims=(None, 0))(trained(model), x)
        for i, sample in enumerate(x):
            alone = torch.autograd.grad(
                model(sample).square().sum(), [p for p in model.parameters() if p.requires_grad]
            )
            for name, wanted in zip(found, alone, strict=True):
                assert max_error(found[name][i], wanted) < 1e-12

    @pytest.mark.parametrize("kind", ["lora_A", "lora_B"])
    def test_an_ensemble_of_adapters_on_one_input(self, shortcut: str, pre_num: int, kind: str) -> None:
        model, x = blocks(shortcut, pre_num, bias=False), torch.randn(3, 6, dtype=torch.float64)
        several = {name: torch.stack([p, -2 * p]) for name, p in trained(model).items() if kind in name}
        found = vmap(lambda parameters: functional_call(model, parameters, (x,)))(several)
        for i in range(2):
            wanted = functional_call(model, {name: p[i] for name, p in several.items()}, (x,))
            assert max_error(found[i], wanted) < 1e-13

    def test_jacobians(self, shortcut: str, pre_num: int) -> None:
        model, x = blocks(shortcut, pre_num), torch.randn(2, 6, dtype=torch.float64)
        wanted = torch.autograd.functional.jacobian(model, x)
        for transform in (jacrev, jacfwd):
            assert max_error(transform(model)(x), wanted) < 1e-12

    def test_dropout_draws_as_vmap_is_told(self, shortcut: str, pre_num: int) -> None:
        model = blocks(shortcut, pre_num, p=0.5).train()
        x = torch.randn(1, 3, 6, dtype=torch.float64).expand(2, 3, 6)
        one, two = vmap(model, randomness="same")(x)
        assert torch.equal(one, two)
        one, two = vmap(model, randomness="different")(x)
        assert not torch.equal(one, two)

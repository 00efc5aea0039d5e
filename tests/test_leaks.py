"""1,000 training steps leave nothing behind: as many tensors and bytes as after the warm-up, step for step."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from reslora_kernels import ResLoRAConfig, apply_reslora

from .models import randomize


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(8, 8)}) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block["proj"](x))
        return x


def tensors() -> list[torch.Tensor]:
    """All tensors that Python can reach."""
    gc.collect()
    return [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of a deprecated object that isinstance looks at
@pytest.mark.parametrize(("shortcut", "pre_num"), [("input", 1), ("middle", -1), ("block", 2)])
def test_a_thousand_steps(shortcut: str, pre_num: int) -> None:
    of_others = tensors()  # held, so that none of them goes meanwhile
    known = {id(tensor) for tensor in of_others}
    torch.manual_seed(0)
    config = ResLoRAConfig(r=2, shortcut=shortcut, pre_num=pre_num, lora_dropout=0.1)
    model = randomize(apply_reslora(Stack(), config, example_inputs=torch.zeros(1, 8))).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    x = torch.randn(2, 8)
    counts = []
    for step in range(1, 1001):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if step in (20, 500, 1000):
            own = [tensor for tensor in tensors() if id(tensor) not in known]
            counts.append((len(own), sum(tensor.untyped_storage().nbytes() for tensor in own)))
            del own
    assert counts[1:] == counts[:-1], counts

"""A small pre-norm residual network in float64, batches for it, and training that one process or many can do."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reslora_kernels import ResLoRAConfig, apply_reslora
from reslora_kernels.adapt.record import adapted_layers
from reslora_kernels.dtensors import gathered, reshard

from ..models import randomize

SHORTCUTS = ("none", "input", "block", "middle")
GATED = SHORTCUTS[1:]  # those with terms that gates can weigh
STEPS = 3
Batch = tuple[Tensor, Tensor]
Scenario = Callable[[Path], dict[str, Any]]


class Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)
        self.recompute: dict[str, Any] | None = None  # arguments of checkpoint, around this block's own computation

    def body(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if self.recompute is None else checkpoint(self.body, x, **self.recompute)


class Residual(nn.Module):
    def __init__(self, blocks: int = 4, width: int = 12, inner: int = 18) -> None:
        super().__init__()
        self.embed = nn.Linear(6, width)
        self.blocks = nn.ModuleList(Block(width, inner) for _ in range(blocks))
        self.head = nn.Linear(width, 3)
        self.recompute: dict[str, Any] | None = None  # arguments of checkpoint, around the calls of the blocks

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x) if self.recompute is None else checkpoint(block, x, **self.recompute)
        return self.head(x)


def residual(shortcut: str, *, dtype: torch.dtype = torch.float64, **config: Any) -> Residual:
    """Adapted, the same in every process."""
    torch.manual_seed(0)
    model = Residual().to(dtype)
    settings = ResLoRAConfig(r=3, lora_alpha=6, shortcut=shortcut, **{"pre_num": 2, **config})
    apply_reslora(model, settings, example_inputs=torch.zeros(1, 2, 6, dtype=dtype))
    randomize(model)
    return model


def batch(step: int, dtype: torch.dtype = torch.float64) -> Batch:
    """The global batch of a step: x [8, 5, 6] and targets [8, 5, 3]."""
    generator = torch.Generator().manual_seed(1000 + step)
    values = torch.randn(8, 5, 9, generator=generator, dtype=torch.float64).to(dtype)
    return values[..., :6].contiguous(), values[..., 6:]


def share(whole: Batch) -> Batch:
    """This process's rows of a global batch."""
    rank, size = dist.get_rank(), dist.get_world_size()
    return whole[0].chunk(size)[rank], whole[1].chunk(size)[rank]


def loss_of(model: nn.Module, part: Batch) -> Tensor:
    return nn.functional.mse_loss(
        model(part[0]).to(part[1].dtype), part[1]
    )  # of two dtypes PyTorch 2.8 has no gradient


Sync = Callable[[bool], AbstractContextManager[Any]]
Form = Callable[[nn.Module, Callable[[int], Batch], int, Sync], Tensor]


def plain(model: nn.Module, data: Callable[[int], Batch], step: int, sync: Sync) -> Tensor:
    loss = loss_of(model, data(step))
    loss.backward()
    return loss.detach()


def two_forwards(model: nn.Module, data: Callable[[int], Batch], step: int, sync: Sync) -> Tensor:
    """Two forwards before one backward, as in preference optimisation."""
    loss = loss_of(model, data(step)) - 0.3 * loss_of(model, data(step + 50))
    loss.backward()
    return loss.detach()


def accumulated(model: nn.Module, data: Callable[[int], Batch], step: int, sync: Sync) -> Tensor:
    """Gradient accumulation; gradients are exchanged in the last backward only."""
    total = torch.zeros((), dtype=torch.float64)
    for micro, last in ((0, False), (1, True)):
        with sync(last):
            loss = loss_of(model, data(step + 50 * micro)) / 2
            loss.backward()
        total += loss.detach()
    return total


FORMS: dict[str, Form] = {"plain": plain, "two_forwards": two_forwards, "accumulated": accumulated}


def train(model: nn.Module, data: Callable[[int], Batch], form: str = "plain", sync: Sync | None = None) -> list[float]:
    """Three AdamW steps with clipped gradients; the losses."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        losses.append(float(FORMS[form](model, data, step, sync or (lambda last: nullcontext()))))
        nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
    return losses


def adapters(model: nn.Module) -> dict[str, Tensor]:
    """The adapters by name, whole."""
    reshard(model)
    named = adapted_layers(model).items()
    kinds = ("lora_A", "lora_B", "lora_gates")
    held = {f"{name}.{kind}": getattr(layer, kind) for name, layer in named for kind in kinds}
    tensors = {name: tensor for name, tensor in held.items() if tensor is not None}
    return {name: tensor.clone() for name, tensor in gathered(tensors)[0].items()}


def mean_over_processes(values: list[float]) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor)
    return (tensor / dist.get_world_size()).tolist()


def difference(losses: list[float], model: nn.Module, expected: tuple[list[float], dict[str, Tensor]]) -> float:
    """Largest relative distance of losses (mean over processes) and of adapters from one process's."""
    distances = [abs(a - b) / abs(b) for a, b in zip(mean_over_processes(losses), expected[0], strict=True)]
    own = adapters(model)
    assert own.keys() == expected[1].keys()
    for name, truth in expected[1].items():
        distances.append(float((own[name] - truth).norm() / truth.norm()))
    return max(distances)


def in_one_process(shortcut: str, form: str = "plain", **config: Any) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and adapters of the same training on the global batches, without any other process."""
    model = residual(shortcut, **config)
    losses = train(model, batch, form)
    return losses, adapters(model)


def shared_data(step: int) -> Batch:
    return share(batch(step))


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def run_scenarios(folder: Path, scenarios: Mapping[str, Scenario], begin: Callable[[], None] = lambda: None) -> None:
    """As one of several processes, those that SCENARIOS names, or all; writes what each found, or its traceback."""
    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=size)
    begin()
    report = {}
    for name, scenario in scenarios.items():
        if not any(part in name for part in os.environ.get("SCENARIOS", "").split("|")):
            continue
        start = time.perf_counter()
        try:
            report[name] = scenario(folder)
        except Exception:
            report[name] = {"traceback": traceback.format_exc()}
        report[name]["seconds"] = time.perf_counter() - start
        (folder / f"report.{rank}.json").write_text(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()

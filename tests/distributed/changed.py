"""What two processes do to a model beside training it: change its adapters under DDP, save at once, wrap and cut it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.pipelining import ScheduleGPipe, SplitPoint, pipeline
from torch.nn.parallel import DistributedDataParallel

from reslora_kernels import (
    ResLoRAConfig,
    add_adapter,
    apply_reslora,
    export_peft,
    load_adapter,
    restart_reslora,
    save_adapter,
    set_adapter,
    start_adapters,
)
from reslora_kernels.peft import ResLoRAPeftConfig

from .residual import Block, Residual, Scenario, adapters, batch, residual, shared_data, train


def apart(model: nn.Module) -> float:
    """How far the parameters of this process are from those of the first."""
    own = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    first = own.clone()
    dist.broadcast(first, 0)
    return float((own - first).abs().max())


def batches_of_this_process() -> list[Tensor]:
    return [batch(100 + dist.get_rank())[0]]


def restarted(folder: Path) -> dict[str, Any]:
    """By who holds the model inside the wrapper, as a Trainer's callback does, and draws and data of its own."""
    model = residual("input")
    wrapper = DistributedDataParallel(model)
    torch.manual_seed(dist.get_rank())
    train(wrapper, shared_data)
    restart_reslora(model, calibration=batches_of_this_process())
    drawn = apart(model)
    train(wrapper, shared_data)
    return {"apart": [drawn, apart(model)]}


def started(folder: Path) -> dict[str, Any]:
    wrapper = DistributedDataParallel(residual("block", init_lora_weights="eva"))
    start_adapters(wrapper, batches_of_this_process())
    train(wrapper, shared_data)
    return {"apart": [apart(wrapper)]}


def refusal(work: Callable[[], Any]) -> str:
    try:
        work()
    except (ValueError, RuntimeError) as error:
        return f"{error.__cause__ or error}"
    return ""


def adapted_too_late(folder: Path) -> dict[str, Any]:
    """Adapters that DDP has not been given: made in the wrapper or inside it, or put in force since."""
    config = ResLoRAConfig(r=3)
    outside, inside = (DistributedDataParallel(Residual().double()) for _ in range(2))
    apply_reslora(outside, config)
    apply_reslora(inside.module, config)
    switched = DistributedDataParallel(residual("block"))
    add_adapter(switched, "other", config)
    set_adapter(switched, "other")
    held_by_peft = get_peft_model(Residual().double(), ResLoRAPeftConfig(r=3, target_modules=["up", "down"]))
    held_by_peft.add_adapter("other", ResLoRAPeftConfig(r=3, target_modules=["up", "down"]))
    peft = DistributedDataParallel(held_by_peft)
    train(peft, shared_data)
    held_by_peft.set_adapter("other")  # which was frozen when the wrapper was made
    for wrapper in (switched, peft):
        with torch.no_grad():
            wrapper(batch(0)[0])
    said = [refusal(partial(train, wrapper, shared_data)) for wrapper in (outside, inside, switched, peft)]
    set_adapter(switched, "default")
    train(switched, shared_data)
    return {"said": said, "apart": [apart(switched)]}


def saved_by_all(folder: Path) -> dict[str, Any]:
    wrapper = DistributedDataParallel(residual("block"))
    for _ in range(20):
        dist.barrier()
        save_adapter(wrapper, folder / "by-all")
        export_peft(wrapper, folder / "by-all-peft")
    dist.barrier()
    loaded, own = adapters(load_adapter(Residual().double(), folder / "by-all")), adapters(wrapper)
    return {"equal": all(torch.equal(loaded[name], own[name]) for name in own)}


def in_fsdp1(folder: Path) -> dict[str, Any]:
    """At the first forward, whether the wrapper is around the model alone or around its blocks too."""
    said = []
    for shortcut in ("none", "input"):
        for policy in (None, ModuleWrapPolicy({Block})):
            wrapper = FullyShardedDataParallel(
                residual(shortcut), use_orig_params=True, auto_wrap_policy=policy, device_id=torch.device("cpu")
            )
            said.append(refusal(partial(train, wrapper, shared_data)))
    return {"said": said}


class TwoReaders(nn.Module):
    """Layers that read one tensor: what they hand on is in parts of one product."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.query(x)) * self.key(x)


def traced(shortcut: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*[TwoReaders(8) for _ in range(4)]).double()
    apply_reslora(model, ResLoRAConfig(r=3, shortcut=shortcut, pre_num=2))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


def cut_by_tracing(shortcut: str, folder: Path) -> dict[str, Any]:
    """``pipelining.pipeline``, which traces the model; against one process."""
    rank, x, target = dist.get_rank(), torch.randn(4, 8, dtype=torch.float64), torch.zeros(4, 8, dtype=torch.float64)
    dist.broadcast(x, 0)
    model = traced(shortcut)
    pipe = pipeline(model, mb_args=(x[:2],), split_spec={"2": SplitPoint.BEGINNING})
    stage = pipe.build_stage(rank, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=nn.functional.mse_loss)
    schedule.step(x) if rank == 0 else schedule.step(target=target)
    whole = traced(shortcut)
    nn.functional.mse_loss(whole(x), target).backward()
    expected = {name: parameter.grad for name, parameter in whole.named_parameters()}
    found = {name: p.grad for name, p in stage.submod.named_parameters() if p.requires_grad}
    return {"difference": max(float((found[name] - expected[name]).abs().max()) for name in found)}


CHANGED: dict[str, Scenario] = {
    "ddp restarted": restarted,
    "ddp started": started,
    "ddp adapted too late": adapted_too_late,
    "ddp saved by all": saved_by_all,
    "fsdp1": in_fsdp1,
    "traced none": partial(cut_by_tracing, "none"),
    "traced middle": partial(cut_by_tracing, "middle"),
    "traced block": lambda folder: {"said": [refusal(lambda: cut_by_tracing("block", folder))]},
}

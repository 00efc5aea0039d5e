"""Saves by torch.distributed.checkpoint in which a process is killed at each file that it makes, opens or renames.

Two processes train a sharded model, save whole after a first step, and are saving after a second one when it happens.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from reslora_kernels import shard_reslora

from .residual import adapters, batch, loss_of, residual, share

OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=OPTIONS), strict=True))


def kill_at(point: int, folder: Path) -> None:
    """This process ends at its ``point``-th touch of a file in ``folder``, from any thread."""
    left = [point]

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.mkdir", "os.rename") and str(arguments[0]).startswith(str(folder)):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)


def train_and_save(rank: int, folder: Path, victim: int, point: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    model = residual("middle")
    shard_reslora(model, model.blocks)
    optimizer = optimizer_of(model)
    for step in (1, 2):
        optimizer.zero_grad()
        loss_of(model, share(batch(step))).backward()
        optimizer.step()
        own = adapters(model)
        if rank == 0:
            torch.save(own, folder / f"expected-{step}.pt")
        dist.barrier()
        if step == 2 and rank == victim:
            kill_at(point, folder / "step-2")
        dcp.async_save(state_of(model, optimizer), checkpoint_id=folder / f"step-{step}").result()
    dist.barrier()


def in_two_processes(folder: Path, victim: int, point: int) -> bool:
    """Whether the victim was killed."""
    pids = []
    for rank in (0, 1):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                train_and_save(rank, folder, victim, point)
                code = 0
            finally:
                os._exit(code)
        pids.append(pid)
    killed = os.waitstatus_to_exitcode(os.waitpid(pids[victim], 0)[1]) == -signal.SIGKILL
    if killed:
        os.kill(pids[1 - victim], signal.SIGKILL)  # it waits for the other
    os.waitpid(pids[1 - victim], 0)
    return killed


def loads_as(folder: Path, step: int) -> bool:
    """Whether one process goes on from a save with the adapters that the two had, bit for bit."""
    model = residual("middle")
    optimizer = optimizer_of(model)
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=folder / f"step-{step}")
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=OPTIONS
    )
    expected = torch.load(folder / f"expected-{step}.pt", weights_only=True)
    own = adapters(model)
    return own.keys() == expected.keys() and all(torch.equal(own[name], value) for name, value in expected.items())


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    report = []
    for victim in (0, 1):
        point, killed = 0, True
        while killed:
            point += 1
            own = folder / f"{victim}-{point}"
            own.mkdir()
            killed = in_two_processes(own, victim, point)
            found = {"victim": victim, "point": point, "killed": killed, "first": loads_as(own, 1)}
            found["whole"] = (own / "step-2" / ".metadata").exists()
            found["second"] = loads_as(own, 2) if found["whole"] else None
            report.append(found)
            print(found, flush=True)
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

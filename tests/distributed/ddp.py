"""What DDP must do: scenarios that two processes run together, each returning what the tests look at."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from reslora_kernels import load_adapter, save_adapter

from .residual import FORMS, SHORTCUTS, adapters, difference, in_one_process, residual, shared_data, train

Scenario = Callable[[Path], dict[str, Any]]


def equals_one_process(shortcut: str, form: str, folder: Path, **config: Any) -> dict[str, Any]:
    model = DistributedDataParallel(residual(shortcut, **config))
    losses = train(model, shared_data, form, lambda last: nullcontext() if last else model.no_sync())
    return {"difference": difference(losses, model, in_one_process(shortcut, form, **config))}


def saved_under_plain_names(folder: Path) -> dict[str, Any]:
    model = DistributedDataParallel(residual("middle"))
    train(model, shared_data)
    if dist.get_rank() == 0:
        save_adapter(model, folder / "ddp-adapter")
    dist.barrier()
    loaded = adapters(load_adapter(residual("middle"), folder / "ddp-adapter"))
    own = adapters(model)
    return {"equal": all(torch.equal(loaded[name], own[name]) for name in own), "names": sorted(loaded)}


SCENARIOS: dict[str, Scenario] = {
    **{
        f"ddp {form} {shortcut}": partial(equals_one_process, shortcut, form)
        for form in FORMS
        for shortcut in SHORTCUTS
    },
    "ddp saved": saved_under_plain_names,
}

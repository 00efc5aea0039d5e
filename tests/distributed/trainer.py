"""Transformers' Trainer in two processes, with AdapterCheckpoints and ResLoRACallback: saving, evaluation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from reslora_kernels import load_adapter, merge_reslora, shard_reslora
from reslora_kernels.training import ResLoRACallback

from ..models import llama, randomize
from ..test_training import trained, trainer
from .residual import adapters

Scenario = Callable[[Path], dict[str, Any]]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def frozen(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def saved(shortcut: str, folder: Path) -> dict[str, Any]:
    """By the Trainer at its checkpoints under DDP; by hand, from a model that FSDP2 shards."""
    run = trainer(folder / f"saved-{shortcut}", shortcut, ResLoRACallback())
    run.train()
    wrapped = type(run.model_wrapped).__name__
    run.save_model(str(folder / f"ddp-{shortcut}"))
    dist.barrier()
    whole = adapters(run.model)
    found = [folder / f"ddp-{shortcut}", folder / f"saved-{shortcut}" / "checkpoint-6"]
    ddp = all(same(adapters(load_adapter(llama(), path)), whole) for path in found)

    other = trainer(folder / f"sharded-{shortcut}", shortcut, ResLoRACallback())
    randomize(other.model)
    whole = adapters(other.model)
    shard_reslora(other.model, other.model.model.layers)
    other.save_model(str(folder / f"fsdp-{shortcut}"))
    loaded = adapters(load_adapter(llama(), folder / f"fsdp-{shortcut}"))
    return {"wrapped": wrapped, "ddp": ddp, "fsdp": same(loaded, whole), "names": sorted(loaded)}


def merged_evaluation(shortcut: str, folder: Path) -> dict[str, Any]:
    """Training goes on as if every evaluation had been unmerged; each of those saw what a merge by hand gives."""
    options = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "save_strategy": "no"}
    callback = ResLoRACallback(evaluate="merged")
    run = trainer(folder / f"merged-{shortcut}", shortcut, callback, **options)
    before = frozen(run.model)
    run.train()
    restored = same(before, frozen(run.model))
    plain = trainer(folder / f"unmerged-{shortcut}", shortcut, ResLoRACallback(), **options)
    plain.train()
    trained_alike = same(trained(run.model), trained(plain.model))
    seen, unmerged = ([e["eval_loss"] for e in t.state.log_history if "eval_loss" in e] for t in (run, plain))
    merge_reslora(run.model, statistics=callback.statistics)
    by_hand = run.evaluate()["eval_loss"]
    return {"restored": restored, "trained_alike": trained_alike, "seen": seen, "unmerged": unmerged, "hand": by_hand}


SCENARIOS: dict[str, Scenario] = {
    **{f"trainer saved {shortcut}": partial(saved, shortcut) for shortcut in ("input", "block")},
    **{f"trainer merged {shortcut}": partial(merged_evaluation, shortcut) for shortcut in ("input", "middle")},
}

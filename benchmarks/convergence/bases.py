"""The pre-trained models that methods adapt, one per kind of task, kept beside the runs."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from benchmarks.convergence.settings import Sizes
from benchmarks.convergence.tasks.kinds import Task


def base_of(task: Task, sizes: Sizes, folder: Path, device: torch.device) -> nn.Module:
    """The task's base model, frozen; pre-trained now unless ``folder`` has the weights of these sizes."""
    return task.prepared(pretrained(task, sizes, folder, device)).to(device).eval().requires_grad_(False)


def pretrained(task: Task, sizes: Sizes, folder: Path, device: torch.device) -> nn.Module:
    """The model before ``task.prepared``."""
    from safetensors.torch import load_model, save_model

    path, model = weights_file(task, sizes, folder), task.base(sizes)
    if task.comes_trained:
        return model
    if path.exists():
        load_model(model, path)
        return model
    task.pretrain(model.to(device), sizes)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_model(model.to("cpu"), str(temporary))
    os.replace(temporary, path)
    return model


def weights_file(task: Task, sizes: Sizes, folder: Path) -> Path:
    """Named after what the weights depend on."""
    digest = hashlib.sha256(json.dumps(asdict(sizes), sort_keys=True).encode()).hexdigest()[:12]
    return folder / f"{task.kind}-{digest}.safetensors"

"""What is compared, ResLoRA with each shortcut and PEFT's methods, and the base models of which each adapts a copy."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.convergence.settings import BASELINE, Sizes
from benchmarks.convergence.tasks.kinds import Task
from reslora_kernels import ResLoRAConfig, apply_reslora
from reslora_kernels.config import Gates, Shortcut


@dataclass(frozen=True)
class Method:
    """``adapt`` changes a model for a run of so many steps; ``after_step``, if any, is called with what it returned.

    ``merges`` says whether merges are measured: this package's. B learns ``ratio`` times as fast as A, as in LoRA+.
    """

    title: str
    adapt: Callable[[nn.Module, Task, int], nn.Module]
    after_step: Callable[[Any, int], None] | None = None
    merges: bool = False
    ratio: float | None = None


def _reslora(
    title: str,
    shortcut: Shortcut,
    pre_num: int = 2,
    r: int | None = None,
    ratio: float | None = None,
    gates: Gates = "none",
    gates_init: float = 1.0,
) -> Method:
    def adapt(model: nn.Module, task: Task, steps: int) -> nn.Module:
        config = ResLoRAConfig(
            r=r or task.r, lora_alpha=2 * (r or task.r), shortcut=shortcut, pre_num=pre_num, gates=gates,
            gates_init=gates_init,
            target_modules=list(task.targets), modules_to_save=list(task.trained_whole) or None,
        )  # fmt: skip
        return apply_reslora(model, config)

    return Method(title, adapt, merges=True, ratio=ratio)


def _peft(title: str, config_of: Callable[[Any, int, int], Any], **more: Any) -> Method:
    def adapt(model: nn.Module, task: Task, steps: int) -> nn.Module:
        import peft

        config = config_of(peft, task.r, steps)
        config.target_modules, config.modules_to_save = set(task.targets), list(task.trained_whole) or None
        adapted: nn.Module = peft.get_peft_model(model, config)
        return adapted

    return Method(title, adapt, **more)


_SHORTCUTS: dict[str, tuple[Shortcut, int]] = {  # by name: the shortcut, and pre_num
    "input": ("input", 1),
    "block": ("block", 2),
    "middle": ("middle", 2),
    "block-1": ("block", 1),
    "middle-1": ("middle", 1),
    "block-4": ("block", 4),
    "middle-4": ("middle", 4),
    "block-all": ("block", -1),
    "middle-all": ("middle", -1),
}
GATES: dict[str, tuple[Gates, float]] = {  # by the name's ending: of what shape, and where they start
    "gates": ("rank", 1.0),
    "gates-0": ("rank", 0.0),
    "scalar": ("scalar", 1.0),
    "scalar-0": ("scalar", 0.0),
}


def _title(shortcut: str, pre_num: int) -> str:
    reach = "" if shortcut == "input" else ", all" if pre_num == -1 else f", {pre_num}"
    return f"ResLoRA {shortcut}{reach}"


UNGATED = {
    BASELINE: _reslora("LoRA", "none"),
    "lora-8": _reslora("LoRA r=8", "none", r=8),
    "lora-16": _reslora("LoRA r=16", "none", r=16),
    **{name: _reslora(_title(*chosen), *chosen) for name, chosen in _SHORTCUTS.items()},
    "adalora": _peft(
        "AdaLoRA",
        lambda peft, r, steps: peft.AdaLoraConfig(
            init_r=3 * r // 2,
            target_r=r,
            lora_alpha=2 * r,
            total_step=steps,
            tinit=steps // 10,
            tfinal=steps // 3,
            deltaT=5,
        ),
        after_step=lambda model, step: model.base_model.update_and_allocate(step),
    ),
    "loraplus": _reslora("LoRA+, 16", "none", ratio=16.0),
    "dora": _peft("DoRA", lambda peft, r, _: peft.LoraConfig(r=r, lora_alpha=2 * r, use_dora=True)),
    "rslora": _peft("rsLoRA", lambda peft, r, _: peft.LoraConfig(r=r, lora_alpha=2 * r, use_rslora=True)),
    "pissa": _peft(
        "PiSSA", lambda peft, r, _: peft.LoraConfig(r=r, lora_alpha=2 * r, init_lora_weights="pissa_niter_4")
    ),
    "loha": _peft("LoHa", lambda peft, r, _: peft.LoHaConfig(r=r, alpha=2 * r)),
    "lokr": _peft("LoKr", lambda peft, r, _: peft.LoKrConfig(r=r, alpha=2 * r)),
}
METHODS = UNGATED | {
    f"{name}-{ending}": _reslora(
        f"{_title(*chosen)}, {'scalar ' if gates == 'scalar' else ''}gates from {start:g}", *chosen,
        gates=gates, gates_init=start,
    )
    for name, chosen in _SHORTCUTS.items()
    for ending, (gates, start) in GATES.items()
}  # fmt: skip


def adapted(base: nn.Module, task: Task, method: str, steps: int, seed: int) -> nn.Module:
    """A copy of ``base`` with fresh adapters; the seed draws them."""
    torch.manual_seed(seed)
    return METHODS[method].adapt(copy.deepcopy(base), task, steps)


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

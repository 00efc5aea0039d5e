"""DeepSpeed's ZeRO-2 and ZeRO-3 on two CPU processes against one process, in float32."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from reslora_kernels import (
    ResLoRAConfig,
    apply_reslora,
    checkpoint_context,
    export_peft,
    load_adapter,
    merge_reslora,
    save_adapter,
)
from reslora_kernels.training import ResLoRACallback

from ..models import llama, randomize
from ..test_training import trainer
from .fsdp import refused
from .residual import (
    SHORTCUTS,
    STEPS,
    Batch,
    Residual,
    Scenario,
    adapters,
    batch,
    difference,
    loss_of,
    residual,
    same,
    share,
    train,
)

FORMS = ("plain", "two_forwards", "accumulated")


def rows(step: int) -> Batch:
    return batch(step, torch.float32)


IN_GROUPS = {"zero_hpz_partition_size": 2}  # ZeRO++: weights spread over the processes of a node
OFFLOADED = {f"offload_{what}": {"device": "cpu", "pin_memory": False} for what in ("param", "optimizer")}


def settings(stage: int, accumulated: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": accumulated,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **more},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # which is compiled at run time
    }


def engine_of(model: nn.Module, stage: int, accumulated: int = 1, **more: Any) -> Any:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    config = settings(stage, accumulated, **more)
    return deepspeed.initialize(model=model, model_parameters=trained, optimizer=optimizer, config=config)[0]


def trained(engine: Any, form: str = "plain", steps: range = range(STEPS)) -> list[float]:
    losses = []
    for step in steps:
        total = 0.0
        for micro in (0, 1) if form == "accumulated" else (0,):
            loss = loss_of(engine, share(rows(step + 50 * micro)))
            if form == "two_forwards":
                loss = loss - 0.3 * loss_of(engine, share(rows(step + 50)))
            engine.backward(loss)
            engine.step()
            total += float(loss.detach()) / (2 if form == "accumulated" else 1)
        losses.append(total)
    return losses


def one(shortcut: str, **config: Any) -> Residual:
    return residual(shortcut, dtype=torch.float32, **config)


def recompute(model: Any) -> None:
    for block in model.blocks:
        block.recompute = {"use_reentrant": False, "context_fn": checkpoint_context(model)}


def equals_one_process(
    stage: int, shortcut: str, form: str, folder: Path, zero: dict[str, Any] | None = None, **config: Any
) -> dict[str, Any]:
    """Trained, and saved by all processes (ZeRO-3) or by one (ZeRO-2). ``plain`` recomputes the blocks."""
    more = zero or {}
    model = one(shortcut, **config)
    if form == "plain":
        recompute(model)
    engine = engine_of(model, stage, 2 if form == "accumulated" else 1, **more)
    losses = trained(engine, form)
    alone = one(shortcut, **config)
    expected = train(alone, rows, form), adapters(alone)
    path = folder / " ".join([str(stage), form, shortcut, *more])
    if stage == 3 or dist.get_rank() == 0:
        save_adapter(engine, path)
    dist.barrier()
    loaded = load_adapter(Residual(), path)
    return {
        "difference": difference(losses, engine, expected),
        "equal": same(adapters(loaded), adapters(engine)),
        "apart": stage != 3 or all(p.numel() == 0 for p in model.parameters()),
    }


def gathered_while_needed(folder: Path) -> dict[str, Any]:
    """After a forward, before its backward, no process holds a whole frozen weight."""
    model = one("input")
    engine = engine_of(model, 3)
    kept: list[int] = []
    loss = loss_of(engine, share(rows(0)))
    kept = [p.numel() for p in model.parameters() if p.numel()]
    engine.backward(loss)
    return {"kept": sum(kept), "all": sum(p.ds_numel for p in model.parameters())}


def made_in_parts(shortcut: str, folder: Path) -> dict[str, Any]:
    """Adapted where ``zero.Init`` has spread the frozen weights already, as ``from_pretrained`` does."""
    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=settings(3)):
        model = Residual()
    apply_reslora(model, ResLoRAConfig(r=3, lora_alpha=6, shortcut=shortcut, pre_num=2))
    randomize(model)
    engine = engine_of(model, 3)
    losses = trained(engine)
    alone = one(shortcut)
    return {"difference": difference(losses, engine, (train(alone, rows), adapters(alone)))}


def from_pretrained(folder: Path) -> dict[str, Any]:
    """A model of Transformers that is never whole in any process."""
    from transformers import LlamaForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    plain = llama()
    if dist.get_rank() == 0:
        plain.save_pretrained(folder / "llama")
    dist.barrier()
    config = ResLoRAConfig(r=2, shortcut="input", target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    kept = HfDeepSpeedConfig(settings(3))
    model: Any = LlamaForCausalLM.from_pretrained(folder / "llama")
    spread = all(p.numel() == 0 for p in model.parameters())
    del kept
    engine = engine_of(randomize(apply_reslora(model, config)), 3)
    alone: Any = randomize(apply_reslora(plain, config))
    tokens = torch.randint(2, 48, (4, 9), generator=torch.Generator().manual_seed(1))
    loss, truth = (which(input_ids=tokens, labels=tokens).loss for which in (engine, alone))
    save_adapter(engine, folder / "parts")
    loaded = load_adapter(llama(), folder / "parts")
    return {
        "spread": spread,
        "difference": float((loss - truth).detach().abs() / truth.detach()),
        "equal": same(adapters(loaded), adapters(alone)) and torch.equal(loaded.lm_head.weight, plain.lm_head.weight),
    }


def resumed(folder: Path) -> dict[str, Any]:
    """DeepSpeed's own checkpoint after two steps: a third one from it is that of the engine which wrote it."""
    first = engine_of(one("block"), 3)
    trained(first, steps=range(2))
    first.save_checkpoint(str(folder / "checkpoint"), exclude_frozen_parameters=True)
    losses = trained(first, steps=range(2, 3))
    second = engine_of(randomize(one("block"), seed=5), 3)
    second.load_checkpoint(str(folder / "checkpoint"), load_module_strict=False)
    again = trained(second, steps=range(2, 3))
    return {"equal": losses == again and same(adapters(first), adapters(second))}


def refusals(folder: Path) -> dict[str, Any]:
    engine = engine_of(one("block"), 3)
    save_adapter(engine, folder / "refusals")

    def needs_weights(**config: Any) -> Callable[[], Any]:
        with deepspeed.zero.Init(config_dict_or_path=settings(3)):
            model = Residual()
        return lambda: apply_reslora(model, ResLoRAConfig(r=3, **config))

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x)[0]

    attention = apply_reslora(Both(), ResLoRAConfig(r=2, shortcut="none", target_modules=["attention"]))
    spread = engine_of(attention, 3)
    return {
        "merge": refused(lambda: merge_reslora(engine)),
        "export": refused(lambda: export_peft(engine, folder / "peft")),
        "load": refused(lambda: load_adapter(engine, folder / "refusals")),
        "dora": refused(needs_weights(use_dora=True)),
        "pissa": refused(needs_weights(init_lora_weights="pissa")),
        "attention": refused(lambda: spread(torch.zeros(1, 3, 8))),
    }


def by_the_trainer(shortcut: str, folder: Path) -> dict[str, Any]:
    """Transformers' Trainer under ZeRO-3 and under DDP; what it saves, and a run that goes on from its checkpoint."""
    stage = settings(3) | {"train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto"}
    options = {
        "max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "eval_steps": 2, "eval_strategy": "steps",
        "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True,
    }  # fmt: skip
    runs = []
    for name, more in (("ddp", {}), ("zero", {"deepspeed": stage}), ("resumed", {"deepspeed": stage})):
        path = folder / f"trainer {shortcut} {name}"
        run = trainer(path, shortcut, ResLoRACallback(), **options, **more)
        first = folder / f"trainer {shortcut} zero" / "checkpoint-2"
        run.train(resume_from_checkpoint=str(first) if name == "resumed" else None)
        runs.append((run, adapters(load_adapter(llama(), path / "checkpoint-4"))))
    (ddp, expected), (zero, found), (_, again) = runs
    losses = [[e["loss"] for e in run.state.log_history if "loss" in e] for run in (ddp, zero)]
    distances = [abs(a - b) / b for a, b in zip(*reversed(losses), strict=True)]
    distances += [float((found[name] - value).norm() / value.norm()) for name, value in expected.items()]
    best = adapters(load_adapter(llama(), folder / f"trainer {shortcut} zero" / "checkpoint-2"))
    return {
        "difference": max(distances),
        "equal": same(best, adapters(zero.model)) and same(found, again) and not same(best, found),
        "spread": type(zero.model_wrapped).__name__ == "DeepSpeedEngine",
    }


SCENARIOS: dict[str, Scenario] = {
    **{
        f"zero {stage} {form} {shortcut}": partial(equals_one_process, stage, shortcut, form)
        for stage in (2, 3)
        for form in FORMS
        for shortcut in SHORTCUTS
    },
    "zero 3 dora": partial(equals_one_process, 3, "input", "two_forwards", use_dora=True),
    "zero 3 in groups": partial(equals_one_process, 3, "block", "two_forwards", zero=IN_GROUPS),
    "zero 3 offloaded": partial(equals_one_process, 3, "middle", "two_forwards", zero=OFFLOADED),
    "zero 3 projections": partial(equals_one_process, 3, "input", "accumulated", stack_projections=True),
    **{f"made in parts {shortcut}": partial(made_in_parts, shortcut) for shortcut in SHORTCUTS},
    **{f"trainer {shortcut}": partial(by_the_trainer, shortcut) for shortcut in ("block", "middle")},
    "gathered": gathered_while_needed,
    "from_pretrained": from_pretrained,
    "resumed": resumed,
    "refusals": refusals,
}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled at run time otherwise
    deepspeed.init_distributed(
        "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=size, auto_mpi_discovery=False
    )
    report = {}
    for name, scenario in SCENARIOS.items():
        if not any(part in name for part in os.environ.get("SCENARIOS", "").split("|")):
            continue
        try:
            report[name] = scenario(folder)
        except Exception:
            report[name] = {"traceback": traceback.format_exc()}
        (folder / f"report.{rank}.json").write_text(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Run in an interpreter that has DeepSpeed: ZeRO-2 on two CPU processes against one process, in float32."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from reslora_kernels import checkpoint_context, load_adapter, save_adapter

from .residual import SHORTCUTS, STEPS, Batch, adapters, batch, difference, loss_of, residual, share, train


def data(step: int) -> Batch:
    return batch(step, torch.float32)


def equals_one_process(shortcut: str, form: str, folder: Path) -> dict[str, Any]:
    model = residual(shortcut, dtype=torch.float32)
    if form == "plain":
        for block in model.blocks:
            block.recompute = {"use_reentrant": False, "context_fn": checkpoint_context(model)}
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=trained,
        optimizer=torch.optim.AdamW(trained, lr=1e-2),
        config={
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 2 if form == "accumulated" else 1,
            "gradient_clipping": 0.5,
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
        },
    )
    losses = []
    for step in range(STEPS):
        total = 0.0
        for micro in (0, 1) if form == "accumulated" else (0,):
            loss = loss_of(engine, share(data(step + 50 * micro)))
            if form == "two_forwards":
                loss = loss - 0.3 * loss_of(engine, share(data(step + 50)))
            engine.backward(loss)
            engine.step()
            total += float(loss.detach()) / (2 if form == "accumulated" else 1)
        losses.append(total)
    alone = residual(shortcut, dtype=torch.float32)
    expected = train(alone, data, form), adapters(alone)
    if dist.get_rank() == 0:
        save_adapter(engine, folder / shortcut)
    dist.barrier()
    loaded, own = adapters(load_adapter(residual(shortcut, dtype=torch.float32), folder / shortcut)), adapters(engine)
    return {
        "difference": difference(losses, engine, expected),
        "equal": all(torch.equal(loaded[name], tensor) for name, tensor in own.items()),
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled at run time otherwise
    deepspeed.init_distributed(
        "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=size, auto_mpi_discovery=False
    )
    forms = ("plain", "two_forwards", "accumulated")
    report = {f"{form} {s}": equals_one_process(s, form, folder) for s in SHORTCUTS for form in forms}
    (folder / f"report.{rank}.json").write_text(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

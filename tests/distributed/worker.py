"""One of the processes that run all scenarios together; writes what each found, or its traceback."""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from . import ddp, fsdp, pipeline, recipes, trainer

SCENARIOS = ddp.SCENARIOS | fsdp.SCENARIOS | pipeline.SCENARIOS | recipes.SCENARIOS | trainer.SCENARIOS


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=datetime.timedelta(seconds=60),
    )
    chosen = os.environ.get("SCENARIOS", "")
    report = {}
    for name, scenario in SCENARIOS.items():
        if not any(part in name for part in chosen.split("|")):
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


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Run by torchrun: a script of examples/, as it stands, on the CPU; whether every adapter of it has trained."""

from __future__ import annotations

import gc
import json
import os
import runpy
import sys
from pathlib import Path

import torch

from reslora_kernels import load_adapter

from .residual import adapters

EXAMPLES = Path(__file__).parents[2] / "examples"


def main(name: str, folder: Path) -> None:
    torch.set_num_threads(1)
    os.chdir(folder)
    sys.path.insert(0, str(EXAMPLES))
    if name == "fsdp2_accelerate":
        import accelerate

        from .fsdp_on_cpu import FSDPOnCPU

        accelerate.Accelerator = FSDPOnCPU
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    gc.collect()  # gloo's threads are to end before the interpreter does
    if os.environ["RANK"] == "0":
        from stand_ins import language_model

        loaded = adapters(load_adapter(language_model(), folder / "adapter"))
        moved = [bool(value.abs().max() > 0) for key, value in loaded.items() if key.endswith("lora_B")]
        (folder / "report.json").write_text(json.dumps({"trained": all(moved), "layers": len(moved)}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

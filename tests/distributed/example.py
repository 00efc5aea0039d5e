"""Run by torchrun or accelerate launch: an example of the README, word for word, on a tiny model and the CPU."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import accelerate
import torch
from accelerate import DistributedType, PartialState

from reslora_kernels import load_adapter

from ..models import VOCABULARY, llama
from .residual import adapters

EXAMPLES = Path(__file__).parent / "examples"


class FSDPOnCPU(accelerate.Accelerator):
    """Serves FSDP2 on the CPU too, where accelerate's own ignores the plugin."""

    def __init__(self, *, fsdp_plugin: Any) -> None:
        PartialState(cpu=True).distributed_type = DistributedType.FSDP
        super().__init__(fsdp_plugin=fsdp_plugin)
        self.state.fsdp_plugin = fsdp_plugin


def main(name: str, folder: Path) -> None:
    torch.set_num_threads(1)
    data: Any = ModuleType("my_data")
    generator = torch.Generator().manual_seed(3)
    data.load_tokens = lambda: torch.randint(2, VOCABULARY, (16, 9), generator=generator)
    sys.modules["my_data"] = data
    accelerate.Accelerator = FSDPOnCPU
    source = (EXAMPLES / f"{name}.py").read_text()
    for given, tiny in (('"path/or/id"', folder / "model"), ('"adapter"', folder / "adapter")):
        assert given in source
        source = source.replace(given, repr(str(tiny)))
    names: dict[str, Any] = {}
    exec(compile(source, name, "exec"), names)
    names.clear()  # gloo's threads are to end before the interpreter does
    gc.collect()
    if os.environ["RANK"] == "0":
        loaded = adapters(load_adapter(llama(layers=2), folder / "adapter"))
        moved = [bool(value.abs().max() > 0) for key, value in loaded.items() if key.endswith("lora_B")]
        (folder / "report.json").write_text(json.dumps({"trained": all(moved), "layers": len(moved)}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

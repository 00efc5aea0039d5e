"""Run by accelerate launch: a tiny LLaMA trained through ``Accelerator`` with DDP, with FSDP2 and in one process."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor

from reslora_kernels import ResLoRAConfig, apply_reslora, load_adapter, save_adapter, shard_reslora

from ..models import VOCABULARY, llama, randomize
from .fsdp import refused
from .residual import adapters, difference

STEPS = 3


class FSDPOnCPU(Accelerator):
    """Serves FSDP2 on the CPU too, where accelerate ignores its plugin."""

    def __init__(self, *, fsdp_plugin: Any) -> None:
        PartialState(cpu=True).distributed_type = DistributedType.FSDP
        super().__init__(fsdp_plugin=fsdp_plugin)
        self.state.fsdp_plugin = fsdp_plugin


def model_of(shortcut: str) -> Any:
    model = llama(layers=3).double().train()
    config = ResLoRAConfig(r=3, lora_alpha=6, target_modules=("q_proj", "v_proj", "down_proj"), shortcut=shortcut)
    return randomize(apply_reslora(model, config))


def tokens() -> Tensor:
    """[8 * STEPS, 9]: every step's global batch is 8 rows."""
    return torch.randint(2, VOCABULARY, (8 * STEPS, 9), generator=torch.Generator().manual_seed(5))


def trained(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def alone(shortcut: str) -> tuple[list[float], dict[str, Tensor]]:
    model = model_of(shortcut)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    losses = []
    for rows in tokens().split(8):
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained(model), 0.5)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, adapters(model)


def together(accelerator: Any, model: Any) -> tuple[list[float], Any]:
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    loader = torch.utils.data.DataLoader(tokens(), batch_size=8 // accelerator.num_processes)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for rows in loader:
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained(model), 0.5)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, model


def plugin(policy: str) -> Any:
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy=policy,
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"] if policy != "no_wrap" else None,
        cpu_ram_efficient_loading=False,
    )


def start(fsdp: Any = None) -> Any:
    """A new accelerator: for DDP, or for FSDP2 with a plugin."""
    AcceleratorState._reset_state()  # of the scenario before; the process group stays
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_CPU
    accelerator = Accelerator() if fsdp is None else FSDPOnCPU(fsdp_plugin=fsdp)
    assert accelerator.is_fsdp2 == (fsdp is not None) and accelerator.num_processes == dist.get_world_size()
    return accelerator


def scenarios(folder: Path) -> dict[str, dict[str, Any]]:
    report: dict[str, dict[str, Any]] = {}
    for shortcut in ("input", "block"):
        expected = alone(shortcut)
        accelerator = start()
        losses, model = together(accelerator, model_of(shortcut))
        report[f"DDP {shortcut}"] = {
            "kind": type(model).__name__,
            "difference": difference(losses, model, expected),
        }
        accelerator = start(plugin("no_wrap"))
        model = model_of(shortcut)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        shard_reslora(model, model.model.layers)
        losses, model = together(accelerator, model)
        save_adapter(model, folder / shortcut)
        loaded = adapters(load_adapter(llama(layers=3).double(), folder / shortcut))
        report[f"FSDP2 {shortcut}"] = {
            "kind": type(model).__name__,
            "difference": difference(losses, model, expected),
            "equal": all(torch.equal(loaded[name], value) for name, value in adapters(model).items()),
        }
    wrapped = start(plugin("transformer_based_wrap"))
    report["its own wrap policy"] = refused(lambda: together(wrapped, model_of("block")))
    return report


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    PartialState(cpu=True)
    report = scenarios(folder)
    (folder / f"report.{os.environ['RANK']}.json").write_text(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()
    # Not through the interpreter's teardown: a thread of PyTorch's that asks for the GIL there ends the process with
    # "terminate called without an active exception", now and then on a loaded machine.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

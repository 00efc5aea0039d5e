"""Run by torchrun: scripts of examples/ as they stand, or DDP training that survives the death of a rank.

In the latter one rank kills itself in the middle of a step. After the restart the training goes on from the last
checkpoint to its end. Then the same processes train once more from the start, undisturbed, and compare bit for bit.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from reslora_kernels import load_adapter, save_adapter

from .residual import adapters, loss_of, residual, shared_data

EXAMPLES = Path(__file__).parents[2] / "examples"
SEVERAL_PROCESSES = ("ddp", "fsdp2", "fsdp2_accelerate", "fsdp2_nf4", "pipeline", "tensor_parallel")
LENGTH, EVERY, KILLED_AT = 8, 3, 4


def train(folder: Path, *, kill: bool) -> tuple[int, nn.Module, list[float]]:
    """To the end, from the newest checkpoint in ``folder`` if there is one; (first step, model, losses)."""
    rank = dist.get_rank()
    base = residual("middle", lora_dropout=0.1).train()
    checkpoints = sorted(folder.glob("step-*"))
    start = 0
    if checkpoints:
        load_adapter(base, checkpoints[-1])
    model = DistributedDataParallel(base)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(100 + rank)
    if checkpoints:
        state = torch.load(checkpoints[-1] / "trainer.pt", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"][rank])
        start = state["step"]
    losses = []
    for step in range(start, LENGTH):
        loss = loss_of(model, shared_data(step))
        if kill and step == KILLED_AT and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if (step + 1) % EVERY == 0:
            save(folder, model, optimizer, step + 1)
    return start, model, losses


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """A checkpoint under its final name is whole: it is written under another one and renamed."""
    own = torch.get_rng_state()
    random: list[Tensor] = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(random, own)
    if dist.get_rank() == 0:
        temporary = folder / f"writing-{step}"
        save_adapter(model, temporary)
        state = {"optimizer": optimizer.state_dict(), "step": step, "random": random}
        torch.save(state, temporary / "trainer.pt")
        os.replace(temporary, folder / f"step-{step:03}")
    dist.barrier()


def compared(folder: Path, attempt: int) -> dict[str, Any]:
    """Train to the end, then once more from the start, undisturbed."""
    start, model, losses = train(folder, kill=attempt == 0)
    undisturbed = folder / f"undisturbed-{dist.get_rank()}"
    undisturbed.mkdir()
    _, expected, all_losses = train(undisturbed, kill=False)
    own, other = adapters(model), adapters(expected)
    return {
        "attempt": attempt,
        "resumed_from": start,
        "equal": all(torch.equal(own[name], value) for name, value in other.items()),
        "losses_equal": losses == all_losses[start:],
    }


def run_elastic(folder: Path) -> None:
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / f'rendezvous-{attempt}'}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    report = compared(folder, attempt)
    (folder / f"report.{dist.get_rank()}.json").write_text(json.dumps(report))
    dist.barrier()  # else one process closes connections that the other is still reading
    dist.destroy_process_group()


def run_examples(folder: Path) -> None:
    """On the CPU, each in a fork of this process, which imports for all, and with a store of its own."""
    for library in ("accelerate", "transformers"):
        importlib.import_module(library)
    codes = {}
    for name in SEVERAL_PROCESSES:
        (folder / name).mkdir(exist_ok=True)
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": free_port(folder / name)}
        child = os.fork()
        if not child:
            return run_example(name, folder / name)
        codes[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if any(codes.values()):
        raise SystemExit(f"exit codes {codes}")
    return None


def free_port(folder: Path) -> str:
    """That the first rank finds, of this attempt."""
    file = folder / f"port-{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    if os.environ["RANK"] == "0":
        with socket.create_server(("127.0.0.1", 0)) as server:
            file.with_suffix(".written").write_text(str(server.getsockname()[1]))
        file.with_suffix(".written").rename(file)
    while not file.exists():
        time.sleep(0.01)
    return file.read_text()


def run_example(name: str, folder: Path) -> None:
    """Reports whether every adapter of it has trained."""
    os.chdir(folder)
    sys.path.insert(0, str(EXAMPLES))
    if name == "fsdp2_accelerate":
        import accelerate

        from .accelerated import FSDPOnCPU

        accelerate.Accelerator = FSDPOnCPU
    if name == "zero3_accelerate":
        import deepspeed
        from accelerate.state import PartialState

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled at run time otherwise
        PartialState(cpu=True)  # accelerate takes DeepSpeed on CPUs for one process
    left = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert name != "zero3_accelerate" or left["model"].zero_optimization_stage() == 3
    del left
    gc.collect()  # gloo's threads are to end before the interpreter does
    if os.environ["RANK"] == "0":
        from stand_ins import language_model

        loaded = adapters(load_adapter(language_model(), folder / "adapter"))
        moved = [bool(value.abs().max() > 0) for key, value in loaded.items() if key.endswith("lora_B")]
        (folder / "report.json").write_text(json.dumps({"trained": all(moved), "layers": len(moved)}))


def main(name: str, folder: Path) -> None:
    torch.set_num_threads(1)
    if name == "elastic":
        run_elastic(folder)
    elif name == "examples":
        run_examples(folder)
    else:
        run_example(name, folder)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

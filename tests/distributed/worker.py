"""One of two processes that run all scenarios together.

Those of DDP, two pipeline stages (chains end at the border), Transformers' Trainer, quantised bases and
layers of other kinds than the linear one are here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn.parallel import DistributedDataParallel

from reslora_kernels import ResLoRAConfig, apply_reslora, load_adapter, merge_reslora, save_adapter, shard_reslora
from reslora_kernels.adapt.record import adapted_layers
from reslora_kernels.training import ResLoRACallback

from ..models import llama, randomize
from ..test_training import trained, trainer
from . import changed, fsdp
from .residual import (
    FORMS,
    GATED,
    SHORTCUTS,
    STEPS,
    Batch,
    Block,
    Residual,
    Scenario,
    adapters,
    batch,
    difference,
    in_one_process,
    residual,
    run_scenarios,
    same,
    shared_data,
    train,
)
from .residual import plain as plain_step


def equals_one_process(shortcut: str, form: str, folder: Path, **config: Any) -> dict[str, Any]:
    model = DistributedDataParallel(residual(shortcut, **config))
    losses = train(model, shared_data, form, lambda last: nullcontext() if last else model.no_sync())
    return {"difference": difference(losses, model, in_one_process(shortcut, form, **config))}


def saved_under_plain_names(folder: Path) -> dict[str, Any]:
    model = DistributedDataParallel(residual("middle"))
    train(model, shared_data)
    if dist.get_rank() == 0:
        save_adapter(model, folder / "ddp-adapter")
    dist.barrier()
    loaded = adapters(load_adapter(residual("middle"), folder / "ddp-adapter"))
    own = adapters(model)
    return {"equal": all(torch.equal(loaded[name], own[name]) for name in own), "names": sorted(loaded)}


DDP: dict[str, Scenario] = {
    **{
        f"ddp {form} {shortcut}": partial(equals_one_process, shortcut, form)
        for form in FORMS
        for shortcut in SHORTCUTS
    },
    **{f"ddp gates {shortcut}": partial(equals_one_process, shortcut, "plain", gates="rank") for shortcut in GATED},
    "ddp saved": saved_under_plain_names,
}


def stages(shortcut: str) -> list[nn.Module]:
    """The residual network cut after its second block; each part is the root of its own chains."""
    torch.manual_seed(0)
    embed, blocks, head = nn.Linear(6, 12), [Block(12, 18) for _ in range(5)], nn.Linear(12, 3)
    parts = [nn.Sequential(embed, *blocks[:2]).double(), nn.Sequential(*blocks[2:], head).double()]
    config = ResLoRAConfig(r=3, lora_alpha=6, shortcut=shortcut, pre_num=2)
    for part, width in zip(parts, (6, 12), strict=True):
        apply_reslora(part, config, example_inputs=torch.zeros(1, 2, width, dtype=torch.float64))
        randomize(part)
    return parts


def optimizer_of(part: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in part.parameters() if p.requires_grad], lr=1e-2)


def interleaved(shortcut: str, folder: Path) -> dict[str, Any]:
    """1F1B over four microbatches, so that several forwards of a stage precede their backwards, for three steps."""
    rank = dist.get_rank()
    part = stages(shortcut)[rank]
    stage = PipelineStage(part, rank, 2, torch.device("cpu"))

    def loss_of(y: Tensor, target: Tensor) -> Tensor:
        return nn.functional.mse_loss(y, target)

    schedule = Schedule1F1B(stage, n_microbatches=4, loss_fn=loss_of, scale_grads=True)
    optimizer = optimizer_of(part)
    for step in range(STEPS):
        x, target = batch(step)
        optimizer.zero_grad()
        if rank == 0:
            schedule.step(x)
        else:
            schedule.step(target=target)
        optimizer.step()
    whole = stages(shortcut)
    optimizers = [optimizer_of(other) for other in whole]
    for step in range(STEPS):
        x, target = batch(step)
        for other in optimizers:
            other.zero_grad()
        loss_of(whole[1](whole[0](x)), target).backward()
        for other in optimizers:
            other.step()
    own, expected = adapters(part), adapters(whole[rank])
    return {"difference": max(float((own[name] - truth).norm() / truth.norm()) for name, truth in expected.items())}


PIPELINE: dict[str, Scenario] = {f"pipeline {shortcut}": partial(interleaved, shortcut) for shortcut in SHORTCUTS}


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


TRAINER: dict[str, Scenario] = {
    **{f"trainer saved {shortcut}": partial(saved, shortcut) for shortcut in ("input", "block")},
    **{f"trainer merged {shortcut}": partial(merged_evaluation, shortcut) for shortcut in ("input", "middle")},
}


def quantized(shortcut: str, storage: Any = torch.uint8) -> Any:
    """In float64, with the layers of the blocks in NF4 (bitsandbytes), or int8 (torchao) where ``storage`` is None."""
    import bitsandbytes
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    bitsandbytes.nn.modules.has_avx512bf16 = lambda: False  # it repacks weights to what layers this small have not
    torch.manual_seed(0)
    model = Residual(blocks=3, width=32, inner=64).double()
    for block in model.blocks:
        for name in ("up", "down"):
            linear, bias = getattr(block, name), getattr(block, name).bias
            if storage is None:
                quantize_(linear.float(), Int8WeightOnlyConfig())
            else:
                packed = bitsandbytes.nn.Linear4bit(
                    linear.in_features, linear.out_features, quant_type="nf4", quant_storage=storage
                )
                packed.load_state_dict(linear.float().state_dict())
                setattr(block, name, packed.to("cpu"))
            getattr(block, name).bias = nn.Parameter(bias.detach().double())
    config = ResLoRAConfig(r=3, lora_alpha=6, shortcut=shortcut, pre_num=2, target_modules=("up", "down"))
    example = torch.zeros(1, 2, 6, dtype=torch.float64)
    apply_reslora(model, config, example_inputs=example)
    for layer in adapted_layers(model).values():
        layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.double(), layer.lora_B.data.double()
    return randomize(model)


def quantized_base(shortcut: str, kind: str, folder: Path, storage: Any = torch.uint8) -> dict[str, Any]:
    """QLoRA: processes with rows of their own are one with all."""
    alone = quantized(shortcut, storage)
    expected = train(alone, batch), adapters(alone)
    model = quantized(shortcut, storage)
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model, init_sync=storage is not None)  # torchao's know no broadcast
    else:
        shard_reslora(model, model.blocks, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    losses = train(model, shared_data)
    return {"difference": difference(losses, model, expected)}


def offloaded(folder: Path) -> dict[str, Any]:
    """FSDP2 with its offload policy: parameters and moments in main memory."""
    model = residual("input")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shard_reslora(model, model.blocks, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    return {"difference": difference(train(model, shared_data), model, in_one_process("input"))}


QUANTIZED: dict[str, Scenario] = {
    **{f"nf4 ddp {shortcut}": partial(quantized_base, shortcut, "ddp") for shortcut in SHORTCUTS},
    **{f"nf4 fsdp {shortcut}": partial(quantized_base, shortcut, "fsdp") for shortcut in SHORTCUTS},
    "nf4 in bfloat16 fsdp": partial(quantized_base, "input", "fsdp", storage=torch.bfloat16),
    "torchao ddp": partial(quantized_base, "middle", "ddp", storage=None),
    "offloaded": offloaded,
}


TOKENS, WIDTH = 11, 8


class Experts(nn.Module):
    """One of three matrices for each token, by where its largest value is."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, WIDTH, WIDTH) / 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, WIDTH)
        chosen, y = tokens.argmax(-1) % 3, torch.zeros_like(tokens)
        for e in range(3):
            rows = (chosen == e).nonzero()[:, 0]
            y = y.index_add(0, rows, nn.functional.linear(tokens[rows], self.up[e]))
        return y.view(x.shape)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x, x, x, need_weights=False)[0]
        x = x + torch.tanh(self.conv(x.mT).mT)
        y: Tensor = x + torch.tanh(self.experts(x))
        return y


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.ModuleList(Mixed() for _ in range(3))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed((4 * x[..., 0]).round().long() % TOKENS)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x)
        return y


def unadapted() -> Network:
    torch.manual_seed(0)
    return Network().double()


def network(shortcut: Any) -> Network:
    """Adapters about as large as the weights: much larger ones make three steps amplify the order of sums."""
    config = ResLoRAConfig(
        r=3, lora_alpha=2, shortcut=shortcut,
        target_modules=["embed", "attn", "conv"], target_parameters=["experts.up"],
    )  # fmt: skip
    model = unadapted()
    apply_reslora(model, config)
    randomize(model)
    return model


def by_sgd(model: nn.Module, data: Callable[[int], Batch]) -> list[float]:
    """The losses of three steps by SGD: AdamW divides gradients that are all rounding by themselves."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.SGD(parameters, lr=0.1), []
    for step in range(3):
        optimizer.zero_grad()
        losses.append(float(plain_step(model, data, step, lambda last: nullcontext())))
        nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
    return losses


def kinds_equal_one_process(shortcut: str, kind: str, folder: Path) -> dict[str, Any]:
    alone = network(shortcut)
    expected = by_sgd(alone, batch), adapters(alone)
    model: Any = network(shortcut)
    model = DistributedDataParallel(model) if kind == "ddp" else shard_reslora(model, model.blocks)
    found = {"difference": difference(by_sgd(model, shared_data), model, expected)}
    if kind == "fsdp" or dist.get_rank() == 0:
        save_adapter(model, folder / f"kinds-{kind}-{shortcut}")
    dist.barrier()
    loaded = load_adapter(unadapted(), folder / f"kinds-{kind}-{shortcut}")
    names = {type(layer).__name__ for layer in adapted_layers(loaded).values()}
    return found | {"equal": same(adapters(loaded), adapters(model)), "kinds": len(names)}


KINDS: dict[str, Scenario] = {
    f"kinds {kind} {shortcut}": partial(kinds_equal_one_process, shortcut, kind)
    for kind in ("ddp", "fsdp")
    for shortcut in ("none", "block")
}


SCENARIOS = DDP | changed.CHANGED | fsdp.SCENARIOS | PIPELINE | fsdp.RECIPES | TRAINER | QUANTIZED | KINDS


if __name__ == "__main__":
    run_scenarios(Path(sys.argv[1]), SCENARIOS)

"""Pipelines whose chains go on across stages, and sequences cut over processes, against one process, in float64.

Four processes run all scenarios: those of two stages or interleaved ones run twice, in each half.
"""

from __future__ import annotations

import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from reslora_kernels import (
    ResLoRAConfig,
    apply_reslora,
    checkpoint_context,
    load_adapter,
    merge_reslora,
    pipeline_reslora,
    save_adapter,
)

from ..models import randomize
from .fsdp import refused
from .residual import SHORTCUTS, STEPS, Residual, Scenario, adapters, batch, residual, run_scenarios

HALF: Any = None  # the two processes of this one's half
CUTS = {2: (0, 2, 4), 4: (0, 1, 2, 3, 4)}


def parts_of(model: Any, count: int) -> list[nn.Module]:
    """The network cut between its blocks, with the embedding in the first part and the head in the last."""
    cuts = CUTS[count]
    parts: list[list[nn.Module]] = [list(model.blocks[a:b]) for a, b in pairwise(cuts)]
    parts[0].insert(0, model.embed)
    parts[-1].append(model.head)
    return [nn.Sequential(*part) for part in parts]


class Running:
    """A pipeline and this process's stages in a schedule."""

    def __init__(
        self, model: Any, count: int, schedule: Any, group: Any, elsewhere: str | None = None, placement: Any = None
    ) -> None:
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        parts = parts_of(model, count)
        self.mine = [i for i in range(count) if (placement[i] if placement else i % size) == rank]
        for i, part in enumerate(parts):
            if elsewhere is not None and i not in self.mine:
                part.to(elsewhere)
        self.last = count - 1
        self.pipeline = pipeline_reslora(model, parts, placement=placement, group=group)
        stages = [PipelineStage(self.pipeline.stages[i], i, count, torch.device("cpu"), group=group) for i in self.mine]
        self.schedule = schedule(
            stages if count > size else stages[0], n_microbatches=4, loss_fn=nn.functional.mse_loss, scale_grads=True
        )
        self.trained = [p for i in self.mine for p in self.pipeline.stages[i].parameters() if p.requires_grad]

    def step(self, x: Tensor, target: Tensor) -> list[Tensor]:
        losses: list[Tensor] = []
        last = {"target": target, "losses": losses} if self.last in self.mine else {}
        with self.pipeline.step():
            self.schedule.step(*([x] if 0 in self.mine else []), **last)
        return losses


def alone(model: Any) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(STEPS):
        x, target = batch(step)
        loss = nn.functional.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def recompute(model: Any) -> None:
    for block in model.blocks:
        block.recompute = {"use_reentrant": False, "context_fn": checkpoint_context(model)}


def pipelined(
    shortcut: str,
    schedule: Any,
    count: int,
    folder: Path,
    *,
    all_four: bool = False,
    recomputed: bool = False,
    elsewhere: str | None = None,
    placement: Any = None,
    **config: Any,
) -> dict[str, Any]:
    """Losses and adapters after three AdamW steps over four microbatches each; then the adapters in every process."""
    model, expected = residual(shortcut, **config), residual(shortcut, **config)
    if recomputed:
        recompute(model)
    running = Running(model, count, schedule, None if all_four else HALF, elsewhere, placement)
    optimizer = torch.optim.AdamW([*running.trained, torch.zeros(())], lr=1e-2)  # a stage may have nothing to train
    truth = alone(expected)
    distances = []
    for step in range(STEPS):
        optimizer.zero_grad()
        losses = running.step(*batch(step))
        optimizer.step()
        if losses:
            distances.append(abs(float(torch.stack(losses).mean().detach()) - truth[step]) / truth[step])
    own = {id(p) for p in running.trained}
    left = [n for n, p in model.named_parameters() if id(p) not in own and p.grad is not None]
    running.pipeline.gather()
    found = adapters(model)
    distances += [float((found[name] - value).norm() / value.norm()) for name, value in adapters(expected).items()]
    return {"difference": max(distances), "left": left}


def evaluated(folder: Path) -> dict[str, Any]:
    model = residual("input")
    running = Running(model, 2, ScheduleGPipe, HALF)
    with running.pipeline.step():
        x, target = batch(0)
        y = running.schedule.eval(x) if 0 in running.mine else running.schedule.eval(target=target, losses=[])
    with torch.no_grad():
        truth = residual("input")(batch(0)[0])
    return {"difference": 0.0 if y is None else float((y - truth).norm() / truth.norm())}


def saved(folder: Path) -> dict[str, Any]:
    """Trained, gathered into each process's whole model, saved by one, loaded by all."""
    model = residual("input")
    running = Running(model, 4, Schedule1F1B, None, "meta")
    optimizer = torch.optim.AdamW(running.trained, lr=1e-2)
    running.step(*batch(0))
    optimizer.step()
    early = refused(lambda: save_adapter(model, folder / f"early-{dist.get_rank()}"))
    running.pipeline.gather()
    if dist.get_rank() == 0:
        save_adapter(model, folder / "pipeline")
    dist.barrier()
    loaded = adapters(load_adapter(Residual().double(), folder / "pipeline"))
    return {"equal": all(torch.equal(loaded[name], value) for name, value in adapters(model).items()), "early": early}


def sizes(folder: Path) -> dict[str, Any]:
    """The last dimensions of what a stage in the middle takes beside the activations, and of what it sends."""
    report: dict[str, Any] = {}
    for shortcut in SHORTCUTS:
        model = residual(shortcut, pre_num=2)
        stages = pipeline_reslora(model, parts_of(model, 4)).stages
        x = torch.randn(2, 5, 6, dtype=torch.float64)
        with torch.no_grad(), stages[0]._pipeline.step():
            first = stages[0](x)
            first = first if isinstance(first, tuple) else (first,)
            second = stages[1](*first)
        second = second if isinstance(second, tuple) else (second,)
        report[shortcut] = [[list(tensor.shape) for tensor in tensors[1:]] for tensors in (first, second)]
    return report


def refusals(folder: Path) -> dict[str, Any]:
    model = residual("input")
    parts = parts_of(model, 2)
    x = batch(0)[0]
    pipeline = pipeline_reslora(model, parts)
    merged = residual("block")
    merge_reslora(merged)
    backwards = residual("block")
    two = parts_of(backwards, 2)
    twice: Any = residual("middle")
    again = pipeline_reslora(
        twice, [nn.Sequential(twice.embed, *twice.blocks[:2], twice.blocks[1]), parts_of(twice, 2)[1]]
    )

    def without_step() -> None:
        pipeline.stages[0](x)

    lent: Any = residual("block")
    part = parts_of(lent, 2)[1]
    alone = refused(lambda: part(torch.zeros(2, 5, 12, dtype=torch.float64)))
    lending = pipeline_reslora(lent, parts_of(lent, 2))

    def averaged() -> None:
        with lending.step():
            nn.parallel.DistributedDataParallel(lending.stages[0])(x)

    return {
        "alone": refused(lambda: parts[1](torch.zeros(2, 5, 12, dtype=torch.float64))),
        "alone, block": alone,
        "averaged": refused(averaged),
        "outside": refused(without_step),
        "left out": refused(lambda: pipeline_reslora(model, parts[:1])),
        "backwards": refused(lambda: pipeline_reslora(backwards, two[::-1])),
        "merged": refused(lambda: pipeline_reslora(merged, parts_of(merged, 2))),
        "placement": refused(lambda: pipeline_reslora(model, parts, placement=[0, 9])),
        "twice": refused(lambda: again.stages[0](x)),
    }


class Whole(torch.autograd.Function):
    """Every process's tokens, one after the other; gradients go back to where the tokens are, added up."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(HALF))]
        dist.all_gather(parts, own.contiguous(), group=HALF)
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=HALF)
        return gradient.chunk(dist.get_world_size(HALF), 1)[dist.get_rank(HALF)]


class Attention(nn.Module):
    """Causal, over the tokens of all processes where a sequence is cut: keys and values are gathered."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm = nn.LayerNorm(width)
        self.cut = False

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = self.q(normed), self.k(normed), self.v(normed)
        first = x.shape[1] * dist.get_rank(HALF) if self.cut else 0
        k, v = (Whole.apply(k), Whole.apply(v)) if self.cut else (k, v)
        seen = torch.arange(k.shape[1]) <= torch.arange(first, first + q.shape[1])[:, None]
        return x + self.o(nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen))


def attentive(shortcut: str) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), *(Attention(12) for _ in range(3)), nn.Linear(12, 3)).double()
    example = torch.zeros(1, 2, 6, dtype=torch.float64)
    apply_reslora(model, ResLoRAConfig(r=3, lora_alpha=6, shortcut=shortcut, pre_num=2), example_inputs=example)
    return randomize(model)


def context_parallel(shortcut: str, folder: Path) -> dict[str, Any]:
    """Each process has half of the tokens of every sequence; losses and gradients are summed over the halves."""
    report = []
    for cut in (False, True):
        model = attentive(shortcut)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        losses = []
        for block in model[1:-1]:
            block.cut = cut
        for step in range(STEPS):
            x, target = (tensor[:, :4] for tensor in batch(step))
            total = target.numel()
            if cut:
                x, target = (tensor.chunk(2, 1)[dist.get_rank(HALF)] for tensor in (x, target))
            loss = (model(x) - target).square().sum() / total
            optimizer.zero_grad()
            loss.backward()
            value = loss.detach().clone()
            for tensor in (value, *(p.grad for p in trained)) if cut else ():
                dist.all_reduce(tensor, group=HALF)
            optimizer.step()
            losses.append(float(value))
        report.append((losses, adapters(model)))
    (expected, truth), (found, own) = report
    distances = [abs(a - b) / b for a, b in zip(found, expected, strict=True)]
    distances += [float((own[name] - value).norm() / value.norm()) for name, value in truth.items()]
    return {"difference": max(distances)}


def ring(folder: Path) -> dict[str, Any]:
    """PyTorch's own context parallel, on the CPU."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.experimental import context_parallel as cut_sequences

    mesh = DeviceMesh.from_group(HALF, "cpu")
    q = torch.randn(2, 2, 8, 4, requires_grad=True)

    def attend() -> None:
        with cut_sequences(mesh, buffers=[q.data], buffer_seq_dims=[2]):
            nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()

    return refused(attend)


SCENARIOS: dict[str, Scenario] = {
    **{f"gpipe {shortcut}": partial(pipelined, shortcut, ScheduleGPipe, 2) for shortcut in SHORTCUTS},
    **{f"1f1b {shortcut}": partial(pipelined, shortcut, Schedule1F1B, 4, all_four=True) for shortcut in SHORTCUTS},
    **{f"interleaved {s}": partial(pipelined, s, ScheduleInterleaved1F1B, 4) for s in SHORTCUTS},
    **{f"zero bubble {s}": partial(pipelined, s, ScheduleInterleavedZeroBubble, 4) for s in SHORTCUTS},
    **{f"in a V {s}": partial(pipelined, s, ScheduleZBVZeroBubble, 4, placement=(0, 1, 1, 0)) for s in SHORTCUTS},
    **{f"recomputed {s}": partial(pipelined, s, Schedule1F1B, 2, recomputed=True) for s in SHORTCUTS[1:]},
    "all earlier blocks middle": partial(pipelined, "middle", Schedule1F1B, 4, all_four=True, pre_num=-1),
    "all earlier blocks block": partial(pipelined, "block", Schedule1F1B, 4, all_four=True, pre_num=-1),
    "gates middle": partial(pipelined, "middle", Schedule1F1B, 4, all_four=True, pre_num=-1, gates="rank"),
    **{
        f"passed through {s}": partial(pipelined, s, Schedule1F1B, 4, all_four=True, layers_to_transform=(0, 3))
        for s in SHORTCUTS[1:]
    },
    **{f"on meta {s}": partial(pipelined, s, Schedule1F1B, 2, elsewhere="meta") for s in SHORTCUTS},
    "start": partial(pipelined, "input", Schedule1F1B, 2, init_lora_weights="pissa"),
    "dora": partial(pipelined, "block", Schedule1F1B, 2, use_dora=True, bias="lora_only"),
    **{f"context {shortcut}": partial(context_parallel, shortcut) for shortcut in SHORTCUTS},
    "ring": ring,
    "evaluated": evaluated,
    "saved": saved,
    "sizes": sizes,
    "refusals": refusals,
}


def begin() -> None:
    global HALF
    HALF = [dist.new_group([0, 1]), dist.new_group([2, 3])][dist.get_rank() // 2]


if __name__ == "__main__":
    run_scenarios(Path(sys.argv[1]), SCENARIOS, begin)

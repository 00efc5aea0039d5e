"""Tensor parallel plans on two processes, and with FSDP2 on two times two, against one process, in float64.

Four processes run all scenarios: those of one dimension run twice, in each half of the mesh.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from reslora_kernels import (
    RankAllocator,
    ResLoRAConfig,
    add_adapter,
    apply_reslora,
    collect_statistics,
    export_peft,
    load_adapter,
    merge_and_unload,
    merge_reslora,
    save_adapter,
    shard_reslora,
    unmerge_reslora,
)
from reslora_kernels.adapt.record import adapted_layers
from reslora_kernels.dtensors import fill, whole
from reslora_kernels.layers.checkpointing import checkpoint_context
from reslora_kernels.training.methods import restart_reslora

from ..models import randomize
from .fsdp import refused
from .residual import (
    GATED,
    SHORTCUTS,
    Residual,
    Scenario,
    adapters,
    batch,
    in_one_process,
    residual,
    run_scenarios,
    same,
    train,
)
from .worker import quantized

MESH: Any = None  # (2, 2), dimensions "dp" and "tp"


def base() -> Residual:
    torch.manual_seed(0)
    return Residual().double()


def plan(sequence: bool) -> dict[str, Any]:
    """Of each block ``up`` is colwise and ``down`` rowwise; with ``sequence`` the norm sees a part of the tokens.

    The head's 3 outputs are cut in two, unevenly.
    """
    ends = {"embed": ColwiseParallel(output_layouts=Replicate()), "head": ColwiseParallel(output_layouts=Replicate())}
    if not sequence:
        return ends | {"blocks.*.up": ColwiseParallel(), "blocks.*.down": RowwiseParallel()}
    return ends | {
        "embed": ColwiseParallel(output_layouts=Shard(1), use_local_output=False),
        "blocks.*.norm": SequenceParallel(),
        "blocks.*.up": ColwiseParallel(input_layouts=Shard(1)),
        "blocks.*.down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }


def settings(shortcut: str, **config: Any) -> ResLoRAConfig:
    return ResLoRAConfig(r=3, lora_alpha=6, shortcut=shortcut, **{"pre_num": 2, **config})


def parallel(shortcut: str, sequence: bool = False, **config: Any) -> Any:
    """The network of ``residual``, spread by a plan and then adapted, with the same adapters."""
    model = parallelize_module(base(), MESH["tp"], plan(sequence))
    apply_reslora(model, settings(shortcut, **config), example_inputs=torch.zeros(1, 2, 6, dtype=torch.float64))
    return copy_adapters(residual(shortcut, **config), model)


def copy_adapters(source: nn.Module, target: Any) -> Any:
    theirs = dict(source.named_parameters())
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if "lora_" in name or "start_" in name:
                fill(parameter, theirs[name])
    return target


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def apart(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    assert found.keys() == truth.keys(), (sorted(found), sorted(truth))
    distances = [(found[n].double() - truth[n]).norm() / truth[n].double().norm().clamp_min(1e-30) for n in truth]
    return float(max(distances))


def equals_one_process(shortcut: str, folder: Path, sequence: bool = False, **config: Any) -> dict[str, Any]:
    """Output, gradients, and adapters after three AdamW steps; every batch is whole in each process."""
    model, alone = parallel(shortcut, sequence, **config), residual(shortcut, **config)
    x, target = batch(0)
    y, truth = model(x), alone(x)
    nn.functional.mse_loss(y, target).backward()
    nn.functional.mse_loss(truth, target).backward()
    found = {
        "output": float((y - truth).detach().norm() / truth.detach().norm()),
        "gradients": apart(gradients(model), gradients(alone)),
        "reduced": all(p.grad.placements == p.placements for p in model.parameters() if p.grad is not None),
    }
    losses, expected = train(model, batch), train(alone, batch)
    found["losses"] = max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))
    found["adapters"] = apart(adapters(model), adapters(alone))
    return found


def recomputed(shortcut: str, folder: Path) -> dict[str, Any]:
    """Activation checkpointing inside the blocks."""
    model = parallel(shortcut)
    for block in model.blocks:
        block.recompute = {"use_reentrant": False, "context_fn": checkpoint_context(model)}
    losses = train(model, batch, "two_forwards")
    expected, trained = in_one_process(shortcut, "two_forwards")
    return {
        "losses": max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True)),
        "adapters": apart(adapters(model), trained),
    }


def restarted(folder: Path) -> dict[str, Any]:
    """ReLoRA's restart, for which processes draw unlike: the first one of a plan says what all have."""
    model, alone = parallel("block"), residual("block")
    for which in (alone, model):
        torch.manual_seed(9 if which is alone else 9 + MESH.get_local_rank("tp"))
        restart_reslora(which)
    own = {name: whole(parameter) for name, parameter in model.named_parameters()}
    return {"restarted": apart(own, {name: p.detach() for name, p in alone.named_parameters()})}


def communication(folder: Path) -> dict[str, Any]:
    """How often processes speak in a forward and in a backward, of the frozen base and with each shortcut."""
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    report: dict[str, Any] = {}
    for shortcut in ("base", *SHORTCUTS):
        model = parallelize_module(base(), MESH["tp"], plan(False)) if shortcut == "base" else parallel(shortcut)
        if shortcut == "base":
            model.requires_grad_(False).blocks[0].norm.weight.requires_grad_()
        with CommDebugMode() as forward:
            loss = model(x).square().sum()
        with CommDebugMode() as backward:
            loss.backward()
        report[shortcut] = {"forward": forward.get_total_counts(), "backward": backward.get_total_counts()}
    return report | {"layers": len(adapted_layers(parallel("none")))}


def saved(folder: Path) -> dict[str, Any]:
    """From one process to two, from two to one, and from two to two times two and back; each writes the same."""
    half = folder / f"half-{MESH.get_local_rank('dp')}"
    alone = residual("middle", bias="lora_only")
    model = parallel("middle", bias="lora_only")
    own = adapters(alone)
    save_adapter(model, half / "tp")
    plain = load_adapter(base(), half / "tp")
    save_adapter(alone, half / f"alone-{dist.get_rank()}")
    spread = load_adapter(parallelize_module(base(), MESH["tp"], plan(False)), half / f"alone-{dist.get_rank()}")
    other = randomize(residual("middle", bias="lora_only"), seed=7)
    filled = load_adapter(copy_adapters(other, parallel("middle", bias="lora_only")), half / "tp")
    both = shard(spread)
    x = batch(3)[0]
    outputs = [m(x).detach() for m in (alone, plain, both, filled)]
    save_adapter(both, folder / "2d")
    again = shard(copy_adapters(other, parallel("middle", bias="lora_only")))
    again(x)
    load_adapter(again, folder / "2d")
    found = {
        "plain": adapters(plain), "spread": adapters(both), "filled": adapters(filled), "again": adapters(again),
        "2d": adapters(load_adapter(base(), folder / "2d")),
    }  # fmt: skip
    files = [(path / "reslora_model.safetensors") for path in (half / "tp", folder / "2d")]
    return {
        "equal": {name: same(tensors, own) for name, tensors in found.items()},
        "files": len({file.read_bytes() for file in files}) if all(file.exists() for file in files) else 0,
        "outputs": max(float((y - outputs[0]).norm() / outputs[0].norm()) for y in outputs),
    }


def merged(shortcut: str, folder: Path, **config: Any) -> dict[str, Any]:
    """Statistics, merge, export and unmerge as in one process."""
    model, alone = parallel(shortcut, **config), residual(shortcut, **config)
    x = batch(4)[0]
    before = {name: whole(p).clone() for name, p in model.named_parameters()}
    seen = []
    for which in (model, alone):
        with collect_statistics(which) as statistics, torch.no_grad():
            for step in range(3):
                which(batch(step)[0])
        seen.append(statistics)
    grams = apart(seen[0].state_dict(), seen[1].state_dict())
    paths = [folder / f"peft-{shortcut}-{MESH.get_local_rank('dp')}", folder / f"peft-alone-{dist.get_rank()}"]
    for which, statistics, path in zip((model, alone), seen, paths, strict=True):
        export_peft(which, path, statistics=statistics)
        merge_reslora(which, statistics=statistics)
    y, truth = model(x), alone(x)
    exported = [load_file(path / "adapter_model.safetensors") for path in paths]
    unmerge_reslora(model)
    return {
        "statistics": grams,
        "merged": float((y - truth).detach().norm() / truth.detach().norm()),
        "exported": apart(*exported),
        "restored": same({name: whole(p) for name, p in model.named_parameters()}, before),
    }


def with_fsdp(shortcut: str, folder: Path, **config: Any) -> dict[str, Any]:
    """Two times two: rows of a batch over one dimension, the plan over the other."""
    model = shard(parallel(shortcut, **config))
    half = MESH.get_local_rank("dp")

    def data(step: int) -> tuple[Tensor, Tensor]:
        x, target = batch(step)
        return x.chunk(2)[half], target.chunk(2)[half]

    losses = torch.tensor(train(model, data), dtype=torch.float64)
    dist.all_reduce(losses, group=MESH.get_group("dp"))
    expected, trained = in_one_process(shortcut, **config)
    return {
        "losses": max(abs(a / 2 - b) / abs(b) for a, b in zip(losses.tolist(), expected, strict=True)),
        "adapters": apart(adapters(model), trained),
    }


def dropped(folder: Path) -> dict[str, Any]:
    """With dropout, processes that draw alike: gradients are those of the outputs, and outputs are alike."""
    model = parallel("middle", lora_dropout=0.3).train()
    torch.manual_seed(3)
    y = model(batch(0)[0])
    y.square().sum().backward()
    other = [torch.empty_like(y) for _ in range(2)]
    dist.all_gather(other, y.detach(), group=MESH.get_group("tp"))
    direction = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    length = sum(float(whole(g).square().sum()) for g in direction.values()) ** 0.5
    values, step = [], 1e-5
    for sign in (1, -2):
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in direction:
                    p.add_(direction[name], alpha=sign * step / length)
        torch.manual_seed(3)
        values.append(float(model(batch(0)[0]).detach().square().sum()))
    slope = (values[0] - values[1]) / (2 * step)
    return {
        "alike": bool(torch.equal(*other)),
        "slope": abs(slope - length) / length,
        "drops": float((y.detach() - model.eval()(batch(0)[0]).detach()).norm()),
    }


def transformers_plan(folder: Path) -> dict[str, Any]:
    """``from_pretrained`` with a tensor parallel plan over all four processes, "auto" and with a rule of one's own."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=False,
    )  # fmt: skip
    whole_model = LlamaForCausalLM(config).double()
    if dist.get_rank() == 0:
        whole_model.save_pretrained(folder / "llama")
    dist.barrier()
    tokens = torch.randint(2, 48, (2, 9), generator=torch.Generator().manual_seed(1))
    report: dict[str, Any] = {}
    for rules in ("auto", {"lm_head": "colwise_gather_output"}):
        for shortcut in SHORTCUTS:
            settings = ResLoRAConfig(
                r=3, lora_alpha=6, shortcut=shortcut, target_modules=("q_proj", "v_proj", "o_proj", "down_proj")
            )
            spread: Any = LlamaForCausalLM.from_pretrained(
                folder / "llama", dtype=torch.float64, distributed_config=DistributedConfig(tp_plan=rules, tp_size=4)
            )
            alone: Any = randomize(
                apply_reslora(LlamaForCausalLM.from_pretrained(folder / "llama", dtype=torch.float64), settings)
            )
            copy_adapters(alone, apply_reslora(spread, settings))
            losses = [model.train()(input_ids=tokens, labels=tokens).loss for model in (spread, alone)]
            for loss in losses:
                loss.backward()
            with torch.no_grad():
                logits = [model.eval()(tokens).logits for model in (spread, alone)]
            name = f"{'auto' if rules == 'auto' else 'own'} {shortcut}"
            report[name] = {
                "loss": float((losses[0] - losses[1]).detach().abs()),
                "gradients": apart(gradients(spread), gradients(alone)),
                "logits": float((logits[0] - logits[1]).norm() / logits[1].norm()),
                "kinds": sorted({type(layer).__name__ for layer in adapted_layers(spread).values()}),
            }
            if rules != "auto":
                break
    for model in (spread, alone):
        with collect_statistics(model) as statistics, torch.no_grad():
            model(tokens)
        merge_and_unload(model, statistics=statistics)
    with torch.no_grad():
        logits = [model(tokens).logits for model in (spread, alone)]
    report["unloaded"] = {"logits": float((logits[0] - logits[1]).norm() / logits[1].norm())}
    return report


def shard(model: Any, **kwargs: Any) -> Any:
    return shard_reslora(model, model.blocks, mesh=MESH["dp"], **kwargs)


def experts(folder: Path) -> dict[str, Any]:
    """Experts that a plan of Transformers spreads, as ``target_parameters``."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    from transformers.distributed import DistributedConfig

    config = Qwen3MoeConfig(
        vocab_size=48, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, head_dim=8, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    plan = DistributedConfig(tp_plan="auto", tp_size=4)
    Qwen3MoeForCausalLM(config).save_pretrained(folder / "experts")  # the first process writes
    dist.barrier()
    model = Qwen3MoeForCausalLM.from_pretrained(folder / "experts", distributed_config=plan)
    before = [type(module) for module in model.modules()]
    wanted = ResLoRAConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"], shortcut="block")
    found = refused(lambda: apply_reslora(model, wanted))
    return found if before == [type(module) for module in model.modules()] else {"error": "changed", "message": ""}


def refusals(folder: Path) -> dict[str, Any]:
    model = parallel("input")
    half_a_plan = parallelize_module(base(), MESH["tp"], {"blocks.0.up": ColwiseParallel()})
    before = [type(module) for module in half_a_plan.modules()]
    hidden = ResLoRAConfig(r=3, target_modules=("up", "down"), shortcut="input")
    report = {
        "adapted first": refused(lambda: parallelize_module(residual("input"), MESH["tp"], plan(False))),
        "half a chain": refused(lambda: apply_reslora(half_a_plan, hidden)),
        "no mesh": refused(lambda: shard_reslora(model, model.blocks)),
        "ranks": refused(lambda: RankAllocator(model, target_r=1, total_step=9)),
        "experts": experts(folder),
        "sequential": refused(lambda: merge_reslora(model, calibration=[batch(0)[0]], sequential=True)),
        "switched": refused(lambda: add_adapter(model, "other", hidden)),
        "torchao": refused(lambda: shard(quantized("block", None))),
        "cast": refused(
            lambda: shard(quantized("block", torch.bfloat16), mp_policy=MixedPrecisionPolicy(param_dtype=torch.float16))
        ),
        "sharded": refused(lambda: merge_reslora(shard(model))),
    }
    unchanged = before == [type(module) for module in half_a_plan.modules()]
    report["unchanged"] = {"error": "ValueError" if unchanged else None, "message": ""}
    return report


def checkpointed(folder: Path) -> dict[str, Any]:
    """Adapters and moments saved by four processes go on in two, and in two times two with a plan, bit for bit."""
    model = residual("middle")
    shard_reslora(model, model.blocks, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(2):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(batch(step)[0]), batch(step)[1]).backward()
        optimizer.step()
    options = StateDictOptions(ignore_frozen_params=True)
    dcp.async_save(
        dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options), strict=True)),
        checkpoint_id=folder / "dcp",
    ).result()
    dist.barrier()
    own, moments = adapters(model), moments_of(model, optimizer)
    report: dict[str, Any] = {}
    pair, both = shard(residual("middle")), shard(parallel("middle"))
    for name, other in (("two", pair), ("two by two", both), ("one", residual("middle"))):
        its = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=1e-2)
        state = dict(zip(("model", "optimizer"), get_state_dict(other, its, options=options), strict=True))
        dcp.load(state, checkpoint_id=folder / "dcp")
        set_state_dict(
            other, its, model_state_dict=state["model"], optim_state_dict=state["optimizer"],
            options=StateDictOptions(ignore_frozen_params=True, strict=False),
        )  # fmt: skip
        report[name] = same(adapters(other), own) and same(moments_of(other, its), moments)
    return report


def moments_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": whole(value)
        for name, p in model.named_parameters()
        for key, value in optimizer.state.get(p, {}).items()
        if isinstance(value, Tensor)
    }


SCENARIOS: dict[str, Scenario] = {
    "checkpointed": checkpointed,
    **{f"tp {shortcut}": partial(equals_one_process, shortcut) for shortcut in SHORTCUTS},
    **{f"tp sequence {shortcut}": partial(equals_one_process, shortcut, sequence=True) for shortcut in SHORTCUTS},
    "tp biases": partial(equals_one_process, "input", bias="lora_only"),
    "tp dora": partial(equals_one_process, "middle", use_dora=True),
    "tp dora block": partial(equals_one_process, "block", use_dora=True),
    "tp start": partial(equals_one_process, "middle", init_lora_weights="pissa", pre_num=-1),
    **{f"tp gates {shortcut}": partial(equals_one_process, shortcut, gates="rank", pre_num=-1) for shortcut in GATED},
    **{f"merged gates {shortcut}": partial(merged, shortcut, gates="rank") for shortcut in GATED},
    "tp x fsdp gates": partial(with_fsdp, "middle", gates="scalar"),
    **{f"tp x fsdp {shortcut}": partial(with_fsdp, shortcut) for shortcut in SHORTCUTS},
    "tp x fsdp dora": partial(with_fsdp, "input", use_dora=True, bias="lora_only"),
    **{f"merged {shortcut}": partial(merged, shortcut) for shortcut in SHORTCUTS},
    "merged dora": partial(merged, "input", use_dora=True),
    **{f"tp recomputed {shortcut}": partial(recomputed, shortcut) for shortcut in SHORTCUTS[1:]},
    "tp restarted": restarted,
    "communication": communication,
    "saved": saved,
    "dropped": dropped,
    "transformers": transformers_plan,
    "refusals": refusals,
}


def begin() -> None:
    global MESH
    MESH = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))


if __name__ == "__main__":
    run_scenarios(Path(sys.argv[1]), SCENARIOS, begin)

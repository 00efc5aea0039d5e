"""What FSDP2 with shard_reslora must do, saving and refusals included; and what other recipes than it do.

Those fail, go silently wrong or lose something. Scenarios for two processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from reslora_kernels import (
    apply_reslora,
    collect_statistics,
    export_peft,
    inspect,
    load_adapter,
    merge_reslora,
    save_adapter,
    shard_reslora,
)
from reslora_kernels.adapt.record import adapted_layers, record_of
from reslora_kernels.layers.checkpointing import checkpoint_context
from reslora_kernels.layers.linear import ResLoRALinear

from ..models import randomize
from .residual import (
    FORMS,
    GATED,
    SHORTCUTS,
    Residual,
    Scenario,
    Sync,
    adapters,
    batch,
    difference,
    in_one_process,
    mean_over_processes,
    residual,
    share,
    shared_data,
    train,
)


def sharded(model: Residual, **kwargs: Any) -> Any:
    return shard_reslora(model, model.blocks, **kwargs)


def syncing(model: Any) -> Sync:
    """FSDP2's way to leave out the exchange of gradients."""

    @contextmanager
    def sync(last: bool) -> Iterator[None]:
        model.set_requires_gradient_sync(last)
        yield

    return sync


def equals_one_process(
    shortcut: str, form: str, folder: Path, config: dict[str, Any] | None = None, **kwargs: Any
) -> dict[str, Any]:
    model = sharded(residual(shortcut, **(config or {})), **kwargs)
    losses = train(model, shared_data, form, syncing(model))
    return {"difference": difference(losses, model, in_one_process(shortcut, form, **(config or {})))}


def hybrid(folder: Path) -> dict[str, Any]:
    """Two replicas, each on one process."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    found = equals_one_process("input", "plain", folder, mesh=mesh)
    model = sharded(residual("input"), mesh=mesh)
    save_adapter(model, folder / "hybrid")
    loaded = adapters(load_adapter(residual("input"), folder / "hybrid"))
    return found | {"equal": all(torch.equal(loaded[name], value) for name, value in adapters(model).items())}


def recomputed(shortcut: str, form: str, around: str, folder: Path) -> dict[str, Any]:
    """Activation checkpointing around the calls of the blocks (FSDP2's hooks run again too) or inside them."""
    model = residual(shortcut)
    how = {"use_reentrant": False, "context_fn": checkpoint_context(model)}
    for module in model.blocks if around == "inside" else [model]:
        module.recompute = how
    sharded(model)
    losses = train(model, shared_data, form, syncing(model))
    return {"difference": difference(losses, model, in_one_process(shortcut, form))}


def on_meta(folder: Path) -> dict[str, Any]:
    """Made and sharded without values, which every process then loads: base weights and adapters by their names."""
    whole = residual("input").state_dict()
    with torch.device("meta"):
        model = residual("input")
    sharded(model)
    model.to_empty(device="cpu")
    set_model_state_dict(model, whole, options=StateDictOptions(full_state_dict=True))
    losses = train(model, shared_data)
    return {"difference": difference(losses, model, in_one_process("input"))}


def resharding(folder: Path) -> dict[str, Any]:
    """When the last block runs: are the first block's weights sharded, are its adapters whole; names throughout."""
    model = sharded(residual("input"))
    seen: list[tuple[bool, bool]] = []
    first = model.blocks[0].up

    def look(module: nn.Module, args: Any) -> None:
        seen.append((isinstance(first.weight, DTensor), isinstance(first.lora_A, DTensor)))

    model.blocks[-1].register_forward_pre_hook(look)
    names = [name for name, _ in model.named_parameters()]
    train(model, shared_data)
    return {
        "weights_sharded": all(weight for weight, _ in seen),
        "adapters_whole": not any(adapter for _, adapter in seen),
        "names_kept": names == [name for name, _ in residual("input").named_parameters()],
        "state_dict_kept": list(model.state_dict()) == list(residual("input").state_dict()),
        "trainable": inspect(model).trainable_parameters == inspect(residual("input")).trainable_parameters,
    }


class InBfloat16(nn.Module):
    """What the mixed precision policy computes, in one process: bf16 copies of float32 parameters and inputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        copies = {name: parameter.to(torch.bfloat16) for name, parameter in self.model.named_parameters()}
        return functional_call(self.model, copies, (x.to(torch.bfloat16),))


def mixed_precision(shortcut: str, folder: Path) -> dict[str, Any]:
    """bf16 compute over float32 adapters, which stay float32 on disk too."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(residual(shortcut, dtype=torch.float32), mp_policy=policy)
    dtypes: set[str] = set()
    model.blocks[1].up.register_forward_pre_hook(
        lambda m, args: dtypes.update({str(args[0].dtype), str(m.lora_A.dtype)})
    )
    losses = train(model, lambda step: share(batch(step, torch.float32)))
    expected = train(InBfloat16(residual(shortcut, dtype=torch.float32)), lambda step: batch(step, torch.float32))
    trained = adapters(model)
    with torch.no_grad():
        model(share(batch(0, torch.float32))[0])  # leaves the root's parameters gathered, in bf16
    save_adapter(model, folder / f"mixed-{shortcut}")
    saved = adapters(load_adapter(residual(shortcut, dtype=torch.float32), folder / f"mixed-{shortcut}"))
    return {
        "difference": max(abs(a / b - 1) for a, b in zip(mean_over_processes(losses), expected, strict=True)),
        "compute": sorted(dtypes),
        "kept": sorted({str(value.dtype) for value in trained.values()}),
        "equal": all(torch.equal(saved[name], trained[name]) for name in trained),
    }


def saved_and_loaded(folder: Path) -> dict[str, Any]:
    model = sharded(residual("block", bias="lora_only"))
    train(model, shared_data)
    save_adapter(model, folder / "sharded")
    alone = load_adapter(residual("block", bias="lora_only"), folder / "sharded")
    other = sharded(randomize(residual("block", bias="lora_only"), seed=7))
    with torch.no_grad():
        other(share(batch(0))[0])  # its adapters are gathered now
    load_adapter(other, folder / "sharded")
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    own, plain, again = adapters(model), adapters(alone), adapters(other)
    with torch.no_grad():
        x = share(batch(9))[0]
        outputs = [m(x) for m in (model, alone, other)]
    return {
        "names": sorted(plain),
        "equal": all(torch.equal(plain[name], own[name]) and torch.equal(again[name], own[name]) for name in own),
        "outputs": max(float((y - outputs[0]).abs().max()) for y in outputs),
        "full_state_dict": all(torch.equal(whole[key], value) for key, value in alone.state_dict().items()),
    }


def writer_fails(folder: Path) -> dict[str, Any]:
    """The path is a file: the writing process says so, and the others do not wait for it for ever."""
    model = sharded(residual("none"))
    path = folder / f"a-file-{dist.get_rank()}"
    if dist.get_rank() == 0:
        path.write_text("")
    return refused(lambda: save_adapter(model, path))


def exported(folder: Path) -> dict[str, Any]:
    """Merged, then sharded by hand, for evaluation say: the export is that of the merged model."""
    model = residual("block", bias="all")
    merge_reslora(model)
    if dist.get_rank() == 0:
        export_peft(model, folder / "peft-whole")
    x = share(batch(0))[0]
    before = model(x).detach()
    for module in (*model.blocks, model):
        fully_shard(module)
    difference = float((model(x).detach() - before).abs().max())
    export_peft(model, folder / "peft-sharded")
    files = ("adapter_model.safetensors", "adapter_config.json")
    whole, sharded = (
        [(folder / name / file).read_bytes() for file in files] for name in ("peft-whole", "peft-sharded")
    )
    return {"equal": whole == sharded, "difference": difference}


def refused(action: Callable[[], Any]) -> dict[str, Any]:
    try:
        action()
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {"error": None, "message": ""}


def refusals(folder: Path) -> dict[str, Any]:
    model = sharded(residual("block"))
    plain = Residual().double()
    save_adapter(model, folder / "refusals")
    for block in plain.blocks:
        fully_shard(block)
    merged = residual("block")
    merge_reslora(merged)
    flat = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # its __init__ wants an accelerator
    nn.Module.__init__(flat)
    flat._modules["_fsdp_wrapped_module"] = residual("block")
    return {
        "merge": refused(lambda: merge_reslora(model)),
        "export": refused(lambda: export_peft(model, folder / "peft")),
        "shard twice": refused(lambda: sharded(model)),
        "adapt": refused(lambda: apply_reslora(plain, record_of(model).config)),
        "load": refused(lambda: load_adapter(plain, folder / "refusals")),
        "merged": refused(lambda: sharded(merged)),
        "FSDP1": refused(lambda: save_adapter(flat, folder / "flat")),
    }


def calibrated(folder: Path) -> dict[str, Any]:
    """Statistics gathered in a sharded model serve a merge in one process (each process saw its own rows)."""
    model, alone = sharded(residual("input")), residual("input")
    with collect_statistics(model) as many, torch.no_grad():
        model(batch(0)[0])
    with collect_statistics(alone) as one, torch.no_grad():
        alone(batch(0)[0])
    pairs = [(many.layers[name].gram, layer.gram) for name, layer in one.layers.items()]
    return {"difference": max(float((a - b).norm() / b.norm()) for a, b in pairs if a is not None and b is not None)}


SCENARIOS: dict[str, Scenario] = {
    **{
        f"fsdp {form} {shortcut}": partial(equals_one_process, shortcut, form)
        for form in FORMS
        for shortcut in SHORTCUTS
    },
    "fsdp root resharded too": partial(equals_one_process, "input", "two_forwards", reshard_after_forward=True),
    "fsdp trained biases": partial(equals_one_process, "middle", "plain", config={"bias": "all"}),
    **{
        f"fsdp gates {shortcut}": partial(equals_one_process, shortcut, "plain", config={"gates": "rank"})
        for shortcut in GATED
    },
    "fsdp hybrid": hybrid,
    "fsdp on meta": on_meta,
    **{
        f"fsdp recomputed {around} {shortcut}": partial(recomputed, shortcut, "two_forwards", around)
        for shortcut in ("input", "block", "middle")
        for around in ("inside", "outside")
    },
    "fsdp resharding": resharding,
    **{f"fsdp mixed precision {shortcut}": partial(mixed_precision, shortcut) for shortcut in SHORTCUTS},
    "fsdp saved": saved_and_loaded,
    "fsdp writer fails": writer_fails,
    "fsdp refusals": refusals,
    "fsdp calibrated": calibrated,
    "fsdp exported": exported,
}


def naive(shortcut: str, folder: Path) -> dict[str, Any]:
    """fully_shard per block as for any model: adapters in their block's group."""
    model = residual(shortcut)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return refused(lambda: train(model, shared_data))


def gathered_up_front(shortcut: str, folder: Path) -> dict[str, Any]:
    """The same, gathered before every forward and never resharded: runs, and is wrong without a word for ``input``."""
    model: Any = residual(shortcut)
    for block in model.blocks:
        fully_shard(block, reshard_after_forward=False)
    fully_shard(model, reshard_after_forward=False)
    model.set_reshard_after_backward(False)  # else a neighbour's backward reads freed memory

    def gather_again(module: nn.Module, args: Any) -> None:
        for group in (*model.blocks, model):
            group.reshard()  # the optimizer has stepped
            group.unshard()

    model.register_forward_pre_hook(gather_again, prepend=True)
    losses = train(model, shared_data)
    return {"difference": difference(losses, model, in_one_process(shortcut))}


def averaged(parameter: Tensor) -> None:
    """Hook of a parameter whose gradient is complete."""
    dist.all_reduce(parameter.grad)
    parameter.grad /= dist.get_world_size()


def own_all_reduce(shortcut: str, **config: Any) -> Residual:
    """Adapters that FSDP2 ignores; their gradients are averaged by hand."""
    model = residual(shortcut, **config)
    own = {p for layer in adapted_layers(model).values() for p in (layer.lora_A, layer.lora_B)}
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if config.get("dtype") == torch.float32 else None
    for module in (*model.blocks, model):
        fully_shard(module, ignored_params=own, **({"mp_policy": policy} if policy else {}))
    for parameter in own:
        parameter.register_post_accumulate_grad_hook(averaged)
    return model


def ignored(shortcut: str, folder: Path) -> dict[str, Any]:
    model = own_all_reduce(shortcut)
    losses = train(model, shared_data)
    return {"difference": difference(losses, model, in_one_process(shortcut))}


def ignored_costs(folder: Path) -> dict[str, Any]:
    """A policy passes the adapters over; clipping them together with sharded parameters is refused by PyTorch."""
    model = own_all_reduce("none", dtype=torch.float32)
    dtypes: list[str] = []
    look = model.blocks[1].up
    look.register_forward_pre_hook(lambda m, args: dtypes.extend([str(m.weight.dtype), str(m.lora_A.dtype)]))
    with torch.no_grad():
        model(share(batch(0, torch.float32))[0])
    clipping = refused(lambda: train(own_all_reduce("none", bias="all"), shared_data))
    return {"dtypes": dtypes, "clipping": clipping}


def in_bank(shortcut: str) -> Any:
    """The adapters in a module of their own on the root, where the layers look them up."""
    model: Any = residual(shortcut)
    layers = list(adapted_layers(model).values())
    bank = nn.ParameterList(p for layer in layers for p in (layer.lora_A, layer.lora_B))
    for i, layer in enumerate(layers):
        del layer.lora_A, layer.lora_B
        found = {name: property(lambda self, at=2 * i + k: bank[at]) for k, name in enumerate(("lora_A", "lora_B"))}
        layer.__class__ = type("Banked", (ResLoRALinear,), found)
    model.bank = bank
    for module in (*model.blocks, model):
        fully_shard(module)
    return model


def banked(shortcut: str, folder: Path) -> dict[str, Any]:
    model = in_bank(shortcut)
    losses = train(model, shared_data)
    saved, whole = residual(shortcut).state_dict(), StateDictOptions(full_state_dict=True)
    return {
        "difference": difference(losses, model, in_one_process(shortcut)),
        "adapter_keys": [key for key in model.state_dict() if key.endswith(("lora_A", "lora_B"))],
        "load": refused(lambda: set_model_state_dict(model, saved, options=whole)),
    }


RECIPES: dict[str, Scenario] = {
    **{f"recipe naive {shortcut}": partial(naive, shortcut) for shortcut in ("input", "block")},
    **{f"recipe gathered up front {shortcut}": partial(gathered_up_front, shortcut) for shortcut in SHORTCUTS},
    **{f"recipe ignored {shortcut}": partial(ignored, shortcut) for shortcut in SHORTCUTS},
    **{f"recipe bank {shortcut}": partial(banked, shortcut) for shortcut in SHORTCUTS},
    "recipe ignored_costs": ignored_costs,
}

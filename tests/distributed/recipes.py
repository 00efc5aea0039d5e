"""What other recipes for FSDP2 than shard_reslora do: fail, go silently wrong or lose something. For two processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from reslora_kernels.adapt.record import adapted_layers
from reslora_kernels.layers.linear import ResLoRALinear

from .fsdp import refused
from .residual import SHORTCUTS, Residual, batch, difference, in_one_process, residual, share, shared_data, train

Scenario = Callable[[Path], dict[str, Any]]


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


SCENARIOS: dict[str, Scenario] = {
    **{f"recipe naive {shortcut}": partial(naive, shortcut) for shortcut in ("input", "block")},
    **{f"recipe gathered up front {shortcut}": partial(gathered_up_front, shortcut) for shortcut in SHORTCUTS},
    **{f"recipe ignored {shortcut}": partial(ignored, shortcut) for shortcut in SHORTCUTS},
    **{f"recipe bank {shortcut}": partial(banked, shortcut) for shortcut in SHORTCUTS},
    "recipe ignored_costs": ignored_costs,
}

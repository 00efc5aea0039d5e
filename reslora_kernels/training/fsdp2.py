"""shard_reslora: FSDP2 for models whose layers read their neighbours' adapters. DDP needs nothing of this."""

from __future__ import annotations

from collections.abc import Iterable
from inspect import signature
from typing import Any

import torch
from torch import nn

from ..adapt.record import adapted_layers, record_of
from ..checks import check_module
from ..dtensors import initialised, is_sharded, refuse_fsdp
from ..layers.quantized_linear import QuantizedResLoRALinear
from ..quantizers import quantizer_of

_LENT = "_lent_adapters"


def shard_reslora(model: nn.Module, blocks: Iterable[nn.Module], **fully_shard_kwargs: Any) -> nn.Module:
    """Shard an adapted model with FSDP2: ``fully_shard`` on every block, then on the model, in place.

        apply_reslora(model, config)
        shard_reslora(model, model.model.layers, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    A layer reads the adapters of earlier layers (``block``) or of the next one (``input``) while those layers' block is
    resharded, and gets gradients for them when that block has finished its backward. Adapters in their block's group
    would therefore be missing or, if gathered beforehand, miss gradients. Here the frozen weights are sharded block by
    block, and all adapters with the model itself, whose group is whole from the start of a forward to the end of its
    backward. They stay registered on their layers, so names in state dicts, optimizers and saved adapters are the usual
    ones. Call it after ``apply_reslora`` or ``load_adapter`` and before the optimizer is built; call the model itself,
    not a part of it.

    Args:
        model: an adapted model, which is changed; on the meta device too.
        blocks: modules inside it to gather and reshard one at a time, a decoder's layers say. A block inside another
            one comes first.
        **fully_shard_kwargs: for every call of ``torch.distributed.fsdp.fully_shard``: ``mesh``, ``mp_policy``,
            ``reshard_after_forward``, ``offload_policy``, ``ignored_params``, ``shard_placement_fn``.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` or a block is not a module.
        ValueError: ``model`` is not adapted, merged or sharded already, or quantised in a form that cannot be cut; no
            block, or one that is not inside the model; trained parameters outside the blocks differ in dtype from the
            adapters.
        RuntimeError: no process group, or a PyTorch before 2.7.
    """
    adapters = [p for layer in adapted_layers(model).values() for p in layer.adapter_parameters().values()]
    _check_quantized(model, fully_shard_kwargs.get("mp_policy"))
    if record_of(model).tables:
        raise ValueError("trained tokens (trainable_token_indices) are read beside their shards: use DDP")
    if record_of(model).merged is not None:
        raise ValueError("model is merged: call unmerge_reslora(model) before sharding it")
    blocks = _checked_blocks(model, blocks)
    ignored = set(fully_shard_kwargs.pop("ignored_params", None) or ())
    if ignored & set(adapters):
        raise ValueError("ignored_params must not hold adapters: their gradients would not be averaged")
    _check_dtypes(model, blocks, adapters, ignored)
    if not initialised():
        raise RuntimeError(
            "shard_reslora needs a process group: start with torchrun or accelerate launch and call "
            "torch.distributed.init_process_group first"
        )
    refuse_fsdp(model, "sharded again", "call shard_reslora once, instead of fully_shard")
    if is_sharded(model) and fully_shard_kwargs.get("mesh") is None:
        raise ValueError("model is tensor parallel: give mesh=, the other dimension of the mesh that its plan is on")
    from torch.distributed.fsdp import fully_shard

    if "ignored_params" not in signature(fully_shard).parameters:
        raise RuntimeError(f"shard_reslora needs PyTorch 2.7 for fully_shard's ignored_params, got {torch.__version__}")
    for block in blocks:
        fully_shard(block, ignored_params=ignored | set(adapters), **fully_shard_kwargs)
    # FSDP2 collects a group's parameters from modules that no other group holds. As parameters shared with such a
    # module, the adapters join the model's group, and every registration of a shared parameter is kept up to date.
    model.register_module(_LENT, nn.ParameterList(adapters))
    try:
        fully_shard(model, ignored_params=ignored, **fully_shard_kwargs)
    finally:
        delattr(model, _LENT)
    return model


def _checked_blocks(model: nn.Module, blocks: Iterable[nn.Module]) -> list[nn.Module]:
    if not isinstance(blocks, Iterable):
        raise TypeError(f"blocks must be modules inside model, model.model.layers say, got {type(blocks).__name__}")
    chosen = list(blocks)
    if not chosen:
        raise ValueError("blocks must hold at least one module, got none")
    inside = {id(module) for module in model.modules()}
    for i, block in enumerate(chosen):
        check_module(f"blocks[{i}]", block)
        if block is model or id(block) not in inside:
            what = "the model itself" if block is model else f"a {type(block).__name__} that is not in the model"
            raise ValueError(f"blocks[{i}] must be a module inside model, got {what}")
    if len({id(block) for block in chosen}) != len(chosen):
        raise ValueError("blocks must not hold the same module twice")
    return chosen


def _check_quantized(model: nn.Module, policy: Any) -> None:
    """Packed weights are cut as they are; a policy that casts them to another dtype would change their bits."""
    for name, layer in adapted_layers(model).items():
        if not isinstance(layer, QuantizedResLoRALinear):
            continue
        quantizer = quantizer_of(layer.base_layer)
        if quantizer is None or not quantizer.shards(layer.base_layer):
            held = "merged" if quantizer is None else f"quantised by {quantizer.library}"
            raise ValueError(
                f"the weight of {name!r} is {held} and cannot be cut by shard_reslora: use DDP, or a base in "
                "bitsandbytes' 4 bits"
            )
        dtype, cast = layer.base_layer.weight.dtype, getattr(policy, "param_dtype", None)
        if dtype.is_floating_point and cast not in (None, dtype):
            raise ValueError(
                f"the weight of {name!r} holds 4 bits packed as {dtype}, which mp_policy would cast to {cast}: "
                f"quantise with bnb_4bit_quant_storage={cast}, or give a policy of param_dtype={dtype}"
            )


def _check_dtypes(
    model: nn.Module, blocks: list[nn.Module], adapters: list[nn.Parameter], ignored: set[nn.Parameter]
) -> None:
    """FSDP2 wants one dtype for the trained parameters of a group and says so at the first forward only."""
    elsewhere = {id(parameter) for block in blocks for parameter in block.parameters()}
    for name, parameter in model.named_parameters():
        outside = id(parameter) not in elsewhere and parameter not in ignored
        if parameter.requires_grad and outside and parameter.dtype != adapters[0].dtype:
            raise ValueError(
                f"trained parameters outside the blocks are sharded with the adapters and must be {adapters[0].dtype} "
                f"like them; {name!r} is {parameter.dtype}"
            )

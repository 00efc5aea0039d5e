"""Models over many GPUs: shard_reslora, and what each GPU holds and sends in a training step, layout by layout.

FSDP2 needs shard_reslora since layers read their neighbours' adapters; DDP needs nothing of it. What is held and sent
is arithmetic on sizes alone. Collectives are counted as rings: of B bytes, spread over n processes, an all-reduce sends
2 (n - 1)/n B from each, an all-gather or a reduce-scatter half of that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from inspect import getsource, signature
from math import gcd
from typing import Any, NamedTuple

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
        RuntimeError: no process group, a PyTorch before 2.7, or one that cannot cut the integers of a quantised base.
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
    if not all(parameter.is_floating_point() or parameter in ignored for parameter in model.parameters()):
        _check_integers()
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


def _check_integers() -> None:
    """A PyTorch before 2.13 may make every shard a parameter that requires a gradient, which integers cannot."""
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if release < (2, 13) and "requires_grad=param.requires_grad" not in getsource(FSDPParam._init_sharded_param):
        raise RuntimeError(
            f"shard_reslora of a quantised base needs a PyTorch whose fully_shard cuts integers, as 2.13 does, got "
            f"{torch.__version__}: use DDP, or quantise with a floating bnb_4bit_quant_storage"
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


MOMENTS = 2  # AdamW's, in the adapters' dtype
LIVE = 10**9  # values: DeepSpeed's stage3_max_live_parameters
NF4, NF4_SCALES = 1 / 2, 4 / 64  # bytes for a weight: 4 bits, and a float32 scale for each 64 of them


class Split(NamedTuple):
    """Bytes, or values, of what a tensor parallel plan cuts and of what each of its processes has whole."""

    cut: float = 0
    whole: float = 0

    def __add__(self, other: Split) -> Split:  # type: ignore[override]
        return Split(self.cut + other.cut, self.whole + other.whole)

    def __mul__(self, factor: float) -> Split:  # type: ignore[override]
        return Split(self.cut * factor, self.whole * factor)

    def over(self, processes: int) -> float:
        """What one process of a plan has."""
        return self.cut / processes + self.whole

    @property
    def total(self) -> float:
        return self.cut + self.whole


@dataclass(frozen=True)
class Sizes:
    """What of a model and its adapters counts, in bytes; activations are those of one token.

    Attributes:
        blocks: frozen weights in blocks, all of them together; ``block`` is the largest block's, ``around`` all others.
        quantizable: of those in blocks, the weights of linear layers, all values, and ``widest`` that of the largest.
        adapters: A, B and what goes with them.
        inside: kept for backward in all blocks; ``block_inside`` in the one that keeps most, ``block_input`` what goes
            into one, ``outside`` what is kept around the blocks.
        handed: what layers hand on to the next one of their chain, the r values of each.
        summed: what a plan's own reductions add up, in a forward and in a backward.
    """

    blocks: Split
    block: Split
    around: Split
    quantizable: float
    widest: float
    weight_bytes: int
    adapters: Split
    block_count: int
    inside: Split
    block_inside: Split
    block_input: float
    outside: float
    handed: float
    summed: tuple[float, float]
    heads: int = 1  # what tensor parallelism cuts attention by: of keys and values
    scales: float = 0  # of quantised weights, whole in every GPU

    @property
    def weights(self) -> Split:
        return self.blocks + self.around

    def quantized(self) -> Sizes:
        """With the linear layers of the blocks in NF4."""
        left = 1 - self.quantizable * (self.weight_bytes - NF4) / max(1, self.blocks.total)
        return replace(self, blocks=self.blocks * left, block=self.block * left, scales=self.quantizable * NF4_SCALES)


@dataclass(frozen=True)
class Footprint:
    """Bytes of one GPU in a step, and what it sends.

    Attributes:
        weights: the frozen ones, at rest; ``gathered`` what is whole for a while beside them.
        adapters: with their gradients; ``optimizer`` the moments of AdamW.
        activations: what backward needs, every block's; ``recomputed`` the same with activation checkpointing.
        sent: in one step of one batch, without checkpointing.
    """

    layout: str
    weights: float
    gathered: float
    adapters: float
    optimizer: float
    activations: float
    recomputed: float
    sent: float

    def total(self, recompute: bool) -> float:
        held = self.weights + self.gathered + self.adapters + self.optimizer
        return held + (self.recomputed if recompute else self.activations)

    def fits(self, memory: float) -> str:
        """ "yes", "with checkpointing" or "no", for a GPU of so many bytes."""
        if self.total(False) <= memory:
            return "yes"
        return "with checkpointing" if self.total(True) <= memory else "no"


def footprints(sizes: Sizes, gpus: int, tokens: int, tensor_parallel: int | None = None) -> Iterator[Footprint]:
    """Of every usual layout for ``gpus`` GPUs, each or each group of a plan with ``tokens`` tokens in a batch.

    Args:
        tensor_parallel: processes of a plan; None is the most of 8 that divide the GPUs and the model's heads.
    """
    plan = gcd(8, gpus, sizes.heads) if tensor_parallel is None else tensor_parallel
    yield replicated(sizes, gpus, tokens, "DDP")
    yield sharded(sizes, gpus, 1, tokens, "FSDP2")
    if plan > 1:
        across = f" x FSDP2 {gpus // plan}" if gpus > plan else ""
        yield sharded(sizes, gpus // plan, plan, tokens, f"TP {plan}{across}")
    yield zero3(sizes, gpus, tokens)
    yield replicated(sizes.quantized(), gpus, tokens, "NF4 + DDP", sizes.widest)
    nf4 = sharded(sizes.quantized(), gpus, 1, tokens, "NF4 + FSDP2")
    yield replace(nf4, gathered=nf4.gathered + sizes.widest)


def replicated(sizes: Sizes, gpus: int, tokens: int, name: str, gathered: float = 0) -> Footprint:
    """Everything whole in each GPU, rows of a batch apart; gradients are added up."""
    kept, recomputed = _activations(sizes, 1, tokens)
    adapters = sizes.adapters.total
    return Footprint(
        name, sizes.weights.total + sizes.scales, gathered, 2 * adapters, MOMENTS * adapters, kept, recomputed,
        2 * _ring(gpus) * adapters,
    )  # fmt: skip


def sharded(sizes: Sizes, gpus: int, plan: int, tokens: int, name: str) -> Footprint:
    """A plan over ``plan`` processes, and FSDP2 (``shard_reslora``) over ``gpus`` groups of them.

    FSDP2 has two blocks whole at a time, the running one and the next, and what is around the blocks, adapters
    included, from the start of a forward to the end of its backward.
    """
    blocks, around, adapters = sizes.blocks.over(plan), sizes.around.over(plan), sizes.adapters.over(plan)
    kept, recomputed = _activations(sizes, plan, tokens)
    ring, spread = _ring(gpus), gpus > 1
    gathered = min(2 * sizes.block.over(plan), blocks) + around if spread else 0
    whole = 2 * adapters if spread else 0  # gathered adapters, and their gradients before they are scattered
    sent = ring * (2 * blocks + around + 2 * adapters)
    sent += 2 * _ring(plan) * (sum(sizes.summed) * tokens + sizes.adapters.whole)
    return Footprint(
        name, (blocks + around) / gpus + sizes.scales, gathered, 2 * adapters / gpus + whole,
        MOMENTS * adapters / gpus, kept, recomputed, sent,
    )  # fmt: skip


def zero3(sizes: Sizes, gpus: int, tokens: int) -> Footprint:
    """DeepSpeed's ZeRO-3 with its defaults: weights stay whole after their use until ``LIVE`` values are.

    Every weight is gathered for a forward and again for its backward, adapters too, and the optimizer holds the values
    that it steps beside the moments.
    """
    weights, adapters = sizes.weights.total, sizes.adapters.total
    kept, recomputed = _activations(sizes, 1, tokens)
    spread = gpus > 1
    return Footprint(
        "ZeRO-3", weights / gpus, min(LIVE * sizes.weight_bytes, weights) if spread else 0,
        2 * adapters / gpus + (2 * adapters if spread else 0), (MOMENTS + 1) * adapters / gpus, kept, recomputed,
        _ring(gpus) * (2 * weights + 3 * adapters),
    )  # fmt: skip


def _activations(sizes: Sizes, plan: int, tokens: int) -> tuple[float, float]:
    """Kept for backward: all, and with activation checkpointing, where blocks keep their input and are run again.

    What layers hand on is kept in either case.
    """
    kept = sizes.inside.over(plan) + sizes.outside
    again = sizes.block_count * sizes.block_input + sizes.block_inside.over(plan) + sizes.outside + sizes.handed
    return kept * tokens, min(kept, again) * tokens


def _ring(processes: int) -> float:
    return (processes - 1) / processes

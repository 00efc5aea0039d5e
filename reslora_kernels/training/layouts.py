"""What a GPU holds and sends in a training step, by the way a model is spread over GPUs: arithmetic on sizes alone.

Collectives are counted as rings: of B bytes, spread over n processes, an all-reduce sends 2 (n - 1)/n B from each, an
all-gather or a reduce-scatter half of that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import gcd
from typing import NamedTuple

MOMENTS = 2  # AdamW's, in the adapters' dtype
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
    note: str = ""

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
    yield replace(sharded(sizes, gpus, 1, tokens, "ZeRO-3"), note="not supported: use FSDP2")
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


def _activations(sizes: Sizes, plan: int, tokens: int) -> tuple[float, float]:
    """Kept for backward: all, and with activation checkpointing, where blocks keep their input and are run again.

    What layers hand on is kept in either case.
    """
    kept = sizes.inside.over(plan) + sizes.outside
    again = sizes.block_count * sizes.block_input + sizes.block_inside.over(plan) + sizes.outside + sizes.handed
    return kept * tokens, min(kept, again) * tokens


def _ring(processes: int) -> float:
    return (processes - 1) / processes

"""Counter-based dropout mask: every backend draws the same bits from (seed, row, column), in any order, with no state.

The generator is Philox 4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
One call has 128 random bits and serves 8 neighbouring columns of one row, 16 bits each:

    counter = (column // 8, row mod 2^32, row div 2^32, 0)      key = (seed mod 2^32, seed div 2^32)
    element (row, column) reads word (column % 8) // 2, low half for an even column, high half for an odd one
    kept iff those 16 bits >= round(p * 2^16); a kept element is multiplied by 1 / (1 - p)

Counting by row and column group, not by a flat index, lets a kernel draw any tile without 64-bit arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ROUNDS = 7
COLUMNS_PER_CALL = 8
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
_CHUNK = 1 << 15  # counters per step on a CPU: enough work for each operator, few enough that they stay in cache


class Dropout(NamedTuple):
    """Drop an element of x with probability p; ``seed`` is an int64 tensor with one element on x's device."""

    seed: Tensor
    p: float

    @property
    def keep_scale(self) -> float:
        """What a kept element is multiplied by."""
        return 1.0 / (1.0 - self.p)


def new_seed(device: torch.device) -> Tensor:
    """A seed from torch's generator for ``device``: int64 tensor [], so that recomputation and graphs reproduce it."""
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)


def threshold(p: float) -> int:
    """The 16-bit threshold of probability p: an element is kept iff its bits are not below it."""
    return round(p * 65536)


def keep_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """bool [rows, columns], True where the element is kept.

    Args:
        seed: int64 tensor with one element, on the device where the mask is wanted.
        p: probability of dropping an element, in [0, 1).
    """
    groups = -(-columns // COLUMNS_PER_CALL)
    mask = seed.new_empty(rows, groups, COLUMNS_PER_CALL, dtype=torch.bool)  # batched where the seed is
    step = max(1, _CHUNK // max(1, groups)) if seed.device.type == "cpu" else max(1, rows)
    group, least = torch.arange(groups, device=seed.device), threshold(p)
    for start in range(0, rows, step):
        row = torch.arange(start, min(start + step, rows), device=seed.device)
        counter = (group.expand(len(row), groups), row[:, None] & _LOW, (row[:, None] >> 32) & _LOW, 0)
        words = philox(counter, (seed.reshape(()) & _LOW, (seed.reshape(()) >> 32) & _LOW))
        kept = mask[start : start + len(row)]
        for pair, word in enumerate(words):
            kept[..., 2 * pair] = (word & 0xFFFF) >= least
            kept[..., 2 * pair + 1] = word >= least << 16  # the same of the high half
    return mask.flatten(1)[:, :columns]


def drop(x: Tensor, dropout: Dropout) -> Tensor:
    """D(x) for x [M, K]."""
    return apply_mask(x, keep_mask(dropout.seed, x.shape[0], x.shape[1], dropout.p), dropout.p)


def apply_mask(x: Tensor, mask: Tensor, p: float) -> Tensor:
    """D(x): x [M, K] with dropped elements zero and kept ones times 1 / (1 - p). An Inf that is dropped becomes 0."""
    return torch.where(mask, x * (1.0 / (1.0 - p)), 0.0)


def philox(counter: Sequence[Tensor | int], key: Sequence[Tensor]) -> list[Tensor]:
    """Philox 4x32: four 32-bit words from a counter of four and a key of two, in int64 tensors."""
    c0, c1, c2, c3 = (torch.as_tensor(word, device=key[0].device) for word in counter)
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(_MULTIPLIER[0], c0)
        high1, low1 = _multiply(_MULTIPLIER[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return [c0, c1, c2, c3]


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """(high, low) 32-bit words of a * b. The product wraps around in int64, which leaves its 64 bits as they are."""
    product = a * b
    return (product >> 32) & _LOW, product & _LOW

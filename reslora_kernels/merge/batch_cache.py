"""What is computed from each calibration batch again and again, kept between runs where that is safe and small."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor
from torch.utils import _pytree as pytree

BYTES = 2**30  # that one Kept holds, on the tensors' device

Value = TypeVar("Value")


class Kept(Generic[Value]):
    """Pairs of batch and ``compute(batch)``, to run through more than once.

    Values are copies: a model may write over its output. A list's are kept, up to ``BYTES``; the rest is computed anew,
    as is all of an iterable that may give other batches the next time, as a shuffling DataLoader does.
    """

    def __init__(self, calibration: Iterable[Any], compute: Callable[[Any], Value]) -> None:
        self._calibration, self._compute = calibration, compute
        self._room = BYTES if isinstance(calibration, Sequence) else 0
        self._kept: dict[int, Value] = {}

    def __iter__(self) -> Iterator[tuple[Any, Value]]:
        for i, batch in enumerate(self._calibration):
            yield batch, self._kept[i] if i in self._kept else self._computed(i, batch)

    def _computed(self, i: int, batch: Any) -> Value:
        value: Value = pytree.tree_map_only(Tensor, Tensor.clone, self._compute(batch))
        size = sum(leaf.nbytes for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))
        if size <= self._room:
            self._room -= size
            self._kept[i] = value
        return value

"""AdaptedWeight: stands in for a parameter while its module runs, and knows how to be multiplied by.

Whatever a module's forward does to get at its experts (one after the other, gathered, grouped), it ends in a matrix
product. The stand-in lets that product run on the frozen weight as it is, by the operation that the module chose, and
adds the low-rank product of the same rows: W + s B A is never made. What is no product is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..config import ResLoRAConfig
from ..ops import Operands, fused_linear
from ..ops.grouped import Groups, add_low_rank, fused_experts, fuses
from ..side_channel import SideChannel
from .adapter import joined

_FACTS = frozenset((
    "shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "dim", "size", "numel", "element_size",
    "data_ptr", "stride", "is_contiguous", "is_floating_point",
))  # fmt: skip
_MATMULS = ("matmul", "__matmul__", "bmm", "mm")
_AT_ONCE = ("_grouped_mm", "grouped_mm")
_GROUPED = (*_AT_ONCE, "grouped_mm_fallback")


class OfParameter(Protocol):
    """The adapter of a parameter, as far as its stand-in asks."""

    owner: nn.Module
    parameter_name: str
    num_experts: int
    transposed: bool
    config: ResLoRAConfig

    @property
    def scaling(self) -> float: ...

    def factors(self) -> list[tuple[Tensor, Tensor]]: ...


class AdaptedWeight:
    """W + ΔW of one parameter [N, K] or [E, N, K], or of a part of it, as the right or left factor of products.

    Args:
        layer: whose A and B they are.
        read: gives the frozen values, when they are needed: another library may load them just before.
        pick: which experts this is a part for: a number, or a tensor of numbers; None for all of them.
        flipped: whether the last two dimensions are those of the parameter in the other order.
    """

    def __init__(
        self,
        layer: OfParameter,
        read: Callable[[], Tensor],
        pick: int | Tensor | None = None,
        flipped: bool = False,
        whole: AdaptedWeight | None = None,
    ) -> None:
        self._layer, self._read, self._pick, self._flipped = layer, read, pick, flipped
        self._whole = whole or self
        self._values: Tensor | None = None
        self._by_expert: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] | None = None

    @property
    def frozen(self) -> Tensor:
        """The values without the adapter, in the shape that is asked for."""
        if self._values is None:
            self._values = self._read()
        return self._values

    def __getattr__(self, name: str) -> Any:
        if name in _FACTS:
            return getattr(self.frozen, name)
        raise AttributeError(self._refusal(f"reads .{name} of"))

    def _seen(self, read: Callable[[Tensor], Tensor], pick: int | Tensor | None = None, flip: bool = False) -> Any:
        pick = self._pick if pick is None else pick
        return AdaptedWeight(self._layer, lambda: read(self.frozen), pick, self._flipped != flip, self._whole)

    def __getitem__(self, index: Any) -> AdaptedWeight:
        """The part of one expert, or of one for each token."""
        if self._pick is not None or self.ndim != 3 or not _is_index(index):
            raise TypeError(self._refusal(f"takes the part [{index!r}] of"))
        if isinstance(index, Tensor) and index.dim() == 0:
            index = int(index)
        return self._seen(lambda values: values[index], index)  # type: ignore[no-any-return]

    def __iter__(self) -> Any:
        return iter([self[e] for e in range(self.shape[0])])

    def __len__(self) -> int:
        return int(self.shape[0])

    def transpose(self, first: int, second: int) -> AdaptedWeight:
        if {first % self.ndim, second % self.ndim} != {self.ndim - 2, self.ndim - 1}:
            raise TypeError(self._refusal(f"takes transpose({first}, {second}) of"))
        return self._seen(lambda values: values.transpose(first, second), flip=True)  # type: ignore[no-any-return]

    @property
    def mT(self) -> AdaptedWeight:
        return self.transpose(-2, -1)

    @property
    def T(self) -> AdaptedWeight:
        return self.t()

    def t(self) -> AdaptedWeight:
        if self.ndim != 2:
            raise TypeError(self._refusal("takes .T of"))
        return self.transpose(0, 1)

    def to(self, *args: Any, **kwargs: Any) -> AdaptedWeight:
        return self._seen(lambda values: values.to(*args, **kwargs))  # type: ignore[no-any-return]

    type = to

    def float(self) -> AdaptedWeight:
        return self.to(torch.float32)

    def contiguous(self) -> AdaptedWeight:
        return self

    def __matmul__(self, other: Tensor) -> Tensor:
        factor: Any = self
        return torch.matmul(factor, other)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", str(func))
        one = next((each for each in (*args, *kwargs.values()) if isinstance(each, AdaptedWeight)), None)
        assert one is not None
        if name == "linear" and len(args) >= 2 and args[1] is one:
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            return one.mT._times(args[0], lambda w: func(args[0], w.mT, bias), bias)
        if name in _MATMULS and len(args) == 2 and not kwargs:
            if args[1] is one:
                return one._times(args[0], lambda w: func(args[0], w))
            return one.mT._times(args[1].mT, lambda w: func(w.mT, args[1]).mT).mT
        if name in _GROUPED and len(args) >= 2 and args[1] is one and kwargs.get("bias") is None:
            groups = Groups(kwargs["offs"] if "offs" in kwargs else args[2], at_once=name in _AT_ONCE)
            return one._grouped(args[0], lambda w: func(args[0], w, *args[2:], **kwargs), groups)
        raise TypeError(one._refusal(f"computes {name} of"))

    def _times(self, x: Tensor, frozen_product: Callable[[Tensor], Tensor], bias: Tensor | None = None) -> Tensor:
        """x [..., K] times this [K, N], or one such matrix for each index of x's leading dimension."""
        if (self._pick is None and self.ndim == 2) or isinstance(self._pick, int):
            return self._of_one(x, bias)
        count = self._layer.num_experts
        if self._pick is None and (x.dim() == 2 or x.shape[:-2] == (count,)):
            x = x.expand(count, *x.shape[-2:])
            return self._grouped(x, frozen_product, Groups.equal(count, x.shape[-2], x.device))
        if self._pick is not None and x.shape[:-1] == (*self._pick.shape, 1):
            return self._grouped(x, frozen_product, Groups.of(self._pick, count))
        raise TypeError(self._refusal(f"multiplies a tensor {list(x.shape)} by"))

    def _of_one(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., K] times the matrix [K, N] of one expert, or of the only one, plus a bias [N]."""
        layer = self._layer
        stacks = self._matrices()
        operands = Operands(x, self.frozen.mT, bias, None, None, [a for a, _ in stacks], [b for _, b in stacks])
        y: Tensor = fused_linear(operands, SideChannel(1.0, layer.scaling), 0.0, layer.config.backend)[0]
        return y

    def _matrices(self) -> list[tuple[Tensor, Tensor]]:
        """A [r, K] and B [N, r] of one expert, its own and those of earlier blocks.

        They are parts of one unbinding for the whole pass, of which backward makes one tensor again.
        """
        whole = self._whole
        if not isinstance(self._pick, int):
            return [self._turned(a, b) for a, b in self._layer.factors()]
        if whole._by_expert is None:
            whole._by_expert = [(a.unbind(), b.unbind()) for a, b in self._layer.factors()]
        return [self._turned(a[self._pick], b[self._pick]) for a, b in whole._by_expert]

    def _grouped(self, x: Tensor, frozen_product: Callable[[Tensor], Tensor], groups: Groups) -> Tensor:
        layer = self._layer
        of_a, of_b = zip(*(self._turned(a, b) for a, b in layer.factors()), strict=True)
        a, b = joined(of_a, -2), joined(of_b, -1)
        if fuses(layer.config.backend):  # which gathers no weights, whatever the module was about to do
            whole = self._whole.frozen
            return fused_experts(x, whole if self._flipped else whole.mT, a, b, groups, layer.scaling)
        return add_low_rank(frozen_product(self.frozen).contiguous(), x, a, b, groups, layer.scaling)

    def _turned(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The two in the order in which x meets them: ΔW is B A or its transpose, and x stands on either side."""
        return (b.mT, a.mT) if self._flipped == self._layer.transposed else (a, b)

    def _refusal(self, does: str) -> str:
        layer = self._layer
        return (
            f"{type(layer.owner).__name__} {does} its parameter {layer.parameter_name!r}, and an adapter can follow "
            "matrix products only: leave it out of target_parameters, or run the experts by another implementation "
            "(model.set_experts_implementation('grouped_mm'), 'batched_mm' or 'eager')"
        )


def _is_index(index: Any) -> bool:
    if isinstance(index, Tensor):
        return not index.is_floating_point() and index.dtype not in (torch.bool, torch.uint8)
    return isinstance(index, int) and not isinstance(index, bool)

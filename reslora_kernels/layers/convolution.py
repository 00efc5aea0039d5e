"""ResLoRALinears around weights of another layout: nn.Conv1d to nn.Conv3d on PyTorch's convolutions, GPT-2's Conv1D."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import ResLoRAConfig
from ..dtensors import is_dtensor
from ..ops.registered import unless_recomputed
from ..quantizers import QUANTIZERS
from .adapter import joined
from .linear import ResLoRALinear
from .offloading import hold
from .shortcuts import Call, folded

_CONVOLUTIONS: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_GEOMETRY = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


class ResLoRAConvolution(ResLoRALinear):
    """y = x * W + b + s (u Bᵀ), u = x * A down to r channels: PEFT's form, with B a convolution by 1.

    In every position of the output it is the linear layer on the patch of x that lies under the kernel. So A is held as
    [r, in_channels * kernel] and B as [out_channels, r]; u, and what is handed on, is [batch, *positions, r]. With
    ``groups`` above 1, A sees all channels and B, held as [out_channels, r / groups], is grouped as W is, as in PEFT;
    no grouped weight can hold the product, so that such a layer does not merge. The kernels of A have W's stride,
    padding and dilation. There is no fused kernel: both parts are library calls.
    """

    is_linear: ClassVar[bool] = False
    fused: ClassVar[bool] = False
    shares_projections: ClassVar[bool] = False
    samples_first: bool | None = True

    @property
    def _like(self) -> Any:
        """What has the attributes of the convolution: the layer itself, as a rule."""
        return self.holds_weight

    @property
    def kernel_groups(self) -> int:
        groups: int = self._like.groups
        return groups

    @property
    def b_parts(self) -> tuple[Tensor, ...]:
        parts = (self.lora_B,) if self.start_B is None else (self.lora_B, self.start_B)
        groups = self.kernel_groups
        return tuple([_ungrouped(part, groups) for part in parts])

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """W [N, K] over all input channels, zero between groups."""
        return _ungrouped(super().dense_weight(dtype).flatten(1), self.kernel_groups)

    def set_merged(self, weight: Tensor) -> None:
        hold(self.holds_weight, weight.view(self.weight.shape))
        self.merged = True

    def frozen_forward(self, x: Tensor) -> Tensor:
        return self._convolved(x, self.weight, self.bias, self.kernel_groups)

    def leading(self, x: Tensor) -> torch.Size:
        """[batch, *positions] of the output."""
        base = self._like
        sizes = zip(self._padded(x), base.kernel_size, base.stride, base.dilation, strict=True)
        positions = [(size - (k - 1) * dilation - 1) // stride + 1 for size, k, stride, dilation in sizes]
        return torch.Size((*x.shape[: -len(positions) - 1], *positions))

    def _observe(self, x: Tensor, residual: Tensor | None) -> None:
        super()._observe(self.patches(x), residual)

    def patches(self, x: Tensor) -> Tensor:
        """The patches of x [batch, *positions, K] under the kernel."""
        base, dims = self._like, len(self._like.kernel_size)
        mode = "constant" if base.padding_mode == "zeros" else base.padding_mode
        patches = F.pad(x, base._reversed_padding_repeated_twice, mode=mode)
        for i, (k, stride, dilation) in enumerate(zip(base.kernel_size, base.stride, base.dilation, strict=True)):
            patches = patches.unfold(x.dim() - dims + i, (k - 1) * dilation + 1, stride)[..., ::dilation]
        return patches.movedim(x.dim() - dims - 1, -dims - 1).flatten(-dims - 1)

    def _low_rank(self, x: Tensor, bias: Tensor | None, p: float, call: Call) -> tuple[Tensor, Tensor | None]:
        a_stack, b_stack, c, residual, hand, _, _ = folded(call)
        base, b = self._like, joined(b_stack, 1).to(x.dtype)
        channels = -len(base.kernel_size) - 1
        if a_stack:
            h = self._projected(x, a_stack, p)
            u = h[..., : b.shape[1]]
            u = u if c == 1 else u * c
            u = u if residual is None else u + _unless_recomputed(residual)
        else:
            assert residual is not None
            u = residual
        expanded = _function(base)(u.movedim(-1, channels), b.view(*b.shape, *(1,) * len(base.kernel_size)))
        y = self._convolved(x, self.weight, bias, base.groups)
        y = torch.add(y, expanded, alpha=self.scaling)
        return y, None if hand is None else _unless_recomputed(h[..., slice(*hand)])

    def _projected(self, x: Tensor, a_stack: tuple[Tensor, ...], p: float) -> Tensor:
        base, a = self._like, joined(a_stack, 0).to(x.dtype)
        kernels = a.view(len(a), base.in_channels, *base.kernel_size)
        h = self._convolved(F.dropout(x, p) if p > 0 else x, kernels, None, 1)
        return h.movedim(-len(base.kernel_size) - 1, -1)

    def _convolved(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        base = self._like
        padding: Any = base.padding
        if base.padding_mode != "zeros":
            x, padding = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode), 0
        y: Tensor = _function(base)(x, weight, bias, base.stride, padding, base.dilation, groups)
        return y

    def _padded(self, x: Tensor) -> Sequence[int]:
        """The sizes of x with its padding."""
        around = self._like._reversed_padding_repeated_twice
        dims = len(around) // 2
        return [x.shape[i - dims] + sum(around[2 * (dims - 1 - i) : 2 * (dims - i)]) for i in range(dims)]

    @staticmethod
    def stands_in_for(module: nn.Module) -> bool:
        return isinstance(module, _CONVOLUTIONS)

    @staticmethod
    def why_not(module: Any) -> str | None:
        kind = _class(module)
        others = {*module._parameters, *module._buffers, *module._modules} - {"weight", "bias"}
        if others or module._parameters.get("weight") is None:
            return (
                f"a {type(module).__name__} that holds {', '.join(sorted(others)) or 'no weight'}: only a weight and a "
                "bias that are parameters can be adapted. Remove weight_norm, spectral_norm or pruning first"
            )
        if is_dtensor(module.weight):
            return f"a {type(module).__name__} that a tensor parallel plan spreads: only linear layers are adapted so"
        if nn.parameter.is_lazy(module.weight):
            return f"a {type(module).__name__} whose sizes are not known before its first forward"
        if type(module).forward is not kind.forward or type(module)._conv_forward is not kind._conv_forward:
            return f"a {type(module).__name__}, whose forward is not that of {kind.__name__}"
        library = type(module.weight).__module__.partition(".")[0]
        if library in [quantizer.library for quantizer in QUANTIZERS] or not module.weight.is_floating_point():
            return f"a {type(module).__name__} with a quantised weight: only linear layers are adapted quantised"
        return None

    @staticmethod
    def refuses(module: Any, config: ResLoRAConfig) -> str | None:
        if config.use_dora:
            return "use_dora is for linear layers: set it to False, or give this layer an adapter of its own"
        if config.backend in ("triton", "cuda"):
            return f"backend={config.backend!r} has no kernel for it: take 'auto', with which it runs on library calls"
        if config.linear_start:
            return f"init_lora_weights={config.init_lora_weights!r} is for linear layers: take True, 'pissa' or 'olora'"
        if config.r % module.groups:
            return (
                f"its groups={module.groups} must divide the rank, which is {config.r}: give it another one in "
                "rank_pattern"
            )
        if module.groups > 1 and config.has_start:
            return f"init_lora_weights={config.init_lora_weights!r} starts from a weight without groups: take True"
        return None

    @staticmethod
    def sizes(module: Any) -> tuple[int, int]:
        return module.in_channels * prod(module.kernel_size), module.out_channels

    @staticmethod
    def form(module: Any) -> tuple[Any, ...]:
        return tuple(getattr(module, name) for name in _GEOMETRY)

    @classmethod
    def matrices(cls, module: Any, r: int) -> dict[str, tuple[int, ...]]:
        k, n = cls.sizes(module)
        return {"A": (r, k), "B": (n, r // module.groups)}

    def _shape_of(self, kind: str) -> tuple[int, ...]:
        return self.matrices(self._like, self.config.r)[kind]

    @classmethod
    def peft_matrices(cls, module: Any, r: int) -> dict[str, tuple[int, ...]]:
        one = (1,) * len(module.kernel_size)
        return {
            "lora_A.weight": (r, module.in_channels, *module.kernel_size),
            "lora_B.weight": (module.out_channels, r // module.groups, *one),
        }

    def for_peft(self, a: Tensor, b: Tensor, rank: int) -> dict[str, Tensor]:
        """As for a linear layer; with groups, the ranks of every group lie side by side.

        Raises:
            ValueError: ``rank`` is no multiple of the groups, or B [N, R] connects one with another.
        """
        groups = self.kernel_groups
        if groups == 1:
            return super().for_peft(a, b, rank)
        order = torch.arange(len(a)).view(-1, groups, self.config.r // groups).movedim(1, 0).flatten(1)
        padding = (rank - len(a)) // groups
        blocks = b.view(groups, -1, len(a))[torch.arange(groups)[:, None], :, order].movedim(1, 2)
        if rank % groups or not torch.equal(_ungrouped(blocks.flatten(0, 1), groups), b[:, order.flatten()]):
            raise ValueError(f"its groups={groups} do not divide rank {rank}, or the update connects them")
        a = F.pad(a[order], (0, 0, 0, padding)).flatten(0, 1)
        shapes = self.peft_matrices(self._like, rank).items()
        tensors = (a, F.pad(blocks, (0, padding)))
        return {name: tensor.reshape(shape) for (name, shape), tensor in zip(shapes, tensors, strict=True)}

    @property
    def exports(self) -> str | None:
        """Why PEFT would make another function of A and B; None where it does not."""
        base = self._like
        if base.padding_mode != "zeros" or any(step != 1 for step in base.dilation):
            return (
                f"padding_mode={base.padding_mode!r} and dilation={base.dilation} of its kernel, which PEFT's A lacks"
            )
        return None


def _class(module: nn.Module) -> Any:
    """The convolution that a module is, or is a subclass of."""
    return next(kind for kind in _CONVOLUTIONS if isinstance(module, kind))


def _function(base: Any) -> Any:
    return (F.conv1d, F.conv2d, F.conv3d)[len(base.kernel_size) - 1]


def _ungrouped(matrix: Tensor, groups: int) -> Tensor:
    """[N, Q] of a grouped map, each row for the columns of its own group, as [N, groups * Q] with zeros elsewhere."""
    if groups == 1:
        return matrix
    columns = matrix.shape[1]
    parts = enumerate(matrix.chunk(groups))
    return torch.cat([F.pad(part, (i * columns, (groups - 1 - i) * columns)) for i, part in parts])


def _unless_recomputed(h: Tensor) -> Tensor:
    """What is handed on, as it is; from compiled code a RuntimeError where a backward would recompute it wrongly."""
    return unless_recomputed(h) if torch.compiler.is_compiling() else h


class TransposedResLoRALinear(ResLoRALinear):
    """y = x W + b + the low-rank term, with ``weight`` W [K, N] as ``transformers.pytorch_utils.Conv1D`` has it.

    Every pass reads W by its strides; nothing is copied. A, B and merged updates are those of the linear layer with Wᵀ.
    """

    @property
    def frozen_weight(self) -> Tensor:
        weight: Tensor = self.weight
        return weight.T

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        return super().dense_weight(dtype).T

    def frozen_forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.T, self.bias)

    def set_merged(self, weight: Tensor) -> None:
        hold(self.holds_weight, weight.T)
        self.merged = True

    @staticmethod
    def stands_in_for(module: nn.Module) -> bool:
        return (kind := _kind()) is not None and isinstance(module, kind)

    @staticmethod
    def why_not(module: Any) -> str | None:
        held_names = {*module._parameters, *module._buffers, *module._modules}
        if held_names != {"weight", "bias"}:
            return (
                f"a {type(module).__name__} that holds {', '.join(sorted(held_names))}: not a weight and a bias alone"
            )
        if type(module).forward is not getattr(_kind(), "forward", None):
            return f"a {type(module).__name__}, whose forward is not that of Conv1D"
        return None

    @staticmethod
    def sizes(module: Any) -> tuple[int, int]:
        k, n = module.weight.shape
        return k, n


def _kind() -> type[nn.Module] | None:
    """Transformers' Conv1D; None while that library is not imported, as no model can hold one then."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)

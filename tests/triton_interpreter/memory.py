"""Which addresses a launch may touch, in which order its programs run, and the number formats that numpy lacks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

TAG_SHIFT = 48  # addresses of a process stay below 2^47, so the upper bits of a pointer can name its argument
ADDRESS_MASK = np.uint64((1 << TAG_SHIFT) - 1)


class OutOfBounds(IndexError):
    """A load or store outside the tensor its pointer came from."""


@dataclass(frozen=True)
class View:
    """The bytes that a strided tensor reaches: ``start`` plus steps of each (count, stride in bytes), widest first.

    The last pair is a run of bytes. Dimensions that continue each other are one; overlapping ones count as their hull.
    """

    name: str
    start: int
    extents: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> View:
        """The view of one argument."""
        size = tensor.element_size()
        label = f"{name} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        if not tensor.numel():
            return cls(label, tensor.data_ptr(), ((0, 1),))
        extents = [(size, 1)]
        steps = sorted(zip(tensor.stride(), tensor.shape, strict=True))
        for stride, count in ((s * size, n) for s, n in steps if s and n > 1):
            inner, inner_stride = extents[-1]
            if stride <= inner * inner_stride:
                extents[-1] = (inner + (count - 1) * stride // inner_stride, inner_stride)
            else:
                extents.append((count, stride))
        return cls(label, tensor.data_ptr(), tuple(reversed(extents)))

    @property
    def end(self) -> int:
        """First address behind the last byte."""
        return self.start + sum((count - 1) * stride for count, stride in self.extents) + 1

    def misses(self, addresses: np.ndarray, width: int) -> np.ndarray | None:
        """Which of the accesses of ``width`` bytes leave the view; None where none does, found the quick way."""
        inside = int(addresses.min()) >= self.start and int(addresses.max()) + width <= self.end
        if inside and len(self.extents) == 1:
            return None
        rest = addresses.astype(np.int64) - self.start
        outside = rest < 0
        for count, stride in self.extents[:-1]:
            index = rest // stride
            outside |= index >= count
            rest -= index * stride
        return outside | (rest + width > self.extents[-1][0])


@dataclass
class State:
    """What the current launch may touch and in which order its programs run."""

    seed: int = 0
    launches: int = 0
    views: list[View] = field(default_factory=list)
    numbers: dict[int, int] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)

    def register(self, name: str, argument: Any) -> None:
        """Make the tensors in an argument (a tensor, a descriptor, a tuple of them) legal to access."""
        if isinstance(argument, tuple):
            for index, item in enumerate(argument):
                self.register(f"{name}[{index}]", item)
        elif isinstance(argument, TensorDescriptor):
            self.register(name, argument.base)
        elif hasattr(argument, "data_ptr"):
            tensor = interpreter._unwrap_tensor(argument)
            if tensor.device.type != "cpu":
                raise ValueError(f"{name} is on {tensor.device}, and the interpreter reads the CPU's memory")
            self.numbers[id(argument)] = len(self.views) + 1
            self.views.append(View.of(name, tensor))

    def tag(self, argument: Any) -> np.uint64:
        """The upper bits of pointers into this argument."""
        return np.uint64(self.numbers[id(argument)] << TAG_SHIFT)

    def check(self, pointers: np.ndarray, mask: np.ndarray, width: int, what: str) -> np.ndarray:
        """Addresses of tagged pointers, after every lane that the mask lets through was found legal."""
        pointers, mask = np.broadcast_arrays(pointers, mask)
        active = pointers if mask.all() else pointers[mask]
        if active.size:
            tag = int(active.min()) >> TAG_SHIFT
            if tag != int(active.max()) >> TAG_SHIFT or not 1 <= tag <= len(self.views):
                raise OutOfBounds(f"{what} through pointers that come from no argument or from several {self.where}")
            view, addresses = self.views[tag - 1], active & ADDRESS_MASK
            outside = view.misses(addresses, width)
            if outside is not None and outside.any():
                first = int(addresses[outside].flat[0]) - view.start
                raise OutOfBounds(
                    f"out-of-bounds {what}: {int(outside.sum())} of {active.size} lanes leave {view.name}, the first "
                    f"at byte {first} of {view.end - view.start} {self.where}"
                )
        return pointers & ADDRESS_MASK

    @property
    def where(self) -> str:
        """The running program, for messages."""
        return f"in program {interpreter.interpreter_builder.grid_idx}"


STATE = State()


def set_program_order(seed: int) -> None:
    """Seed the order in which programs run from the next launch on; each launch draws another order."""
    STATE.seed, STATE.launches = seed, 0


def bf16_to_float32(bits: np.ndarray) -> np.ndarray:
    """Float32 values of bfloat16 bits (uint16)."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bf16(values: np.ndarray, toward_zero: bool = False) -> np.ndarray:
    """Bits (uint16) of the nearest bfloat16, ties to even, or of the next one toward zero; NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    if not toward_zero:
        bits = bits + (np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1)))
    return np.where(np.isnan(values), np.uint16(0x7FC0), (bits >> 16).astype(np.uint16))


def float32_to_tf32(values: np.ndarray) -> np.ndarray:
    """Float32 values as a tensor core reads them: the 13 low bits of the mantissa are ignored."""
    return (np.ascontiguousarray(values, dtype=np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)

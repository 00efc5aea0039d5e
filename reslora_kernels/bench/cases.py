"""What is timed: chains of linear layers as frozen values, in named sets, for a GPU and scaled down for a CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from reslora_kernels.config import Shortcut

DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Method:
    """A shortcut with its reach; "none" is plain LoRA."""

    shortcut: Shortcut
    pre_num: int = 0

    def __str__(self) -> str:
        if self.shortcut == "none":
            return "lora"
        if self.shortcut == "input":
            return "input"
        return f"{self.shortcut}-{'all' if self.pre_num == -1 else self.pre_num}"


LORA = Method("none")
METHODS = (LORA, Method("input", 1), Method("block", 1), Method("middle", 1))


@dataclass(frozen=True)
class Case:
    """A chain of ``layers`` frozen linears K -> N without bias, each with an adapter and M tokens of its own.

    Every layer has its own weight and its own input, as in a model: what one layer leaves in the cache serves no other.

    Args:
        dtype: of x and W: float32 (exact products), tf32 (float32 with TF32 products), bfloat16 or float16.
        p: dropout in the adapter.
        methods: what is trained; providers of plain LoRA serve "lora" alone.
        compiled: those of ``methods`` which the compiled provider times: compiling takes long.
        replay: captured once as CUDA graphs and replayed, so that launching from Python is not what is measured.
    """

    m: int
    k: int
    n: int
    r: int = 16
    dtype: str = "bfloat16"
    p: float = 0.0
    layers: int = 4
    methods: tuple[Method, ...] = METHODS
    compiled: tuple[Method, ...] = ()
    replay: bool = False

    def __str__(self) -> str:
        parts = [f"M={self.m}", f"{self.k}->{self.n}", f"r={self.r}", self.dtype]
        parts += [f"p={self.p:g}"] * (self.p > 0)
        parts += [f"layers={self.layers}"] * (self.layers != 4) + ["graph"] * self.replay
        return " ".join(parts)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def replace(self, **changes: Any) -> Case:
        """A copy with the given fields changed."""
        return dataclasses.replace(self, **changes)

    def covers(self, other: Case) -> bool:
        """Whether it times all that ``other`` would."""
        alike = self.replace(methods=(), compiled=()) == other.replace(methods=(), compiled=())
        return alike and set(self.methods) >= set(other.methods) and set(self.compiled) >= set(other.compiled)

    def input_bytes(self) -> int:
        """Bytes of all weights, inputs and gradients at outputs: what one pass reads from memory at least."""
        return self.layers * self.torch_dtype.itemsize * (self.n * self.k + self.m * self.k + self.m * self.n)

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Inside, float32 products are as ``dtype`` says."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.dtype == "tf32" else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def quick(gpu: bool) -> list[Case]:
    """A few minutes' worth at most, one case of each kind."""
    dtype, width, m = ("bfloat16", 2048, 4096) if gpu else ("float32", 512, 512)
    first = Case(m, width, width, 16, dtype, compiled=(Method("block", 1),))
    return [
        first,
        Case(16, width, width, 16, dtype, replay=gpu),
        Case(m, width, width, 16, dtype, p=0.1, methods=(LORA, Method("block", 1))),
        pre_num(gpu)[0].replace(m=m // 2, k=width // 2, n=width // 2),
    ]


def first(gpu: bool) -> list[Case]:
    """One small case of plain LoRA: whatever ends a run later, there is a figure."""
    return [Case(2048, 1024, 1024, methods=(LORA,)) if gpu else Case(64, 256, 256, dtype="float32", methods=(LORA,))]


def standard(gpu: bool) -> list[Case]:
    """The shapes of a 7 to 8 billion parameter decoder, every shortcut."""
    square, wide, narrow = _square(gpu), 14336 if gpu else 2048, 1024 if gpu else 256
    return [square, square.replace(n=wide), square.replace(k=wide), square.replace(n=narrow), square.replace(p=0.1)]


def _square(gpu: bool) -> Case:
    return Case(8192, 4096, 4096) if gpu else Case(512, 1024, 1024, dtype="float32")


def peers(gpu: bool) -> list[Case]:
    """Plain LoRA by everyone who has it, torch.compile too: without dropout, then with it, which LoRAFusion needs."""
    case = _square(gpu).replace(methods=(LORA,), compiled=(LORA,))
    return [case, case.replace(p=0.1)]


def compiled(gpu: bool) -> list[Case]:
    """The first of standard once more, with torch.compile, which takes long to start."""
    methods = (LORA, Method("block", 1))
    return [_square(gpu).replace(methods=methods, compiled=methods)]


def lorafusion_coarse(gpu: bool) -> list[Case]:
    """Of lorafusion the M that are powers of two, with and without dropout."""
    methods = (LORA, Method("block", 1))
    if not gpu:
        return [Case(m, 512, 512, dtype="float32", methods=methods) for m in (1024, 512, 256)]
    grid = [(m, k, p) for m in (8192, 2048, 4096) for k in (4096, 5120, 8192) for p in (0.0, 0.1)]
    return [Case(m, k, k, methods=methods, p=p) for m, k, p in grid]


def lorafusion(gpu: bool) -> list[Case]:
    """K = N in {4096, 5120, 8192}, M from 2048 to 8192 in steps of 256; powers of two first."""
    coarse = lorafusion_coarse(gpu)
    if not gpu:
        return coarse + [case.replace(k=1024, n=1024) for case in coarse]
    fine = [Case(m, k, k, methods=coarse[0].methods) for m in range(2304, 8192, 256) for k in (4096, 5120, 8192)]
    return coarse + [case for case in fine if case not in coarse]


def small_m(gpu: bool) -> list[Case]:
    """Generation and small batches, bound by launches: replayed graphs, then launched from Python."""
    if not gpu:
        return [Case(m, 1024, 1024, dtype="float32") for m in (1, 16, 128)]
    shapes = [(4096, 4096), (4096, 14336), (14336, 4096), (4096, 1024)]
    grid = [(m, k, n) for k, n in shapes for m in (1, 16, 128, 512)]
    replayed = [Case(m, k, n, replay=True) for m, k, n in grid]
    return replayed + [Case(m, 4096, 4096) for m in (1, 16, 128, 512)]


def ranks(gpu: bool) -> list[Case]:
    """r in {8, 16, 32, 64}."""
    if not gpu:
        return [Case(512, 1024, 1024, r, "float32") for r in (8, 16, 32, 64)]
    return [Case(m, 4096, 4096, r) for m in (8192, 2048) for r in (8, 16, 32, 64)]


def dtypes(gpu: bool) -> list[Case]:
    """bf16 first, then fp16 and float32, exact and with TF32."""
    if not gpu:
        return [Case(256, 512, 512, dtype=dtype) for dtype in ("bfloat16", "float32")]
    names = ("bfloat16", "float16", "tf32", "float32")
    return [Case(4096, 4096, 4096, dtype=dtype, methods=(LORA, Method("block", 1))) for dtype in names]


def pre_num(gpu: bool) -> list[Case]:
    """A chain of eight layers and how its time grows with the number of earlier blocks."""
    reaches = (1, 2, 4, -1)
    methods = (LORA, *(Method(shortcut, reach) for shortcut in ("block", "middle") for reach in reaches))
    if not gpu:
        return [Case(512, 512, 512, dtype="float32", layers=8, methods=methods)]
    return [Case(m, 4096, 4096, layers=8, methods=methods) for m in (8192, 2048)]


SETS: dict[str, Callable[[bool], list[Case]]] = {
    "quick": quick,
    "first": first,
    "standard": standard,
    "lorafusion-coarse": lorafusion_coarse,
    "lorafusion": lorafusion,
    "small-m": small_m,
    "ranks": ranks,
    "dtypes": dtypes,
    "pre-num": pre_num,
    "compiled": compiled,
    "peers": peers,
}

"""Triton kernels: one or two launches for the forward pass, three for the backward pass.

Importing this module does not import Triton; the kernels are loaded by the first call that they serve.
"""

from __future__ import annotations

import os
import threading
from contextlib import nullcontext
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import dropout as masks
from ..dropout import Dropout
from ..side_channel import Gradients, Needs, Outputs, SideChannel, Stack, columns, rows
from . import torch as library

if TYPE_CHECKING:
    from ..tuning.forms import FormChoice
    from ..tuning.gpus import Gpu
    from ..tuning.launch import Sum

MIN_TRITON = (3, 4)
MIN_CAPABILITY = (8, 0)
ONE_PASS_RANK = 64
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_thread = threading.local()  # ``bound``: the devices whose context it has


def describe() -> str:
    return f"Triton {version('triton')} kernels"


@cache
def unavailable_reason() -> str | None:
    try:
        installed = version("triton")
    except PackageNotFoundError:
        return "Triton is not installed (pip install triton, on Linux; CUDA builds of torch bring it along)"
    if tuple(int(part) for part in installed.split(".")[:2]) < MIN_TRITON:
        return f"Triton {installed} is too old, {'.'.join(map(str, MIN_TRITON))} is needed (torch 2.8 brings it along)"
    if _interpreted():
        return "TRITON_INTERPRET is set, and Triton's CPU interpreter is for tests of the kernels only"
    if not torch.cuda.is_available():
        return "no GPU that torch can use"
    capability = torch.cuda.get_device_capability()
    if torch.version.cuda and capability < MIN_CAPABILITY:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0 (Ampere)"
    return _compile_failure()


def _interpreted() -> bool:
    """Whether Triton runs its kernels in its CPU interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def _compile_failure() -> str | None:
    """Why a small kernel cannot be compiled and run, None when it can. The message is Triton's own."""
    from ..kernels import low_rank_grads
    from ..tuning.launch import Sum

    ones = torch.ones(1, 16, device="cuda")
    try:
        low_rank_grads.finish(Sum(ones, torch.empty_like(ones[0]), 1.0), None, processors=1).run()
    except Exception as error:  # whatever the compiler or the driver raises, the torch backend serves instead
        return f"Triton cannot compile kernels on this machine: {str(error).strip().splitlines()[-1]}"
    return None


def unsupported_reason(x: Tensor, weight: Tensor, rank: int) -> str | None:
    from ..tuning.tiles import MAX_RANK

    device = "cpu" if _interpreted() else "cuda"
    if x.device.type != device:
        return f"x must be on a {device} device, got {x.device}"
    if x.dtype not in DTYPES:
        return f"x must be float32, float16 or bfloat16, got {x.dtype}"
    if rank > MAX_RANK:
        return f"a_stack's total rank must be at most {MAX_RANK}, got {rank}"
    return None


def explain(x: Tensor, weight: Tensor, rank: int) -> str:
    """How a forward pass without dropout would be computed, and why."""
    return _forward_choice(x, weight, rank, None, 1.0).reason


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a_stack: Stack,
    b_stack: Stack,
    residual: Tensor | None,
    side: SideChannel,
    dropout: Dropout | None,
) -> Outputs:
    """See ``backends.torch.forward``; products are accumulated in float32 and rounded once, at the store."""
    from ..kernels.augmented_matmul import OnePass, augmented_matmul
    from ..kernels.project import project
    from ..tuning.gpus import gpu_of
    from ..tuning.tiles import project_tile

    a, b = rows(a_stack) if a_stack else weight[:0], columns(b_stack)
    gpu, (m, k), n, rank = gpu_of(x.device), x.shape, weight.shape[0], a.shape[0]
    choice = _forward_choice(x, weight, rank, dropout, side.scaling) if rank else _given_choice(x, weight, b.shape[1])
    u = x.new_empty(m, b.shape[1]) if rank else None
    handed = x.new_empty(m, side.hand_stop - side.hand_start) if side.hands_on else None
    with _device(x):
        t: Tensor | OnePass
        if u is None:
            assert residual is not None
            t = residual.to(x.dtype).contiguous()
        elif choice.form == "one_pass":
            t = OnePass(a, side.c, residual, u, handed, side.hand_start)
        else:
            t = u
            draw = _Draw.of(dropout)
            for launch in project(
                x, a, residual, draw.seed, u, handed, side.hand_start, c=side.c, threshold=draw.threshold,
                keep_scale=draw.scale, tile=project_tile(gpu, m, k, rank, x.dtype),
            ):  # fmt: skip
                launch.run()
        if choice.tile is None:
            assert isinstance(t, Tensor)
            y = library.product_then_matmul(t, b.T.to(x.dtype), side.scaling, bias, x, weight.T)
        else:
            y = x.new_empty(m, n)
            augmented_matmul(x, weight.T, bias, t, b.T, y, scale=side.scaling, gpu=gpu, tile=choice.tile).run()
        return Outputs(y, handed, u)


def backward(
    dy: Tensor,
    dhanded: Tensor | None,
    x: Tensor | None,
    weight: Tensor,
    a_stack: Stack,
    b_stack: Stack,
    u: Tensor | None,
    side: SideChannel,
    dropout: Dropout | None,
    needs: Needs,
) -> Gradients:
    """See ``backends.torch.backward``."""
    if not a_stack:  # nothing to fuse with the frozen matmul
        return library.backward(dy, dhanded, x, weight, a_stack, b_stack, u, side, dropout, needs)
    a, b = rows(a_stack), columns(b_stack)
    (m, n), k, (rank, rank_b) = dy.shape, weight.shape[1], (a.shape[0], b.shape[1])
    from ..kernels.augmented_matmul import augmented_matmul
    from ..kernels.low_rank_grads import finish
    from ..tuning.forms import choose, reads_dy_once
    from ..tuning.gpus import gpu_of
    from ..tuning.launch import precision

    gpu = gpu_of(dy.device)
    wanted = _Wanted(
        da=torch.empty_like(a, memory_format=torch.contiguous_format) if needs.da else None,
        db=torch.empty_like(b, memory_format=torch.contiguous_format) if needs.db else None,
        dh=dy.new_empty(m, rank) if needs.dx or needs.da else None,
        dresidual=dy.new_empty(m, rank_b) if needs.dresidual else None,
        bits=dy.new_empty(m, -(-k // 32), dtype=torch.int32) if needs.dx and dropout is not None else None,
    )
    draw = _Draw.of(dropout if needs.dx or needs.da else None)
    x = dy.new_empty(0) if x is None else x
    u = dy.new_empty(0) if u is None else u
    dx = None
    with _device(dy):
        gradients = (
            _two_reads if wanted.can_split() and not reads_dy_once(gpu, m, n, k, rank, rank_b, dy.dtype) else _one_read
        )
        left = gradients(gpu, wanted, dy, dhanded, x, k, b, u, draw, side)
        if needs.dx and wanted.dh is not None:
            forms = ("two_pass", "library") if wanted.bits is None else ("two_pass",)
            choice = choose(gpu, m, k, n, rank, dy.dtype, precision(dy.dtype), forms, _aligned(dy, weight))
            if choice.tile is None:
                dx = library.product_then_matmul(wanted.dh, a.to(dy.dtype), 1.0, None, dy, weight)
            else:
                dx = dy.new_empty(m, k)
                augmented_matmul(
                    dy, weight, None, wanted.dh, a, dx, scale=draw.scale, gpu=gpu, tile=choice.tile,
                    bits=wanted.bits, sums=left,
                ).run()  # fmt: skip
                left = (None, None)
        if any(left):
            finish(*left, processors=gpu.processors).run()
    return Gradients(dx, wanted.da, wanted.db, wanted.dresidual)


class _Wanted(NamedTuple):
    """What the passes over dy and x fill; None what is not needed."""

    da: Tensor | None
    db: Tensor | None
    dh: Tensor | None
    dresidual: Tensor | None
    bits: Tensor | None

    def can_split(self) -> bool:
        """Whether dh can be had before the outer products: they leave the keep bits only where they read x."""
        return self.dh is not None and not (self.da is None and (self.db is None or self.bits is not None))

    def mask_bytes(self) -> Tensor | None:
        return None if self.bits is None else self.bits.view(torch.uint8)


class _Draw(NamedTuple):
    """Dropout as the kernels take it."""

    seed: Tensor | None
    threshold: int
    scale: float

    @classmethod
    def of(cls, dropout: Dropout | None) -> _Draw:
        if dropout is None:
            return cls(None, 0, 1.0)
        return cls(dropout.seed, masks.threshold(dropout.p), dropout.keep_scale)


def _one_read(
    gpu: Gpu,
    wanted: _Wanted,
    dy: Tensor,
    dhanded: Tensor | None,
    x: Tensor,
    k: int,
    b_cat: Tensor,
    u: Tensor,
    draw: _Draw,
    side: SideChannel,
) -> tuple[Sum | None, Sum | None]:
    """du and dB from one pass over dy, dh and dA from one over x; returns what is left to add up for dA and dB."""
    from ..kernels.low_rank_grads import pass_over_dy, pass_over_x
    from ..tuning.tiles import grads_tile

    da_left = db_left = du = None
    m, n = dy.shape
    need_du = wanted.dh is not None or wanted.dresidual is not None
    if need_du or wanted.db is not None:
        launch, du, db_left = pass_over_dy(
            dy, b_cat, None if wanted.db is None else u, wanted.db, scaling=side.scaling, need_du=need_du,
            tile=grads_tile(gpu, m, n, b_cat.shape[1], dy.dtype, _aligned(dy)),
        )  # fmt: skip
        launch.run()
    if du is not None:
        rank = b_cat.shape[1] if wanted.dh is None else wanted.dh.shape[1]
        launch, da_left = pass_over_x(
            x, draw.seed, du, dhanded, wanted.dh, wanted.dresidual, wanted.da, wanted.mask_bytes(),
            shape=(m, k), rank=rank, hand_start=side.hand_start, c=side.c, scaling=side.scaling,
            threshold=draw.threshold, keep_scale=draw.scale,
            tile=grads_tile(gpu, m, k, rank, dy.dtype, wanted.da is None or _aligned(x)),
        )  # fmt: skip
        launch.run()
    return da_left, db_left


def _two_reads(
    gpu: Gpu,
    wanted: _Wanted,
    dy: Tensor,
    dhanded: Tensor | None,
    x: Tensor,
    k: int,
    b_cat: Tensor,
    u: Tensor,
    draw: _Draw,
    side: SideChannel,
) -> tuple[Sum | None, Sum | None]:
    """dh from one pass over dy, then dA and dB from one over x and another over dy; returns as ``_one_read``."""
    from ..kernels.outer_products import outer_products
    from ..kernels.project import project
    from ..tuning.tiles import outer_tile, project_tile

    assert wanted.dh is not None
    m, n = dy.shape
    rank = wanted.dh.shape[1]
    for launch in project(
        dy, b_cat.T, dhanded, None, wanted.dh, wanted.dresidual, 0, threshold=0, keep_scale=side.scaling,
        c=side.c, residual_start=side.hand_start, tile=project_tile(gpu, m, n, rank, dy.dtype),
    ):  # fmt: skip
        launch.run()
    streams = [stream for stream, out in ((x, wanted.da), (dy, wanted.db)) if out is not None]
    launch, da_left, db_left = outer_products(
        x, wanted.dh, wanted.da, draw.seed, wanted.mask_bytes(), dy, u, wanted.db, threshold=draw.threshold,
        keep_scale=draw.scale, scaling=side.scaling, tile=outer_tile(gpu, m, n + k, rank, dy.dtype, _aligned(*streams)),
    )  # fmt: skip
    launch.run()
    return da_left, db_left


def _forward_choice(x: Tensor, weight: Tensor, rank: int, dropout: Dropout | None, scaling: float) -> FormChoice:
    from ..tuning.forms import choose
    from ..tuning.gpus import gpu_of
    from ..tuning.launch import precision

    (m, k), n, products = x.shape, weight.shape[0], precision(x.dtype)
    one_pass = dropout is None and rank <= ONE_PASS_RANK
    if x.dtype == torch.float16 and abs(scaling) > 1:
        one_pass = False  # it rounds s u to x's dtype before its product, which float16 may not hold
    if x.dtype == torch.float32 and products == "ieee":
        one_pass = False  # no matrix unit for two products at once
    forms = ("one_pass", "two_pass", "library") if one_pass else ("two_pass", "library")
    return choose(gpu_of(x.device), m, n, k, rank, x.dtype, products, forms, _aligned(x, weight))


def _given_choice(x: Tensor, weight: Tensor, rank: int) -> FormChoice:
    """As ``_forward_choice``, for u that is known."""
    from ..tuning.forms import choose
    from ..tuning.gpus import gpu_of
    from ..tuning.launch import precision

    (m, k), n, forms = x.shape, weight.shape[0], ("two_pass", "library")
    return choose(gpu_of(x.device), m, n, k, rank, x.dtype, precision(x.dtype), forms, _aligned(x, weight))


def _aligned(*operands: Tensor) -> bool:
    """Whether 16 bytes at a time can be loaded from every operand, along its rows or its columns."""
    from ..tuning.launch import fits_tma

    return all(fits_tma(operand) or fits_tma(operand.T) for operand in operands)


def _device(tensor: Tensor) -> Any:
    """Kernels run on the tensor's GPU, whichever is current, in a thread that has a context."""
    if not tensor.is_cuda:
        return nullcontext()
    if tensor.device not in getattr(_thread, "bound", ()):
        _bind(tensor.device)
    return torch.cuda.device(tensor.device)


def _bind(device: torch.device) -> None:
    """Give this thread the device's context, which the driver needs to encode tensor maps.

    A thread that autograd has started has none before its first call of the CUDA runtime; an event is such a call.
    """
    with torch.cuda.device(device):
        torch.cuda.current_stream(device).record_event()
    _thread.bound = {*getattr(_thread, "bound", ()), device}

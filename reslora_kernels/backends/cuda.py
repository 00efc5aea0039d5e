"""CUDA C++ kernels of csrc/: one or two launches for the forward pass, two or three for the backward pass.

For machines with an NVIDIA GPU and without Triton. The extension takes addresses; every check is made here, before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..dropout import Dropout
from ..side_channel import Gradients, Needs, Outputs, SideChannel, Stack, columns, rows
from ..tuning.launch import Sum, collected, precision, workspace
from . import hopper, kinds, native
from . import torch as library

MIN_CAPABILITY = (8, 0)
LARGE_TILE = 128  # rows and columns of y in a block, where that leaves no processor without one
SMALL_TILE = 64
ONE_PASS_RANK = 32  # of the portable kernel, which makes one pass of what is narrow only
ROWS_PER_BLOCK, COLUMNS_PER_BLOCK = 64, 128  # of x in project, of a stream in low_rank_grads
_FORWARD_FORMS = (hopper.ONE_PASS, hopper.FORWARD)
_BACKWARD_FORMS = (hopper.DX_AND_DH, hopper.DX, hopper.DX_MASKED)
_kinds = kinds.Kinds()


def describe() -> str:
    from .._build_info import CUDA_ARCHS, NVCC

    return f"CUDA C++ kernels for {', '.join(CUDA_ARCHS)}, built by nvcc {NVCC}"


@cache
def unavailable_reason() -> str | None:
    try:
        extension = native.load()
    except ImportError as error:
        return f"the CUDA extension cannot be loaded: {error}; build it anew: pip install --no-cache-dir ."
    if extension is None:
        return f"this build has no CUDA extension ({native.why_not_built()})"
    if not torch.cuda.is_available():
        return "no GPU that torch can use"
    if not torch.version.cuda:
        return "torch is built for another kind of GPU than NVIDIA's"
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0 (Ampere)"
    return native.launch_failure()


def unsupported_reason(x: Tensor, weight: Tensor, rank: int) -> str | None:
    return kinds.unsupported_reason(x, rank, "cpu" if getattr(native.load(), "EMULATED", False) else "cuda")


def explain(x: Tensor, weight: Tensor, rank: int) -> str:
    """How a forward pass without dropout would be computed, and why."""
    n, extension = weight.shape[0], native.load()
    unsupported = hopper.unsupported_reason(extension, x, weight.T, columns=n)
    passes = _passes(x, n, rank, hopper.ONE_PASS, 1.0)
    if passes.kernel in hopper.ONE_PASS_VARIANTS and (unsupported or weight.stride(1) != 1):
        passes = _portable_passes(n, rank, hopper.ONE_PASS, unsupported or "the weight lies by columns")
    one_pass = passes.kernel != hopper.TWO_PASSES
    choice = passes if one_pass else hopper.matmul(extension, x, hopper.form_of(weight.T, None, False), n, rank)
    matmul = _kernel(choice, unsupported)
    tile = LARGE_TILE if _large(x, n) else SMALL_TILE
    if unsupported or choice.kernel is None:
        parts = 1 if one_pass else _matmul_split(x, n)[1]
        matmul += f", in tiles of {tile} x {tile}" + (f" and K in {parts} parts" if parts > 1 else "")
    if one_pass:
        return f"one pass: both products from one read of x, {matmul}"
    projection = _kernel(
        hopper.projection(extension, x, hopper.H, rank), hopper.unsupported_reason(extension, x, columns=0)
    )
    return (
        f"two passes ({passes.reason}): h first, {projection}; then the matmul on top of the low-rank product, {matmul}"
    )


def _kernel(choice: hopper.KernelChoice, unsupported: str | None) -> str:
    """Which kernel serves, and why."""
    if choice.kernel is None or unsupported:
        return f"by the portable kernel, not by a Hopper one: {choice.reason if choice.kernel is None else unsupported}"
    return f"by the {choice.kernel} Hopper kernel: {choice.reason}"


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
    a, b, setting = rows(a_stack) if a_stack else None, columns(b_stack), hopper.setting()
    residual = None if residual is None else residual.to(x.dtype)
    bias = bias if bias is None or bias.is_contiguous() else bias.contiguous()
    if a is None and residual is not None:
        residual = residual.contiguous()
    if a is not None:
        a, b = _as_copied(setting, x, weight.shape[0], a, b, _FORWARD_FORMS, hopper.H)
    operands = (x, weight, bias, a, b, residual, None if dropout is None else dropout.seed)
    p = None if dropout is None else dropout.p
    kind, addresses = kinds.kind_of(operands, "forward", side, p, precision(x.dtype), setting)
    with kinds.on_device(x):
        prepared = _kinds.find(kind)
        y, handed, u = (
            _run_first(kind, operands, lambda: _forward(x, weight, bias, a, b, residual, side, dropout))
            if prepared is None
            else prepared.run(x, addresses)
        )
    assert y is not None
    return Outputs(y, handed, u)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor,
    residual: Tensor | None,
    side: SideChannel,
    dropout: Dropout | None,
) -> list[Tensor | None]:
    """y, what is handed on, and u."""
    y, scaling = x.new_empty(x.shape[0], weight.shape[0]), side.scaling
    bias_address = 0 if bias is None else bias.data_ptr()
    if a is None:
        assert residual is not None
        _augmented_matmul(x, weight.T, residual, b.T, y, scaling, bias=bias_address)
        return [y, None, None]
    u = x.new_empty(x.shape[0], b.shape[1])
    handed = x.new_empty(x.shape[0], side.hand_stop - side.hand_start) if side.hands_on else None
    keep_scale = 1.0 if dropout is None else dropout.keep_scale
    channel = native.side_channel(residual, 0, u, handed, side.hand_start, side.c * keep_scale, keep_scale)
    if dropout is None and (stacks := _in_one_pass(x, weight.T, a, b.T, hopper.ONE_PASS, scaling)):
        _augmented_matmul(x, weight.T, None, stacks[1], y, scaling, a=stacks[0], side=channel, bias=bias_address)
    else:
        _project(x, a, channel, u.shape[1], dropout)
        _augmented_matmul(x, weight.T, u, b.T, y, scaling, bias=bias_address)
    return [y, handed, u]


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
    onto: Tensor | None = None,
) -> Gradients:
    """See ``backends.torch.backward``. The kernels add to nothing: with ``onto`` the library makes dx."""
    if not a_stack:  # nothing to fuse with the frozen matmul
        return library.backward(dy, dhanded, x, weight, a_stack, b_stack, u, side, dropout, needs, onto)
    a, b, setting = rows(a_stack), columns(b_stack), hopper.setting()
    dhanded = None if dhanded is None else dhanded.to(dy.dtype)
    x, u = x if needs.da else None, u if needs.db else None
    types = (a.dtype, b.dtype)  # of their gradients
    dropout = dropout if needs.dx or needs.da else None
    forms = _BACKWARD_FORMS if needs.dx and onto is None and dropout is None else _BACKWARD_FORMS[1:]
    a, b = _as_copied(setting, dy, weight.shape[1], a, b, forms, hopper.DH)
    operands = (dy, dhanded, x, weight, a, b, u, None if dropout is None else dropout.seed)
    p = None if dropout is None else dropout.p
    alone = onto is None
    kind, addresses = kinds.kind_of(operands, "backward", side, p, needs, types, alone, precision(dy.dtype), setting)
    with kinds.on_device(dy):
        prepared = _kinds.find(kind)
        dx, da, db, dresidual, dh = (
            _run_first(
                kind, operands, lambda: _backward(dy, dhanded, x, weight, a, b, u, side, dropout, needs, types, alone)
            )
            if prepared is None
            else prepared.run(dy, addresses)
        )
        if onto is not None and needs.dx:
            assert dh is not None
            dx = library.product_then_matmul(dh, a.to(dy.dtype), 1.0, None, dy, weight, onto)
        return Gradients(dx, da, db, dresidual)


def _backward(
    dy: Tensor,
    dhanded: Tensor | None,
    x: Tensor | None,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    u: Tensor | None,
    side: SideChannel,
    dropout: Dropout | None,
    needs: Needs,
    types: tuple[torch.dtype, torch.dtype],
    alone: bool,
) -> list[Tensor | None]:
    """dx, da, db, dresidual, and dh in place of dx where that is not ``alone`` but added to something."""
    m, k, rank = dy.shape[0], weight.shape[1], a.shape[0]
    dx = dy.new_empty(m, k) if needs.dx and alone else None
    da = a.new_empty(a.shape, dtype=types[0]) if needs.da else None
    db = b.new_empty(b.shape, dtype=types[1]) if needs.db else None
    dh = None
    if needs.dx or needs.da:
        dh = workspace(dy, m, rank) if alone else dy.new_empty(m, rank)
    dresidual = dy.new_empty(m, b.shape[1]) if needs.dresidual else None
    bits = workspace(dy, m, -(-k // 32), dtype=torch.int32) if needs.dx and dropout is not None else None
    keep_scale = 1.0 if dropout is None else dropout.keep_scale
    channel = native.side_channel(dhanded, side.hand_start, dh, dresidual, 0, side.c * side.scaling, side.scaling)
    stacks = _in_one_pass(dy, weight, b.T, a, hopper.DX_AND_DH, 1.0) if dx is not None and dropout is None else None
    strips: dict[str, Any] = {}
    if dx is not None and stacks:
        strips = _strips(dy, x, da, u, db, k, side.scaling)
        _augmented_matmul(dy, weight, None, stacks[1], dx, 1.0, a=stacks[0], side=channel, **strips)
    elif dh is not None or dresidual is not None:
        _project(dy, b.T, channel, 0 if dh is None else rank, None)
    rest_a, rest_b = None if "of_made" in strips else da, None if "of_inputs" in strips else db
    left = _outer_products(dh, x, rest_a, u, dy, rest_b, dropout, bits, k, side.scaling)
    sums = [None if entry is None else native.sum_of(entry) for entry in left]
    if dx is not None and not stacks:
        assert dh is not None
        keep, words = (0, 0) if bits is None else (bits.data_ptr(), bits.shape[1])
        _augmented_matmul(dy, weight, dh, a, dx, keep_scale, keep=keep, keep_words=words, first=sums[0], second=sums[1])
    elif any(sums):
        native.load().finish(native.device_of(dy), *sums)
    return [dx, da, db, dresidual, None if alone else dh]


def _as_copied(
    setting: str, x: Tensor, n: int, a: Tensor, b: Tensor, forms: tuple[str, ...], projected: str
) -> tuple[Tensor, Tensor]:
    """a and b as a kernel takes them that makes ``n`` columns of y: a Hopper kernel copies them, the others convert."""
    rank = max(a.shape[0], b.shape[1])
    copied, together = hopper.copies(
        setting, native.load(), x.device, x.dtype, x.shape, n, rank, forms, projected
    )  # fmt: skip
    if copied:
        a, b = a.to(x.dtype), b.to(x.dtype)
    if together:
        b = b.T.contiguous().T
    return a, b


def _run_first(
    kind: tuple[object, ...], operands: kinds.Operands, run: Callable[[], list[Tensor | None]]
) -> list[Tensor | None]:
    """What ``run`` returns; of a new kind, its launches are kept."""
    if not _kinds.is_new(kind):
        return run()
    extension = native.load()
    made = extension.Pass()
    made.begin()
    try:
        with collected() as allocated:
            results = run()
    finally:
        made.end()
    x = operands[0]
    assert x is not None
    processors, stream_of = native.processors(x), native.stream_of(x.device)

    def launching(place: dict[int, int]) -> Callable[[list[int]], None] | None:
        addresses = [0] * (len(operands) + len(results) + len(allocated.workspaces))
        for address, at in place.items():
            addresses[at] = address
        if not made.settle(addresses):
            return None
        return lambda addresses: made.run(stream_of(), processors, addresses)

    _kinds.keep(kind, kinds.prepare(operands, tuple(results), allocated.workspaces, launching))
    return results


def _augmented_matmul(
    x: Tensor, w: Tensor, t: Tensor | None, b: Tensor, y: Tensor, scale: float, a: Tensor | None = None, **options: Any
) -> None:
    """y [M, N] = x w + scale t b and what ``options`` add: see csrc/params.h. Either t or ``a`` is given."""
    form = hopper.form_of(w, a, bool(options.get("keep")))
    kernel, _ = hopper.matmul(native.load(), x, form, y.shape[1], b.shape[0] if a is None else max(len(a), len(b)))
    given = {"t": t, "a": a}
    matrices = {"x": x, "w": w, "b": b} | {name: matrix for name, matrix in given.items() if matrix is not None}
    if kernel in hopper.NUMBERS and hopper.in_order(w, b, t, a):
        converted = {name: matrix.to(x.dtype) for name, matrix in matrices.items()}  # not by the copy engine on the way
        if hopper.unsupported_reason(native.load(), *converted.values(), columns=y.shape[1]) is None:
            options["hopper"], matrices = hopper.NUMBERS[kernel], converted
            if a is not None:
                width = next(width for width in hopper.ONE_PASS_WIDTHS if width >= max(len(a), len(b)))
                scaled = workspace(y, x.shape[0], width)
                options["scaled"] = scaled.data_ptr()
    split, parts = _matmul_split(x, y.shape[1]) if a is None and "hopper" not in options else (0, 1)
    if parts > 1:
        partial = workspace(y, parts, *y.shape, dtype=torch.float32)
        options |= {"partial": partial.data_ptr(), "split": split, "parts": parts}
    native.load().augmented_matmul(
        native.math_of(x.dtype), native.device_of(x), _large(x, y.shape[1]), scale=scale, y=native.output(y),
        **{name: native.matrix(matrix) for name, matrix in matrices.items()}, **options,
    )  # fmt: skip


def _matmul_split(x: Tensor, n: int) -> tuple[int, int]:
    """How much of K each part of y [M, N] takes, and how many there are: its tiles may leave processors without any."""
    tiles = -(-x.shape[0] // SMALL_TILE) * -(-n // SMALL_TILE)
    return _split(x.shape[1], native.processors(x) // max(1, tiles), 512)


def _project(x: Tensor, a: Tensor, side: Any, inner_columns: int, dropout: Dropout | None) -> None:
    """x aᵀ through the side channel; few rows: K in parts, so that the processors have something to do."""
    (m, k), rank = x.shape, a.shape[0]
    width, streamed = max(rank, inner_columns), False
    form = hopper.H if a.stride(1) == 1 else hopper.DH
    if dropout is None and hopper.projection(native.load(), x, form, width).kernel is not None:
        converted = a.to(x.dtype)  # which the copy engine cannot do on the way
        streamed = hopper.unsupported_reason(native.load(), x, converted, columns=0) is None
        a = converted if streamed else a
    wanted = native.processors(x) // max(1, -(-m // ROWS_PER_BLOCK) * (1 if streamed else -(-width // ROWS_PER_BLOCK)))
    split, parts = _split(k, wanted, 256)
    partial = workspace(x, parts, m, rank, dtype=torch.float32) if parts > 1 else None
    native.load().project(
        native.math_of(x.dtype), native.device_of(x), x=native.matrix(x), a=native.matrix(a), side=side,
        **native.drawn(dropout), partial=0 if partial is None else partial.data_ptr(), split=split, parts=parts,
        hopper=streamed,
    )  # fmt: skip


def _strips(
    dy: Tensor, x: Tensor | None, da: Tensor | None, u: Tensor | None, db: Tensor | None, k: int, scaling: float
) -> dict[str, Any]:
    """What has the launch that makes dx make "of_inputs", dB [N, R_b], and "of_made", dA [R_a, K]; nothing: neither."""
    (m, n), extension = dy.shape, native.load()
    of_b = db is not None and u is not None and hopper.unsupported_reason(extension, dy, u, columns=k) is None
    of_a = da is not None and x is not None and hopper.unsupported_reason(extension, dy, x, columns=k) is None
    # dy is in the cache for dx; x comes from memory, which takes a quarter longer.
    widths = ({"of_inputs": n} if of_b else {}) | ({"of_made": k * 5 // 4} if of_a else {})
    free, names = hopper.strips(native.processors(dy), m, n, k, widths)
    made: dict[str, Any] = {"strip_blocks": free} if names else {}
    if "of_inputs" in names and u is not None and db is not None:
        made["of_inputs"] = extension.Strips(
            stream=native.matrix(dy), t=native.matrix(u), out=native.output(db), column=db.shape[1], rank=1,
            scale=scaling,
        )  # fmt: skip
    if "of_made" in names and x is not None and da is not None:
        made["of_made"] = extension.Strips(
            stream=native.matrix(x), t=None, out=native.output(da), column=1, rank=k, scale=1.0
        )  # fmt: skip
    return made


def _outer_products(
    dh: Tensor | None,
    x: Tensor | None,
    da: Tensor | None,
    u: Tensor | None,
    dy: Tensor,
    db: Tensor | None,
    dropout: Dropout | None,
    bits: Tensor | None,
    k: int,
    scaling: float,
) -> tuple[Sum | None, Sum | None]:
    """The launch for dA [R_a, K] and dB [N, R_b] in parts, and for the keep bits of x; returns what is left to add."""
    if da is None and db is None and bits is None:
        return None, None
    (m, n), of_a, of_b, first, second = dy.shape, None, None, None, None
    columns = (0 if da is None and bits is None else k) + (0 if db is None else n)
    split, parts = _split(m, 2 * native.processors(dy) // max(1, columns // COLUMNS_PER_BLOCK), 512)
    if da is not None or bits is not None:
        matrices: dict[str, Any] = {"t": None, "stream": None, "partial": 0, "rank": 1}
        if da is not None and dh is not None and x is not None:
            keep_scale = 1.0 if dropout is None else dropout.keep_scale
            first = Sum(workspace(da, parts, *da.shape, dtype=torch.float32), da, keep_scale)
            matrices = {
                "t": native.matrix(dh), "stream": native.matrix(x), "rank": da.shape[0],
                "partial": first.partial.data_ptr(),
            }  # fmt: skip
        of_a = native.load().OuterProduct(
            **matrices, rows=m, columns=k, row=k, column=1, **native.drawn(dropout),
            keep=0 if bits is None else bits.data_ptr(), keep_bytes=0 if bits is None else 4 * bits.shape[1],
        )  # fmt: skip
    if db is not None:
        assert u is not None
        second = Sum(workspace(db, parts, *db.shape, dtype=torch.float32), db, scaling)
        of_b = native.load().OuterProduct(
            t=native.matrix(u), stream=native.matrix(dy), rank=db.shape[1], rows=m, columns=n,
            partial=second.partial.data_ptr(), row=1, column=db.shape[1],
        )  # fmt: skip
    native.load().low_rank_grads(
        native.math_of(dy.dtype), native.device_of(dy), da=of_a, db=of_b, split=split, parts=parts
    )
    return first, second


def _split(size: int, wanted: int, least: int) -> tuple[int, int]:
    """(length of a part, number of parts) for about ``wanted`` parts of ``least`` or more, a multiple of 64 each."""
    parts = max(1, min(wanted, size // least))
    length = -(-size // (64 * parts)) * 64
    return length, -(-size // length)


def _in_one_pass(x: Tensor, w: Tensor, a: Tensor, b: Tensor, form: str, scaling: float) -> tuple[Tensor, Tensor] | None:
    """a and b as one launch for y = x w + scaling t b, t of x aᵀ, takes them; None where it takes two."""
    n, rank = w.shape[1], max(len(a), len(b))
    passes = _passes(x, n, rank, form, scaling)
    if passes.kernel in hopper.ONE_PASS_VARIANTS:
        converted = (a.to(x.dtype).contiguous(), b.to(x.dtype))
        unsupported = hopper.unsupported_reason(native.load(), x, w, *converted, columns=n)
        if unsupported is None and hopper.in_order(w, b, None, converted[0]):
            return converted
        passes = _portable_passes(n, rank, form, unsupported or "the matrices lie in different orders")
    return (a, b) if passes.kernel is None else None


def _passes(x: Tensor, n: int, rank: int, form: str, scaling: float) -> hopper.KernelChoice:
    """The kernel of one pass, None for the portable one, or TWO_PASSES, and why; wherever the operands lie."""
    if x.dtype == torch.float32:
        return hopper.KernelChoice(hopper.TWO_PASSES, "one pass multiplies float16 or bfloat16")
    if x.dtype == torch.float16 and abs(scaling) > 1:  # one pass rounds s u to x's dtype before its product
        return hopper.KernelChoice(hopper.TWO_PASSES, f"float16 may not hold u times {scaling}")
    choice = hopper.matmul(native.load(), x, form, n, rank)
    return _portable_passes(n, rank, form, choice.reason) if choice.kernel is None else choice


def _portable_passes(n: int, rank: int, form: str, reason: str) -> hopper.KernelChoice:
    """One pass by the portable kernel where y is so narrow that it pays; no Hopper kernel makes it for ``reason``."""
    if form == hopper.ONE_PASS and rank <= ONE_PASS_RANK and n <= hopper.NARROW:
        return hopper.KernelChoice(None, reason)
    return hopper.KernelChoice(hopper.TWO_PASSES, f"one by no Hopper kernel: {reason}")


def _large(x: Tensor, n: int) -> bool:
    return -(-x.shape[0] // LARGE_TILE) * -(-n // LARGE_TILE) >= native.processors(x)

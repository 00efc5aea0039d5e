"""Triton's CPU interpreter made trustworthy: what passes here computes on a GPU what it computes here.

The interpreter that ships with Triton (3.4 to 3.9) multiplies the raw bits of bfloat16, reads whatever lies behind an
address, wraps int32 silently and runs programs in ascending order. ``install`` replaces those parts, and restores them
with ``uninstall``. After it, inside any kernel and any jit function called from it:

- bfloat16 arithmetic, casts and constants are right, casts round to nearest even; a dot accumulates in float32;
  float32 operands of a dot lose what the tensor core ignores when ``input_precision`` is "tf32", nothing when "ieee".
- A load or store outside the tensor it was derived from raises: each pointer carries the number of its argument in its
  upper bits, and only bytes that the passed view reaches are legal (not the gap between the rows of a slice). The lanes
  of a descriptor that lie outside its shape read zero and write nothing, as in hardware.
- int32 overflow in +, - and * raises; unsigned integers wrap; a loop variable is an integer tensor, as when compiled.
- Programs run in a random order, which ``set_program_order`` seeds, so that a result that depends on it changes.

What no interpreter shows (shared memory, races inside a program, sizes the compiler rejects) is the business of
``benchmarks.compile_contract``. Import this module only after TRITON_INTERPRET=1 is set: it imports Triton.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import min_dot_size
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder as Builder
from triton.runtime.interpreter import TensorHandle as Handle

from .memory import STATE, OutOfBounds, bf16_to_float32, float32_to_bf16, float32_to_tf32, set_program_order

__all__ = ["STATE", "IntegerOverflow", "OutOfBounds", "install", "set_program_order", "uninstall"]

INPUT_PRECISION = interpreter._ir.INPUT_PRECISION
ROUND_TO_ZERO = interpreter._ir.ROUNDING_MODE.RTZ
FLOAT8_BITS = 8
NUMPY_DTYPES: dict[str, np.dtype] = {}
BLOCK_TYPES: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
SHAPES: dict[tuple[int, ...], tuple[Any, Any]] = {}


class IntegerOverflow(OverflowError):
    """A signed integer result that does not fit its type."""


# The patches: each takes what it replaces (None where this Triton has no such thing) and then the arguments.

Patch = Callable[..., Any]
PATCHES: list[tuple[Any, str, Patch]] = []
LANGUAGE_SCOPES: list[Any] = []  # Triton's own patches to its language module, once a kernel ran


def _replaces(owner: Any, *names: str) -> Callable[[Patch], Patch]:
    def remember(patch: Patch) -> Patch:
        PATCHES.extend((owner, name, patch) for name in names)
        return patch

    return remember


def _is_bf16(handle: Handle) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def _is_float8(dtype: tl.dtype) -> bool:
    return bool(dtype.is_floating() and dtype.primitive_bitwidth == FLOAT8_BITS)


def _values(handle: Handle) -> np.ndarray:
    """What the bits stand for: float32 for bfloat16, the data itself for all else."""
    return bf16_to_float32(handle.data) if _is_bf16(handle) else handle.data


def _bf16(values: np.ndarray) -> Handle:
    """Handle of bfloat16 rounded from float32 values, or of truth values as they are."""
    return Handle(values, tl.int1) if values.dtype == np.bool_ else Handle(float32_to_bf16(values), tl.bfloat16)


def _width(pointers: Handle) -> int:
    return max(1, pointers.get_element_ty().primitive_bitwidth // 8)


# bfloat16 is stored as uint16, and numpy would compute with those bits.


@_replaces(Builder, "cast_impl")
def _cast(original: Patch, self: Builder, source: Handle, to: tl.dtype) -> Handle:
    if _is_float8(source.dtype.scalar) or _is_float8(to.scalar):
        return original(self, source, to)
    if to.scalar == tl.bfloat16:
        return source if _is_bf16(source) else _bf16(source.data.astype(np.float32))
    if _is_bf16(source):
        source = Handle(_values(source), tl.float32)
    return Handle(source.data.astype(interpreter._get_np_dtype(to)), to.scalar)


@_replaces(Builder, "create_fp_to_fp")
def _cast_with_rounding(original: Patch, self: Builder, source: Handle, to: tl.dtype, rounding: Any) -> Handle:
    """Triton's own rounds half up, carries wrongly, and knows no bfloat16."""
    if rounding == ROUND_TO_ZERO and to.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32:
        return Handle(float32_to_bf16(source.data, toward_zero=True), tl.bfloat16)
    if rounding == ROUND_TO_ZERO or _is_float8(source.dtype.scalar) or _is_float8(to.scalar):
        return original(self, source, to, rounding)
    return self.cast_impl(source, to)


@_replaces(Builder, "get_bf16")
def _bf16_constant(original: Patch | None, self: Builder, value: float) -> Handle:
    """Missing before Triton 3.9."""
    return _bf16(np.array([value], dtype=np.float32))


@_replaces(Builder, "binary_op")
def _binary(original: Patch, self: Builder, left: Handle, right: Handle, op: Patch) -> Handle:
    if _is_bf16(left) and _is_bf16(right):
        return _bf16(op(_values(left), _values(right)))
    return original(self, left, right, op)


@_replaces(Builder, "unary_op")
def _unary(original: Patch, self: Builder, value: Handle, op: Patch) -> Handle:
    return _bf16(op(_values(value))) if _is_bf16(value) else original(self, value, op)


@_replaces(Builder, "create_fma")
def _fma(original: Patch, self: Builder, x: Handle, y: Handle, z: Handle) -> Handle:
    """In float64 the product of two bfloat16 is exact, and so is nearly every sum."""
    if not _is_bf16(z):
        return original(self, x, y, z)
    return _bf16(_values(x).astype(np.float64) * _values(y) + _values(z))


@_replaces(Builder, "create_clampf")
def _clamp(original: Patch, self: Builder, value: Handle, low: Handle, high: Handle, propagate_nan: Any) -> Handle:
    """NaN becomes the lower limit unless it was asked to go through (before 3.9 it always went through)."""
    largest, smallest = (np.maximum, np.minimum) if "ALL" in str(propagate_nan) else (np.fmax, np.fmin)
    return self.binary_op(self.binary_op(value, low, largest), high, smallest)


@_replaces(Builder, "create_minnumf")
def _minimum(original: Patch, self: Builder, left: Handle, right: Handle) -> Handle:
    """Hardware returns the number where the other operand is NaN (before 3.9 NaN won)."""
    return self.binary_op(left, right, np.fmin)


@_replaces(Builder, "create_maxnumf")
def _maximum(original: Patch, self: Builder, left: Handle, right: Handle) -> Handle:
    """As the minimum."""
    return self.binary_op(left, right, np.fmax)


@_replaces(Builder, "create_ashr")
def _shift_right(original: Patch, self: Builder, left: Handle, right: Handle) -> Handle:
    """Before 3.9 the operands themselves were made signed, for everything that used them later."""
    return original(self, Handle(left.data, left.dtype), Handle(right.data, right.dtype))


@_replaces(Builder, "create_dot")
def _dot(original: Patch, self: Builder, a: Handle, b: Handle, d: Handle, precision: Any, *rest: Any) -> Handle:
    """Products in float32, or float64; TF32 operands where asked for."""
    if not a.dtype.is_floating() or _is_float8(a.dtype.scalar) or _is_float8(b.dtype.scalar):
        return original(self, a, b, d, precision, *rest)
    compute = np.float64 if a.dtype.scalar == tl.float64 else np.float32
    left, right = _values(a).astype(compute, copy=False), _values(b).astype(compute, copy=False)
    if a.dtype.scalar != tl.float32 or precision == INPUT_PRECISION.IEEE:
        product = left @ right
    elif precision in (INPUT_PRECISION.TF32, INPUT_PRECISION.TF32x3):
        large_left, large_right = float32_to_tf32(left), float32_to_tf32(right)
        product = large_left @ large_right
        if precision == INPUT_PRECISION.TF32x3:
            small_left, small_right = float32_to_tf32(left - large_left), float32_to_tf32(right - large_right)
            product = (small_left @ large_right + large_left @ small_right) + product
    else:
        raise NotImplementedError(f"a float32 dot with input precision {precision} is not emulated")
    return Handle((product + d.data).astype(d.data.dtype, copy=False), d.dtype.scalar)


# Addresses are checked, and stripped of the number of their argument.


@_replaces(Builder, "create_masked_load")
def _load(original: Patch, self: Builder, pointers: Handle, mask: Any, other: Handle | None, *rest: Any, **how: Any):
    lanes = np.asarray(mask.data, dtype=np.bool_)
    addresses = STATE.check(pointers.data, lanes, _width(pointers), "load")
    return original(self, Handle(addresses, pointers.dtype), Handle(lanes, tl.int1), other, *rest, **how)


@_replaces(Builder, "create_masked_store")
def _store(original: Patch, self: Builder, pointers: Handle, value: Handle, mask: Any, *rest: Any) -> None:
    lanes = np.asarray(mask.data, dtype=np.bool_)
    addresses = STATE.check(pointers.data, lanes, _width(pointers), "store")
    return original(self, Handle(addresses, pointers.dtype), value, Handle(lanes, tl.int1), *rest)


@_replaces(Builder, "create_atomic_rmw")
def _atomic(original: Patch, self: Builder, op: Any, pointers: Handle, value: Handle, mask: Handle, *rest: Any):
    if _is_bf16(value):
        raise NotImplementedError("atomics on bfloat16 are not emulated")
    addresses = STATE.check(pointers.data, mask.data, _width(pointers), "atomic")
    return original(self, op, Handle(addresses, pointers.dtype), value, mask, *rest)


@_replaces(Builder, "create_atomic_cas")
def _compare_and_swap(original: Patch, self: Builder, pointers: Handle, *rest: Any) -> Handle:
    addresses = STATE.check(pointers.data, np.ones(1, dtype=bool), _width(pointers), "atomic")
    return original(self, Handle(addresses, pointers.dtype), *rest)


@_replaces(interpreter.TensorDescHandle, "validate")
def _validate_descriptor(original: Patch, self: interpreter.TensorDescHandle) -> None:
    """Triton 3.4 asks for strides of 16 elements where the hardware asks for 16 bytes."""
    size = self.base.dtype.element_ty.primitive_bitwidth // 8
    if self.base.data.item() % 16 or any(stride.data.item() * size % 16 for stride in self.strides[:-1]):
        raise ValueError("base and strides of a descriptor must be multiples of 16 bytes")
    if self.strides[-1].data.item() != 1:
        raise ValueError("the last dimension of a descriptor must be contiguous")


# Integers


@_replaces(TritonSemantic, "binary_op_sanitize_overflow_impl")
def _check_overflow(original: Patch, self: TritonSemantic, left: tl.tensor, right: tl.tensor, op: Patch) -> None:
    """Triton's own check is off unless debugging, counts unsigned wrap-around as overflow, and is slow."""
    if not isinstance(self.builder, Builder):
        return original(self, left, right, op)
    dtype = left.type.scalar
    if dtype.is_int_signed() and 1 < dtype.int_bitwidth < 64:
        operation = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[op.__name__]
        result = operation(left.handle.data.astype(np.int64), right.handle.data.astype(np.int64))
        limit = 1 << (dtype.int_bitwidth - 1)
        if result.size and not (-limit <= result.min() and result.max() < limit):
            raise IntegerOverflow(f"{dtype} overflow in {op.__name__} {STATE.where}")
    return None


@_replaces(interpreter.ASTTransformer, "visit_For")
def _rewrite_loop(original: Patch | None, self: interpreter.ASTTransformer, node: Any) -> Any:
    """A Python integer as loop variable never overflows and has no dtype; static_range keeps it."""
    call = node.iter
    if isinstance(call, interpreter.ast.Call):
        name = getattr(call.func, "id", getattr(call.func, "attr", ""))
        if name == "range":
            call.func = interpreter.ast.Name(id="_interpreted_loop", ctx=interpreter.ast.Load())
    return self.generic_visit(node)


@_replaces(interpreter, "_interpreted_loop")
def _loop(original: None, first: Any, second: Any = None, step: Any = 1, **options: Any) -> Iterator[tl.tensor]:
    """What ``range`` and ``tl.range`` yield in a compiled kernel: integer tensors, int64 where a bound is.

    The interpreter hands its own globals to every kernel: that is how a kernel finds this one.
    """
    bounds = (0, first, step) if second is None else (first, second, step)
    wide = any(isinstance(bound, tl.tensor) and bound.dtype.primitive_bitwidth > 32 for bound in bounds)
    dtype = tl.int64 if wide else tl.int32
    for value in range(*(int(bound) for bound in bounds)):
        yield tl.tensor(Handle(np.array([value], dtype=interpreter._get_np_dtype(dtype)), dtype), dtype)


# Launching


@_replaces(interpreter.GridExecutor, "_init_args_hst")
def _use_arguments(original: Patch, self: interpreter.GridExecutor, args: Any, kwargs: Any) -> Any:
    """Triton copies arguments from the GPU; here they are on the CPU, and their views become the legal addresses."""
    STATE.views.clear()
    STATE.numbers.clear()
    for name, argument in [*zip(self.arg_names, args, strict=False), *kwargs.items()]:
        STATE.register(name, argument)
    return args, kwargs


@_replaces(interpreter.GridExecutor, "_restore_args_dev")
def _keep_arguments(original: Patch, *arguments: Any) -> None:
    """Copying a storage onto itself would touch every page of a tensor of many GB."""


@_replaces(interpreter.GridExecutor, "__call__")
def _launch(original: Patch, self: interpreter.GridExecutor, *args: Any, **kwargs: Any) -> None:
    """Infinity and NaN are results, not warnings."""
    STATE.launches += 1
    with np.errstate(all="ignore"):
        original(self, *args, **kwargs)


@_replaces(interpreter, "_implicit_cvt")
def _argument(original: Patch, argument: Any) -> Any:
    """Scalars get the dtype a compiled kernel gives them, pointers the number of their argument."""
    if isinstance(argument, bool):
        return tl.tensor(Handle(np.array([argument]), tl.int1), tl.int1)
    if isinstance(argument, float):
        return tl.tensor(Handle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)
    result = original(argument)
    if isinstance(argument, int):
        result.handle.data = np.array([argument], dtype=interpreter._get_np_dtype(result.dtype))
    elif hasattr(argument, "data_ptr"):
        result.handle.data = result.handle.data | STATE.tag(argument)
    return result


@_replaces(Builder, "set_grid_dim")
def _draw_order(original: Patch, self: Builder, *dimensions: int) -> None:
    original(self, *dimensions)
    STATE.order = np.random.default_rng([STATE.seed, STATE.launches]).permutation(np.prod(dimensions)).tolist()


@_replaces(Builder, "set_grid_idx")
def _run_in_order(original: Patch, self: Builder, *program: int) -> None:
    """Triton runs programs in ascending order, a GPU in any."""
    number = STATE.order[int(np.ravel_multi_index(program, self.grid_dim))]
    original(self, *(int(i) for i in np.unravel_index(number, self.grid_dim)))


# Speed


@_replaces(interpreter, "_get_np_dtype")
def _numpy_dtype(original: Patch, dtype: tl.dtype) -> np.dtype:
    """Triton builds a dictionary of all dtypes at each call, several times per operation."""
    scalar = dtype.scalar
    if scalar.is_ptr():
        return np.dtype(np.uint64)
    if scalar.name not in NUMPY_DTYPES:
        NUMPY_DTYPES[scalar.name] = original(scalar)
    return NUMPY_DTYPES[scalar.name]


@_replaces(tl.tensor, "__init__")
def _tensor(original: Patch, self: tl.tensor, handle: Any, type: tl.dtype) -> None:
    """Triton derives the type of every shape anew, for every result; there are few shapes."""
    shape = tuple(type.shape) if type.is_block() else ()
    if shape not in SHAPES:
        original(self, handle, type)
        SHAPES[shape] = self.shape, self.numel
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = SHAPES[shape]


@_replaces(tl.block_type, "__init__")
def _block_type(original: Patch, self: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
    """The same for the types of blocks."""
    key = element_ty.name, tuple(getattr(size, "value", size) for size in shape)
    if key not in BLOCK_TYPES:
        original(self, element_ty, shape)
        BLOCK_TYPES[key] = dict(vars(self))
    vars(self).update(BLOCK_TYPES[key])


@_replaces(interpreter, "_patch_lang")
def _patch_language(original: Patch, function: Any) -> Any:
    """Triton patches its language module at each launch and at each call of a helper; once is enough."""
    if not LANGUAGE_SCOPES:
        LANGUAGE_SCOPES.append(original(SimpleNamespace(__globals__={"tl": tl, "core": tl.core})))
        # numpy 2.4 refuses to make an integer of an array with a dimension.
        tl.tensor.__index__ = lambda self: int(self.handle.data.item())
    return SimpleNamespace(restore=lambda: None)


@_replaces(interpreter.InterpretedFunction, "__call__")
def _call_helper(original: Patch, self: interpreter.InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
    """Triton wraps an exception again at each level of calls, and hides what it was."""
    return self.rewrite()(*args, **kwargs)


_replaced: list[tuple[Any, str, Any]] = []


def install() -> None:
    """Apply every patch, once; the settings of the interpreter's builder with them."""
    if _replaced:
        return
    for owner, name, patch in PATCHES:
        original = getattr(owner, name, None)
        _replaced.append((owner, name, owner.__dict__.get(name)))
        setattr(owner, name, _bind(patch, original))
    # The interpreter accepts dots of any size; a GPU does not.
    interpreter.interpreter_builder.codegen_fns["min_dot_size"] = min_dot_size(GPUTarget("cuda", 80, 32))


def uninstall() -> None:
    """Put back everything that ``install`` replaced."""
    while LANGUAGE_SCOPES:
        scope = LANGUAGE_SCOPES.pop()
        if scope is not None:  # Triton 3.4 has no way back
            scope.restore()
    while _replaced:
        owner, name, original = _replaced.pop()
        if original is None:
            delattr(owner, name)
        else:
            setattr(owner, name, original)


def _bind(patch: Patch, original: Any) -> Patch:
    @functools.wraps(patch)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return patch(original, *args, **kwargs)

    return replacement

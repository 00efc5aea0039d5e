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
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import min_dot_size
from triton.runtime import interpreter

from .memory import STATE, OutOfBounds, set_program_order
from .patches import LANGUAGE_SCOPES, PATCHES, IntegerOverflow, Patch

__all__ = ["STATE", "IntegerOverflow", "OutOfBounds", "install", "set_program_order", "uninstall"]

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

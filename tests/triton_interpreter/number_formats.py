"""bfloat16 and TF32 in numpy, which has neither: bits of uint16, and float32 that lost its low bits."""

from __future__ import annotations

import numpy as np


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

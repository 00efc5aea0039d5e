"""What was measured on real GPUs: the committed table that a choice consults before the cost model.

``measured.json``, which ``make tune`` writes, maps a GPU generation to {"machine", "versions", "commit"}, to "rates",
which maps a device's name to [16-bit FLOP of a matmul, bytes copied] a second, and to rows of each kind:

- "matmuls": dtype, m, n, k, rank, one_pass (whether x A_catᵀ could be had in one pass), and the fastest form and tile
  of the Triton backend with its seconds.
- "cuda_matmuls": form, dtype, m, n, k, rank and the microseconds of y [m, n] = x w + scale t b, x [m, k], by each
  kernel of the CUDA backend that was right: "portable" and variants of ``backends.hopper``, where the forms are too. A
  form in one pass also has "two passes", the fastest projection and matmul together.
- "cuda_projections": form, dtype, m, n, k and the microseconds of x aᵀ [m, n] by "portable" and "streaming".
- "calls": dtype, m, n, k, rank and the microseconds that forward and backward took in each backend.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from math import log2
from typing import Any

NEAR = 1.0  # a row answers for shapes whose sizes differ from its own by a factor of 2 in all


@cache
def table() -> dict[str, dict[str, Any]]:
    """The whole table, by generation; empty before anything was measured."""
    file = resources.files(__package__) / "measured.json"
    content: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return content


def nearest(generation: str, kind: str, sizes: dict[str, int], exact: dict[str, str | bool]) -> dict[str, Any] | None:
    """The measured row of ``kind`` closest to ``sizes`` (all positive) among those equal in ``exact``; None if far."""
    best, least = None, NEAR
    for row in table().get(generation, {}).get(kind, ()):
        if any(row[name] != value for name, value in exact.items()):
            continue
        distance = sum(abs(log2(size / row[name])) for name, size in sizes.items())
        if distance <= least:
            best, least = row, distance
    return best

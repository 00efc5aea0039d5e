"""Memory of a forward and backward pass: the peak above what was there before, and what forward keeps for backward."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reslora_kernels.bench.capture import Pass


def saved_bytes(one: Pass) -> int:
    """Bytes that forward keeps for backward beside weights and adapters: each storage once, inputs x included."""
    own = {t.untyped_storage().data_ptr() for t in (*one.workload.weights, *one.layers.parameters)}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = one.forward()
    del outputs
    return sum(kept.values())


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """The most that was allocated at a time while ``run`` ran, above what was allocated before; results included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with _native_log_discarded(), torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    return highest(change for _, change in sorted(changes, key=lambda change: change[0]))


@contextmanager
def _native_log_discarded() -> Iterator[None]:
    """The profiler's C++ writes two lines on stderr for every use, and no setting stops it."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def highest(changes: Iterable[int]) -> int:
    """The highest level that a series of allocations (positive) and releases (negative) reaches, from 0."""
    level = top = 0
    for change in changes:
        level += change
        top = max(top, level)
    return top

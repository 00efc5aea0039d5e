"""Random tensors of a case, the same for every provider, and a provider's layers on them as something to be timed.

They are called from Python or as CUDA graphs. The memory of a pass is the peak above what was there before, and what
forward keeps for backward.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reslora_kernels.bench.cases import Case
from reslora_kernels.bench.timing import Subject

CPU_CACHE_BYTES = 8 << 20  # what a small case may find in cache on a CPU


@dataclass(frozen=True)
class Workload:
    """One of several input sets of a case: weights [N, K], adapters A [r, K] and B [N, r], inputs [M, K], dy [M, N].

    All are in the case's dtype; lists hold one tensor per layer. Random values: zeros would run faster.
    """

    case: Case
    weights: list[Tensor]
    a: list[Tensor]
    b: list[Tensor]
    xs: list[Tensor]
    dys: list[Tensor]

    def linears(self) -> list[nn.Linear]:
        """Frozen linear layers on the workload's own weights, not on copies."""
        layers = []
        for weight in self.weights:
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            layer.weight = nn.Parameter(weight, requires_grad=False)
            layers.append(layer)
        return layers


@dataclass(frozen=True)
class Layers:
    """A provider's layers on one workload: ``run`` maps the inputs to the outputs; parameters are all A, then all B."""

    run: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    parameters: Sequence[Tensor]


def draw(case: Case, device: torch.device, seed: int = 0) -> Workload:
    """The tensors of a case; every seed is another input set."""
    generator = torch.Generator(device).manual_seed(1 + seed)

    def each(*shape: int, scale: float = 1.0) -> list[Tensor]:
        return [
            torch.randn(*shape, generator=generator, device=device).mul_(scale).to(case.torch_dtype)
            for _ in range(case.layers)
        ]

    return Workload(
        case,
        weights=each(case.n, case.k, scale=case.k**-0.5),
        a=each(case.r, case.k, scale=case.k**-0.5),
        b=each(case.n, case.r, scale=case.r**-0.5),
        xs=[x.requires_grad_() for x in each(case.m, case.k)],
        dys=each(case.m, case.n),
    )


def cache_bytes(device: torch.device) -> int:
    """Of the last cache before memory."""
    if device.type != "cuda":
        return CPU_CACHE_BYTES
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20))


def input_sets(case: Case, cache_bytes: int, most: int = 16) -> int:
    """How many input sets of a case in turn keep the cache from serving the next."""
    return sets_of(case.input_bytes(), cache_bytes, most)


def sets_of(size: int, cache_bytes: int, most: int) -> int:
    """How many sets of ``size`` bytes exceed the cache four times over, at least 2."""
    return min(most, max(2, -(-4 * cache_bytes // size)))


@dataclass
class Pass:
    """Forward and backward of one provider on one workload."""

    layers: Layers
    workload: Workload

    @property
    def leaves(self) -> list[Tensor]:
        return [*self.workload.xs, *self.layers.parameters]

    def forward(self) -> Sequence[Tensor]:
        return self.layers.run(self.workload.xs)

    def backward(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Gradients of every input, then of every parameter."""
        return torch.autograd.grad(list(outputs), self.leaves, self.workload.dys)

    def results(self) -> dict[str, list[Tensor]]:
        """y, dx, dA, dB, one tensor per layer."""
        outputs = self.forward()
        gradients = list(self.backward(outputs))
        count = len(self.workload.xs)
        found = {"y": [y.detach() for y in outputs], "dx": gradients[:count]}
        if self.layers.parameters:
            found |= {"dA": gradients[count : 2 * count], "dB": gradients[2 * count :]}
        return found


@dataclass
class Replay:
    """The two passes as CUDA graphs. What they read and write is kept alive here."""

    forward: Any
    backward: Any
    kept: Any


def eager(name: str, passes: Sequence[Pass]) -> Subject:
    """Launched from Python, as in training without graphs."""
    return Subject(name, lambda i: passes[i].forward(), lambda i, outputs: passes[i].backward(outputs))


def replayed(name: str, passes: Sequence[Pass]) -> Subject:
    """Captured here, one pair of graphs for each input set. Raises what the provider raises where that fails."""
    replays = [capture(one) for one in passes]
    return Subject(name, lambda i: replays[i].forward.replay(), lambda i, outputs: replays[i].backward.replay())


def warmed_up(run: Callable[[], Any]) -> Any:
    """A side stream in which ``run`` has run three times, and in which it can be captured now."""
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    return stream


def capture(one: Pass) -> Replay:
    """Capture forward and backward apart, in one memory pool, so that each can be timed (as make_graphed_callables).

    Backward runs in the stream that its forward ran in, so warm-up and both captures use the same side stream.
    """
    stream = warmed_up(lambda: one.backward(one.forward()))
    forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(forward, stream=stream):
        outputs = one.forward()
    with torch.cuda.graph(backward, pool=forward.pool(), stream=stream):
        gradients = one.backward(outputs)
    return Replay(forward, backward, (outputs, gradients, one))


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

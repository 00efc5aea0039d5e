"""A provider's layers on several input sets as something to be timed: called from Python, or as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reslora_kernels.bench.timing import Subject
from reslora_kernels.bench.workload import Layers, Workload


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

"""One call of a backend as a value: its tensors, exact or random, its results, and what they should be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import Tensor

from reslora_kernels.backends import cuda, native
from reslora_kernels.backends import torch as library
from reslora_kernels.dropout import Dropout
from reslora_kernels.side_channel import Needs, SideChannel
from reslora_kernels.tuning import forms, gpus

SEED = 1234567890123456789
RESULTS = ("y", "handed", "u", "dx", "da_cat", "db_cat", "dresidual")


@dataclass(frozen=True)
class Call:
    """x [m, k], weight [n, k], A_cat [rank, k], B_cat [n, own]; ``why`` says what the case is there for."""

    why: str
    m: int
    k: int
    n: int
    rank: int
    own: int
    dtype: torch.dtype = torch.bfloat16
    adapter: torch.dtype = torch.float32
    form: str = "two_pass"
    generation: str = "interpreter"
    p: float = 0.0
    c: float = 1.0
    scaling: float = 2.0
    hand: tuple[int, int] = (0, 0)
    residual: bool = False
    bias: bool = True
    layout: str = "contiguous"
    reads_of_dy: int = 1

    def with_truth_dtype(self) -> Call:
        return replace(self, dtype=torch.float64, adapter=torch.float64)


def draw(call: Call, device: torch.device, integers: bool) -> dict[str, Tensor | None]:
    """The tensors of a call. Integers are so few and small that every intermediate result is exact in bfloat16."""
    generator = torch.Generator().manual_seed(call.m + call.k)

    def random(*shape: int, scale: float = 1.0, few: int | None = None) -> Tensor:
        if not integers:
            return torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        values = torch.randint(-2, 3, shape, generator=generator).double()
        if few is not None and values.numel():
            values *= torch.rand(shape, generator=generator) < few / max(shape)
        return values

    hand_width = call.hand[1] - call.hand[0]
    values = {
        "x": random(call.m, call.k),
        "weight": random(call.n, call.k, scale=call.k**-0.5, few=8),
        "bias": random(call.n) if call.bias else None,
        "a_cat": random(call.rank, call.k, scale=call.k**-0.5, few=4),
        "b_cat": random(call.n, call.own, scale=call.own**-0.5, few=4),
        "residual": random(call.m, call.own) if call.residual else None,
        "dy": random(call.m, call.n, few=8),
        "dhanded": random(call.m, hand_width) if hand_width else None,
    }
    rounded = {name: t if t is None else t.to(_dtype(call, name)).to(device) for name, t in values.items()}
    return {name: t if t is None else _laid_out(call.layout, name, t) for name, t in rounded.items()}


def _dtype(call: Call, name: str) -> torch.dtype:
    return call.adapter if name in ("a_cat", "b_cat") else call.dtype


def _laid_out(layout: str, name: str, tensor: Tensor) -> Tensor:
    """The same values under other strides."""
    if tensor.dim() != 2 or layout == "contiguous":
        return tensor
    if layout == "transposed":
        return tensor.T.contiguous().T
    if layout == "sliced":  # rows start at odd places, and neighbours hold what must not be read
        rows, columns = tensor.shape
        wide = torch.full((rows, columns + 3), float("nan"), dtype=tensor.dtype, device=tensor.device)
        wide[:, 1 : columns + 1] = tensor
        return wide[:, 1 : columns + 1]
    if layout == "transposed weight":
        return tensor.T.contiguous().T if name == "weight" else tensor
    raise ValueError(f"layout must be contiguous, transposed, sliced or transposed weight, got {layout!r}")


def run(call: Call, values: dict[str, Tensor | None], backend=library) -> dict[str, Tensor]:
    """Every result of a forward and a backward pass of one backend."""
    v = values
    dropout = Dropout(torch.tensor(SEED, device=v["x"].device), call.p) if call.p else None
    side = SideChannel(call.c, call.scaling, *call.hand)
    stacks = ((v["a_cat"],) if call.rank else (), (v["b_cat"],))
    once = mock.patch.object(forms, "reads_dy_once", lambda *_: call.reads_of_dy == 1)
    with forms.assume(gpus.GENERATIONS[call.generation], (call.form,)), once:
        y, handed, u = backend.forward(v["x"], v["weight"], v["bias"], *stacks, v["residual"], side, dropout)
        gradients = backend.backward(
            v["dy"],
            v["dhanded"],
            v["x"],
            v["weight"],
            *stacks,
            u if call.rank else v["residual"],
            side,
            dropout,
            Needs(da=call.rank > 0, dresidual=call.residual),
        )
    results = dict(zip(RESULTS, (y, handed, u, *gradients), strict=True))
    return {name: result for name, result in results.items() if result is not None}


def truth(call: Call, values: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """The results in float64 from the same, already rounded, values."""
    exact = {name: t if t is None else t.double() for name, t in values.items()}
    return run(call.with_truth_dtype(), exact)


def launched(call: Call, values: dict[str, Tensor | None], kernel: str) -> tuple[dict[str, Tensor], list[dict]]:
    """The results by the cuda backend, and the keywords with which each launch of ``kernel`` was made."""
    extension = native.load()
    with mock.patch.object(extension, kernel, wraps=getattr(extension, kernel)) as made:
        results = run(call, values, cuda)
    return results, [given.kwargs for given in made.call_args_list]

"""Single launches of the cuda backend's matmul and projection: what they must come to, and their times in turns.

Both kinds have a ``form`` of ``reslora_kernels.backends.hopper``; ``n`` counts the columns of the product, ``k`` its
terms, so that those of dx are the layer's K and N. A and B are in float32 as layers have them, unless ``adapter`` says
otherwise: what a kernel needs to convert them first is in its time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from reslora_kernels.backends import cuda, hopper, native
from reslora_kernels.bench.timing import Plan, Subject, check_alive, clock_of, measure, one_line, percentiles
from reslora_kernels.bench.workload import cache_bytes, sets_of
from reslora_kernels.testing import assert_close_to_truth

IN_ONE_PASS = {hopper.ONE_PASS: (hopper.FORWARD, hopper.H), hopper.DX_AND_DH: (hopper.DX, hopper.DH)}  # and in two
REPEATS = 10  # launches on a GPU that must give the same bits: a kernel with a race may be right once
LIBRARY = "library"


class Random:
    """Values whose row sums stay near 1."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        self.generator, self.device, self.dtype = torch.Generator(device).manual_seed(seed), device, dtype

    def matrix(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(size, generator=self.generator, device=self.device)
        return values.mul_(size[-1] ** -0.5).to(dtype or self.dtype)

    def bits(self, rows: int, columns: int) -> Tensor:
        """int32 [rows, columns / 32], up."""
        size = (rows, -(-columns // 32))
        drawn = torch.randint(-(2**31), 2**31, size, generator=self.generator, device=self.device)
        return drawn.to(torch.int32)


@dataclass(frozen=True)
class Matmul:
    """y [m, n] = x w + bias + keep * (scale t b), in one pass with t = x aᵀ, which is written too."""

    form: str
    m: int
    n: int
    k: int
    rank: int = 16
    dtype: torch.dtype = torch.bfloat16
    adapter: torch.dtype = torch.float32
    table = "cuda_matmuls"

    def __str__(self) -> str:
        return f"{self.form} M={self.m} N={self.n} K={self.k} r={self.rank} {_types(self)}"

    def sizes(self) -> dict[str, Any]:
        dtype = {"form": self.form, "dtype": str(self.dtype)}
        return dtype | {"m": self.m, "n": self.n, "k": self.k, "rank": self.rank}

    def draw(self, device: torch.device, seed: int) -> dict[str, Any]:
        """w of the forward pass lies by k, that of dx by columns."""
        random = Random(device, self.dtype, seed)
        given = {"x": random.matrix(self.m, self.k), "scale": 2.0, "bias": None, "keep": None}
        given["y"] = torch.full((self.m, self.n), float("nan"), dtype=self.dtype, device=device)
        by_k = self.form in (hopper.FORWARD, hopper.ONE_PASS)
        if self.form in IN_ONE_PASS:
            a = random.matrix(*((self.rank, self.k) if by_k else (self.k, self.rank)), dtype=self.adapter)
            t = torch.full((self.m, self.rank), float("nan"), dtype=self.dtype, device=device)
            given |= {"a": a if by_k else a.T, "t": t}
        else:
            given["t"] = random.matrix(self.m, self.rank)
        if by_k:
            given["w"], given["b"] = (
                random.matrix(self.n, self.k).T,
                random.matrix(self.n, self.rank, dtype=self.adapter).T,
            )
            return given | {"bias": random.matrix(self.n)}
        given["w"], given["b"] = random.matrix(self.k, self.n), random.matrix(self.rank, self.n, dtype=self.adapter)
        return given | ({"keep": random.bits(self.m, self.n)} if self.form == hopper.DX_MASKED else {})

    def launch(self, given: dict[str, Any]) -> None:
        bias, keep, a = given["bias"], given["keep"], given.get("a")
        made = (
            {}
            if a is None
            else {"a": a.contiguous(), "side": native.side_channel(None, 0, given["t"], None, 0, 1.0, 1.0)}
        )
        cuda._augmented_matmul(
            given["x"], given["w"], given["t"] if a is None else None, given["b"], given["y"], given["scale"],
            bias=0 if bias is None else bias.data_ptr(), keep=0 if keep is None else keep.data_ptr(),
            keep_words=0 if keep is None else keep.shape[1], **made,
        )  # fmt: skip

    def found(self, given: dict[str, Any]) -> dict[str, Tensor]:
        return {"y": given["y"]} | ({"t": given["t"]} if "a" in given else {})

    def expected(self, given: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
        """By PyTorch in ``dtype``."""
        x, w, b = (given[name].to(dtype) for name in ("x", "w", "b"))
        t = x @ given["a"].to(dtype).T if "a" in given else given["t"].to(dtype)
        low_rank = given["scale"] * (t @ b)
        if given["keep"] is not None:
            bits = given["keep"][:, :, None] >> torch.arange(32, device=x.device, dtype=torch.int32) & 1
            low_rank = low_rank * bits.flatten(1)[:, : w.shape[1]]
        y = x @ w + low_rank
        y = y if given["bias"] is None else y + given["bias"].to(dtype)
        return {"y": y} | ({"t": t} if "a" in given else {})

    def library(self, given: dict[str, Any]) -> object:
        """The frozen matmul alone."""
        return torch.nn.functional.linear(given["x"], given["w"].T, given["bias"])


@dataclass(frozen=True)
class Projection:
    """h = x aᵀ [m, n] through the side channel: factor h + extra, and raw_factor h from column ``raw_start`` on.

    ``extra`` covers columns from ``extra_start`` on. Without these two the result is x aᵀ as it is.
    """

    form: str
    m: int
    n: int
    k: int
    dtype: torch.dtype = torch.bfloat16
    adapter: torch.dtype = torch.float32
    extra_start: int | None = None
    raw_start: int | None = None
    table = "cuda_projections"

    def __str__(self) -> str:
        side = {"extra": self.extra_start, "raw": self.raw_start}
        also = "".join(f", {name} from {start}" for name, start in side.items() if start is not None)
        return f"{self.form} M={self.m} N={self.n} K={self.k} {_types(self)}{also}"

    def sizes(self) -> dict[str, Any]:
        return {"form": self.form, "dtype": str(self.dtype), "m": self.m, "n": self.n, "k": self.k}

    def draw(self, device: torch.device, seed: int) -> dict[str, Any]:
        """``a`` lies row by row for h; for dh it is B, transposed."""
        random, m, n, k = Random(device, self.dtype, seed), self.m, self.n, self.k
        given = {"x": random.matrix(m, k), "factor": 1.0, "raw_factor": 1.0, "extra": None, "raw": None}
        a = random.matrix(*((n, k) if self.form == hopper.H else (k, n)), dtype=self.adapter)
        given["a"] = a if self.form == hopper.H else a.T
        given["inner"] = torch.full((m, n), float("nan"), dtype=self.dtype, device=device)
        if self.extra_start is not None:
            given |= {"extra": random.matrix(m, n - self.extra_start), "factor": 2.0}
        if self.raw_start is not None:
            raw = torch.full((m, n - self.raw_start), float("nan"), dtype=self.dtype, device=device)
            given |= {"raw": raw, "raw_factor": 0.5}
        return given

    def launch(self, given: dict[str, Any]) -> None:
        side = native.side_channel(
            given["extra"], self.extra_start or 0, given["inner"], given["raw"], self.raw_start or 0, given["factor"],
            given["raw_factor"],
        )  # fmt: skip
        cuda._project(given["x"], given["a"], side, self.n, None)

    def found(self, given: dict[str, Any]) -> dict[str, Tensor]:
        return {name: given[name] for name in ("inner", "raw") if given[name] is not None}

    def expected(self, given: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
        """By PyTorch in ``dtype``."""
        h = given["x"].to(dtype) @ given["a"].to(dtype).T
        inner = given["factor"] * h
        if given["extra"] is not None:
            inner[:, self.extra_start :] += given["extra"].to(dtype)
        return {"inner": inner, "raw": given["raw_factor"] * h[:, self.raw_start or 0 :]}

    def library(self, given: dict[str, Any]) -> object:
        """The product alone."""
        return given["x"] @ given["a"].to(self.dtype).T

    def bytes_moved(self) -> int:
        """Of x, a and h, each once."""
        return self.dtype.itemsize * (self.m * self.k + self.n * self.k + self.m * self.n)


Launch = Matmul | Projection


def _types(launch: Launch) -> str:
    return f"{launch.dtype}, adapters {launch.adapter}".replace("torch.", "")


def launches_of(m: int, k: int, n: int, rank: int, dtype: torch.dtype) -> Iterator[Launch]:
    """All that a layer K -> N with M tokens may launch, forward and backward, with dropout and without."""
    yield Projection(hopper.H, m, rank, k, dtype)
    yield Projection(hopper.DH, m, rank, n, dtype)
    yield Matmul(hopper.FORWARD, m, n, k, rank, dtype)
    yield Matmul(hopper.DX, m, k, n, rank, dtype)
    yield Matmul(hopper.DX_MASKED, m, k, n, rank, dtype)
    if rank <= hopper.ONE_PASS_RANK:
        yield Matmul(hopper.ONE_PASS, m, n, k, rank, dtype)
        yield Matmul(hopper.DX_AND_DH, m, k, n, rank, dtype)


def compare_with_two_passes(table: dict[str, list[dict[str, Any]]]) -> None:
    """Give each row of one pass the time of the fastest projection and matmul instead; a row without them goes."""

    def fastest(kind: str, form: str, sizes: dict[str, Any]) -> float | None:
        of = sizes | {"form": form}
        found = [row["microseconds"] for row in table[kind] if all(row[name] == of[name] for name in of)]
        return min(found[0].values(), default=None) if found else None

    kept = []
    for row in table[Matmul.table]:
        if forms := IN_ONE_PASS.get(row["form"]):
            sizes = {name: row[name] for name in ("dtype", "m", "n", "k", "rank")}
            matmul = fastest(Matmul.table, forms[0], sizes)
            del sizes["rank"]
            projection = fastest(Projection.table, forms[1], sizes | {"n": row["rank"]})
            if matmul is None or projection is None:
                continue
            row["microseconds"][hopper.TWO_PASSES] = round(matmul + projection, 2)
        kept.append(row)
    table[Matmul.table] = kept


@contextmanager
def recorded() -> Iterator[list[int]]:
    """Inside, the list takes of each launch of the extension which Hopper kernel it asked for, 0 for a portable one."""
    asked: list[int] = []
    extension = native.load()
    with ExitStack() as patches:
        for name in ("augmented_matmul", "project"):
            original = getattr(extension, name)

            def launch(*given: Any, original: Any = original, **named: Any) -> None:
                asked.append(int(named.get("hopper", 0)))
                original(*given, **named)

            patches.enter_context(mock.patch.object(extension, name, launch))
        yield asked


def setting_for(kernel: str) -> str:
    """What the environment must say for a kernel of the table to serve."""
    return {hopper.PORTABLE: hopper.OFF, hopper.STREAMING: "cooperative"}.get(kernel, kernel)


def faults(
    launch: Launch, kernels: Sequence[str], device: torch.device, launching: Callable[[str], None] = lambda kernel: None
) -> dict[str, str]:
    """What is wrong with each kernel that is: against float64, by the rule of ``testing``, or another one serves.

    Or it does not give the same bits again. ``launching`` is told before each.

    Raises:
        DeviceLostError: the last one that was launched took the GPU along.
    """
    given, found = launch.draw(device, seed=0), {}
    truth, plain = launch.expected(given, torch.float64), launch.expected(given, launch.dtype)
    for kernel in kernels:
        launching(kernel)
        try:
            with recorded() as asked:
                _launch_anew(launch, given, kernel)
            if asked != [0 if kernel == hopper.PORTABLE else hopper.NUMBERS.get(kernel, 1)]:
                raise AssertionError("another kernel serves in its place")
            for name, result in launch.found(given).items():
                assert_close_to_truth(result, truth[name], plain[name], name)
            first = {name: result.clone() for name, result in launch.found(given).items()}
            for _ in range(REPEATS if device.type == "cuda" else 1):
                _launch_anew(launch, given, kernel)
                if not all(torch.equal(result, first[name]) for name, result in launch.found(given).items()):
                    raise AssertionError("other bits when it is launched again")
        except (AssertionError, RuntimeError) as error:
            found[kernel] = f"{launch}: {one_line(error)}"
            check_alive(device)
    return found


def _launch_anew(launch: Launch, given: dict[str, Any], kernel: str) -> None:
    """By that kernel; what it does not write is NaN."""
    for tensor in launch.found(given).values():
        tensor.fill_(float("nan"))
    with hopper.requested(setting_for(kernel)):
        launch.launch(given)


def times(launch: Launch, kernels: Sequence[str], device: torch.device, plan: Plan) -> dict[str, Any]:
    """A row of the measured table, and the library's microseconds beside it; medians of rounds in turns.

    Each launch takes the next of several sets of operands, more than the cache holds: those of a round share none.
    """
    every = [launch.draw(device, seed=0)]
    size = sum(tensor.nbytes for tensor in every[0].values() if isinstance(tensor, Tensor))
    every += [launch.draw(device, seed) for seed in range(1, sets_of(size, cache_bytes(device), most=32))]
    turns = cycle(every)

    def subject(kernel: str) -> Subject:
        def run(index: int) -> None:
            with hopper.requested(setting_for(kernel)):
                launch.launch(next(turns))

        return Subject(kernel, run)

    subjects = [Subject(LIBRARY, lambda index: launch.library(next(turns))), *map(subject, kernels)]
    samples = measure(subjects, clock_of(device), plan, lambda: check_alive(device))
    medians = {name: percentiles(found.forward)[1] * 1e6 for name, found in samples.items() if found.failure is None}
    microseconds = {name: round(value, 2) for name, value in medians.items()}
    library = microseconds.pop(LIBRARY, None)
    return launch.sizes() | {"microseconds": microseconds, LIBRARY: library}

"""The Hopper kernel on sm_90: each variant against float64, then timed beside the frozen linear.

python -m benchmarks.gpu_check.hopper --output hopper.json

A row has a shape, a form (forward, dx, dx with dropout, one pass), and for each variant and the portable kernel its
microseconds and its share of the speed of torch.nn.functional.linear on the same operands, all from one process, in
turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

from reslora_kernels.backends import cuda, hopper
from reslora_kernels.testing import assert_close_to_truth

SHAPES = [  # m, k, n, rank
    (8192, 4096, 4096, 16), (8192, 4096, 14336, 16), (8192, 14336, 4096, 16), (2048, 4096, 4096, 16),
    (8192, 8192, 8192, 16), (8192, 4096, 4096, 64), (512, 4096, 4096, 16), (8192, 4096, 1024, 16),
    (8192, 4096, 512, 16), (8192, 4096, 256, 16), (8192, 14336, 512, 16),
]  # fmt: skip
CHECKED = [(300, 200, 520, 16), (1024, 1024, 1032, 72), (300, 200, 264, 24)]
FORMS = ("forward", "dx", "dx with dropout")
ONE_PASS = "one pass"  # of the forward pass: beside y, u = x aᵀ is made and written
DEVICE = "cuda"
SETS, ROUNDS = 3, 20  # of operands, so that L2 does not hold them; of every provider in turn


def operands(shape: tuple[int, int, int, int], form: str, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """Arguments of the augmented matmul: w of the forward pass lies by k, that of dx by columns."""
    m, k, n, rank = shape
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=DEVICE).mul_(size[-1] ** -0.5).to(dtype)

    given: dict[str, Any] = {"x": random(m, k), "t": random(m, rank), "bias": None, "keep": None, "scale": 2.0}
    if form == ONE_PASS:
        given |= {"t": None, "a": random(rank, k), "u": torch.empty(m, rank, dtype=dtype, device=DEVICE)}
    if form in ("forward", ONE_PASS):
        return given | {"w": random(n, k).T, "b": random(n, rank).T, "bias": random(n)}
    given |= {"w": random(k, n), "b": random(rank, n)}
    if form == "dx with dropout":
        size = (m, -(-n // 32))
        given["keep"] = torch.randint(-(2**31), 2**31, size, generator=generator, device=DEVICE).to(torch.int32)
    return given


def multiply(given: dict[str, Any], y: Tensor) -> None:
    """One launch, by the variant that the environment names, else the portable kernel."""
    bias, keep = given["bias"], given["keep"]
    one_pass = {"a": given["a"], "side": cuda._side(None, 0, given["u"], None, 0, 1.0, 1.0)} if "a" in given else {}
    cuda._augmented_matmul(
        given["x"], given["w"], given["t"], given["b"], y, given["scale"], bias=0 if bias is None else bias.data_ptr(),
        keep=0 if keep is None else keep.data_ptr(), keep_words=0 if keep is None else keep.shape[1],
        **one_pass,
    )  # fmt: skip


def result(given: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """What it must come to, by PyTorch in ``dtype``."""
    x, w, b = (given[name].to(dtype) for name in ("x", "w", "b"))
    t = x @ given["a"].to(dtype).T if "a" in given else given["t"].to(dtype)
    low_rank = given["scale"] * (t @ b)
    if given["keep"] is not None:
        bits = given["keep"][:, :, None] >> torch.arange(32, device=DEVICE, dtype=torch.int32) & 1
        low_rank = low_rank * bits.flatten(1)[:, : w.shape[1]]
    y = x @ w + low_rank
    return y if given["bias"] is None else y + given["bias"].to(dtype)


def check(name: str) -> None:
    """AssertionError names what is wrong with a variant."""
    for shape in CHECKED:
        for form in forms_of(shape):
            check_shape(name, shape, form)


def check_shape(name: str, shape: tuple[int, int, int, int], form: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        given = operands(shape, form, dtype, seed=0)
        y = torch.full((shape[0], shape[2]), float("nan"), dtype=dtype, device=DEVICE)
        multiply(given, y)
        what = f"{name}, {form}, {dtype}, {shape}"
        assert_close_to_truth(y, result(given, torch.float64), result(given, dtype), what)
        if form == ONE_PASS:
            exact, plain = (given["x"].to(kind) @ given["a"].to(kind).T for kind in (torch.float64, dtype))
            assert_close_to_truth(given["u"], exact, plain, f"u of {what}")


def forms_of(shape: tuple[int, int, int, int]) -> tuple[str, ...]:
    _, _, n, rank = shape
    return (*FORMS, ONE_PASS) if n <= cuda.ONE_PASS_COLUMNS and rank <= cuda.ONE_PASS_RANK else FORMS


def microseconds(providers: dict[str, Callable[[int], None]]) -> dict[str, float]:
    """Medians of all providers, each under the variant of its name, timed in turns with CUDA events."""
    times: dict[str, list[float]] = {name: [] for name in providers}
    for turn in range(ROUNDS + 3):
        for name, call in providers.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with variant(name if name in hopper.VARIANTS else "off"):
                start.record()
                for operand in range(SETS):
                    call(operand)
                stop.record()
            stop.synchronize()
            if turn >= 3:
                times[name].append(start.elapsed_time(stop) * 1000 / SETS)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(shape: tuple[int, int, int, int], form: str, variants: Sequence[str]) -> dict[str, Any]:
    every = [operands(shape, form, torch.bfloat16, seed) for seed in range(SETS)]
    y = torch.empty(shape[0], shape[2], dtype=torch.bfloat16, device=DEVICE)
    frozen = [(given["x"], given["w"].T, given["bias"]) for given in every]
    providers: dict[str, Callable[[int], None]] = {"linear": lambda i: functional.linear(*frozen[i])}
    for name in ("off", *(variants[:1] if form == ONE_PASS else variants)):  # one pass has one kernel for all
        providers[name] = lambda i: multiply(every[i], y)
    times = microseconds(providers)
    shares = {name: round(times["linear"] / value, 4) for name, value in times.items()}
    return {"m k n rank": shape, "form": form, "microseconds": times, "of_linear": shares}


@contextmanager
def variant(name: str) -> Iterator[None]:
    """The environment that asks for it inside the ``with`` block."""
    with mock.patch.dict("os.environ", {hopper.OPT_IN: name}):
        yield


def rows(variants: Sequence[str]) -> Iterator[dict[str, Any]]:
    for shape in SHAPES:
        for form in forms_of(shape):
            row = measure(shape, form, variants)
            shares = ", ".join(f"{name} {share:.3f}" for name, share in row["of_linear"].items() if name != "linear")
            print(f"{shape} {form}: linear {row['microseconds']['linear']:.1f} us; {shares}", flush=True)
            yield row


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, then time; 1 where a variant is wrong, which is then not timed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the rows, written after each")
    options = parser.parse_args(arguments)
    report: dict[str, Any] = {"wrong": {}, "rows": []}
    for name in hopper.VARIANTS:
        try:
            with variant(name):
                check(name)
        except (AssertionError, RuntimeError) as error:
            report["wrong"][name] = str(error)[:300]
            print(f"{name}: {error}")
    options.output.write_text(json.dumps(report))
    for row in rows([name for name in hopper.VARIANTS if name not in report["wrong"]]):
        report["rows"].append(row)
        options.output.write_text(json.dumps(report, indent=1))
    best = max((share, name) for row in report["rows"] for name, share in row["of_linear"].items() if name != "linear")
    print(f"{len(report['wrong'])} variants wrong; the best share of linear is {best[0]:.3f}, by {best[1]}")
    return int(bool(report["wrong"]))


if __name__ == "__main__":
    raise SystemExit(main())

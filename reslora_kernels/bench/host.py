"""What a layer call costs before any arithmetic: layers so small that only Python and the dispatcher are timed.

A stack of equal linears is called as a model is, through ``nn.Module``, without gradients, in training, and compiled.
On a CPU the backends for GPUs are there too, eager, with launches counted instead of made: see ``backends.stubs``.
Beside PEFT stands the plainest ``autograd.Function`` that one would write by hand for LoRA: three products forward,
five backward, no option at all.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from reslora_kernels.backends import stubs
from reslora_kernels.bench import timing
from reslora_kernels.bench.cases import LORA, Method
from reslora_kernels.bench.providers import SCALING, HandWritten
from reslora_kernels.bench.results import FAILED, SKIPPED, TIMED, Measurement
from reslora_kernels.bench.suite import Bench, fill
from reslora_kernels.bench.timing import check_alive, one_line
from reslora_kernels.config import ResLoRAConfig
from reslora_kernels.layers.kinds import link
from reslora_kernels.layers.linear import ResLoRALinear

FROZEN, FUNCTION, PEFT, OURS = "frozen", "hand-written", "peft", "ours"
METHODS = (LORA, Method("block", 1), Method("middle", 2), Method("input", 1))
Mode = Literal["no grad", "training", "compiled"]


@dataclass(frozen=True)
class HostCase:
    """``layers`` linears of ``width`` in a row on ``m`` tokens, in one of three modes."""

    mode: Mode
    m: int = 8
    width: int = 32
    r: int = 8
    layers: int = 8

    def __str__(self) -> str:
        return f"M={self.m} {self.width}->{self.width} r={self.r} layers={self.layers}, {self.mode}"


def host(gpu: bool, quick: bool) -> list[HostCase]:
    """Microseconds of a layer call without arithmetic, beside a hand-written autograd.Function and PEFT."""
    modes: tuple[Mode, ...] = ("no grad", "training") if quick else ("no grad", "training", "compiled")
    return [HostCase(mode) for mode in modes]


HOST_SETS: dict[str, Callable[[bool, bool], list[HostCase]]] = {"host": host}


class _HandWrittenLoRA(nn.Module):
    def __init__(self, linear: nn.Linear, r: int) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Parameter(torch.randn(r, linear.in_features, device=linear.weight.device))
        self.lora_B = nn.Parameter(torch.randn(linear.out_features, r, device=linear.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = HandWritten.apply(x, self.weight, self.bias, self.lora_A, self.lora_B, SCALING)  # type: ignore[no-untyped-call]
        return y


def subjects(
    case: HostCase, device: torch.device, stubbed: Sequence[Literal["triton", "cuda"]] = ()
) -> Iterator[tuple[str, str, nn.Module | None]]:
    """(provider, method, model) of everyone; no model where the provider's library is not there.

    Ours comes once as it chooses itself, and once for each backend that is stood in for.
    """

    def linears() -> list[nn.Linear]:
        torch.manual_seed(0)
        made = [nn.Linear(case.width, case.width, device=device) for _ in range(case.layers)]
        return [linear.requires_grad_(False) for linear in made]

    yield FROZEN, "", nn.Sequential(*linears())
    yield FUNCTION, str(LORA), nn.Sequential(*(_HandWrittenLoRA(linear, case.r) for linear in linears()))
    yield PEFT, str(LORA), _peft(nn.Sequential(*linears()), case.r) if importlib.util.find_spec("peft") else None
    backends: list[Literal["auto", "torch", "triton", "cuda"]] = ["auto", *stubbed]
    for backend in backends:
        for method in METHODS:
            config = ResLoRAConfig(
                r=case.r, lora_alpha=SCALING * case.r, shortcut=method.shortcut, pre_num=method.pre_num,
                lora_dropout=0.0, backend=backend,
            )  # fmt: skip
            layers = [ResLoRALinear.from_linear(linear, config) for linear in linears()]
            stack = nn.Sequential(*layers)
            link(layers, root=stack)
            yield OURS if backend == "auto" else f"{OURS}, {backend} without launches", str(method), stack


def _peft(stack: nn.Sequential, r: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    names = [str(n) for n in range(len(stack))]
    adapted: Any = get_peft_model(stack, LoraConfig(r=r, lora_alpha=int(SCALING) * r, target_modules=names))
    inner: nn.Module = adapted.base_model.model
    return inner


def run_host(bench: Bench, case: HostCase, note: Callable[[str], None] = lambda _: None) -> list[Measurement]:
    """Every provider in interleaved rounds; seconds are of all layers of the case together."""
    eager_on_cpu = bench.device.type == "cpu" and case.mode != "compiled"
    with stubs.stubbed() if eager_on_cpu else nullcontext(()) as stubbed:
        return _run_host(bench, case, note, stubbed)


def _run_host(
    bench: Bench, case: HostCase, note: Callable[[str], None], stubbed: Sequence[Literal["triton", "cuda"]]
) -> list[Measurement]:
    if case.mode == "compiled":
        torch.compiler.reset()
    rows: list[Measurement] = []
    models: list[nn.Module | None] = []
    for provider, method, model in subjects(case, bench.device, stubbed):
        status, reason = (SKIPPED, "peft is not installed") if model is None else (TIMED, None)
        rows.append(Measurement("host", str(case), provider, method, status, reason, shape=asdict(case)))
        models.append(model)
    plan = timing.Plan(**(asdict(bench.plan) | {"most": 50 * bench.plan.most, "warmup": 10}))
    samples = time_rows(
        bench, rows, models, lambda name, model, _: _subject(case, name, model, bench.device), plan, note
    )
    for row in rows:
        own = samples.get(_name(row))
        if own is not None and own.failure is None:
            row.least = {phase: min(own.of(phase)) for phase in timing.PHASES}
    if case.mode == "compiled":
        torch.compiler.reset()
    return rows


def time_rows(
    bench: Bench,
    rows: Sequence[Measurement],
    models: Sequence[nn.Module | None],
    subject: Callable[[str, nn.Module, Measurement], timing.Subject],
    plan: timing.Plan,
    note: Callable[[str], None],
) -> dict[str, timing.Samples]:
    """Fill the rows of one case, the frozen one among them, from rounds in which all models run in turn."""
    running: list[timing.Subject] = []
    for row, model in zip(rows, models, strict=True):
        if model is None:
            continue
        note(f"preparing {_name(row)}")
        try:
            running.append(subject(_name(row), model, row))
        except Exception as error:  # a provider's failure is a finding about it, not the end of the run
            row.status, row.reason = FAILED, one_line(error)
            check_alive(bench.device)
    note(f"timing {len(running)} side by side")
    samples = timing.measure(running, bench.clock, plan, lambda: check_alive(bench.device), bench.deadline)
    for row in rows:
        own = samples.get(_name(row))
        if own is not None and own.failure is not None:
            row.status, row.reason = FAILED, own.failure
        elif own is not None:
            fill(row, own, samples[FROZEN], timing.Samples())
    return samples


def _name(row: Measurement) -> str:
    return f"{row.provider} {row.method}".strip()


def _subject(case: HostCase, name: str, model: nn.Module, device: torch.device) -> timing.Subject:
    x = torch.randn(case.m, case.width, device=device, requires_grad=case.mode != "no grad")
    dy = torch.randn(case.m, case.width, device=device)
    called: Callable[..., Any] = model
    if case.mode == "compiled":
        called = torch.compile(model, dynamic=False)
    leaves = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]

    def without(index: int) -> Tensor:
        with torch.no_grad():
            result: Tensor = called(x)
        return result

    def forward(index: int) -> Tensor:
        result: Tensor = called(x)
        return result

    def backward(index: int, y: Tensor) -> None:
        y.backward(dy)  # type: ignore[no-untyped-call]
        for leaf in leaves:
            leaf.grad = None

    if case.mode == "no grad":
        without(0)
        return timing.Subject(name, without)
    backward(0, forward(0))
    return timing.Subject(name, forward, backward)

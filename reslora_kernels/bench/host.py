"""What a layer call costs beside its arithmetic: on the host, in layers so small that little else is timed; experts.

A stack of equal linears is called as a model is, through ``nn.Module``, without gradients, in training, and compiled.
On a CPU the backends for GPUs are there too, eager, with launches counted instead of made: see ``backends.stubs``.
Beside PEFT stands the plainest ``autograd.Function`` that one would write by hand for LoRA: three products forward,
five backward, no option at all.

Adapted experts stand beside PEFT's ``target_parameters``, which makes every W + s B A anew for each forward: one module
of experts as Transformers has it (that of Qwen3-MoE), on tokens whose experts are drawn evenly, forward and backward.
For "block" a second one of the same sizes stands before it in the chain, and only the last is timed.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from reslora_kernels.adapt.apply import apply_reslora
from reslora_kernels.backends import stubs
from reslora_kernels.bench import timing
from reslora_kernels.bench.cases import LORA, Method
from reslora_kernels.bench.providers import SCALING, HandWritten
from reslora_kernels.bench.results import FAILED, SKIPPED, TIMED, Measurement
from reslora_kernels.bench.suite import Bench, fill
from reslora_kernels.bench.timing import check_alive, one_line
from reslora_kernels.bench.workload import peak_bytes
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


def _alone(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The model behind code of its own: else a call would go through the guards of all models compiled beside it."""

    def call(x: Tensor) -> Tensor:
        y: Tensor = model(x)
        return y

    call.__code__ = call.__code__.replace()
    return call


def _subject(case: HostCase, name: str, model: nn.Module, device: torch.device) -> timing.Subject:
    x = torch.randn(case.m, case.width, device=device, requires_grad=case.mode != "no grad")
    dy = torch.randn(case.m, case.width, device=device)
    called: Callable[..., Any] = model
    if case.mode == "compiled":
        called = torch.compile(_alone(model), dynamic=False)
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


PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
EXPERTS_METHODS = (LORA, Method("block", 1))


@dataclass(frozen=True)
class ExpertsCase:
    """``experts`` experts of sizes ``hidden`` and ``inner``, of which each of ``m`` tokens goes to ``top_k``."""

    m: int
    run: str = "grouped_mm"
    experts: int = 64
    hidden: int = 512
    inner: int = 256
    top_k: int = 4
    r: int = 8

    def __str__(self) -> str:
        return f"M={self.m} top {self.top_k} of {self.experts} {self.hidden}->{self.inner} r={self.r}, {self.run}"


def experts(gpu: bool, quick: bool) -> list[ExpertsCase]:
    """One module of 64 experts, forward and backward, beside PEFT's target_parameters: time and peak memory."""
    if quick:
        return [ExpertsCase(32, experts=8, hidden=64, inner=32)]
    sizes = {"hidden": 2048, "inner": 768} if gpu else {}
    return [ExpertsCase(m, run, **sizes) for run in ("grouped_mm", "eager") for m in (64, 256)]


EXPERTS_SETS: dict[str, Callable[[bool, bool], list[ExpertsCase]]] = {"experts": experts}


class _Blocks(nn.Module):
    """Two blocks with experts, of which the last one runs."""

    def __init__(self, made: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"experts": made()}) for _ in range(2))

    def forward(self, *arguments: Tensor) -> Tensor:
        last: Any = self.layers[1]
        y: Tensor = last["experts"](*arguments)
        return y


def blocks_of(case: ExpertsCase, device: torch.device) -> _Blocks:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=case.hidden, moe_intermediate_size=case.inner, num_experts=case.experts,
        num_experts_per_tok=case.top_k,
    )  # fmt: skip
    config._experts_implementation = case.run
    torch.manual_seed(0)
    made: Any = Qwen3MoeExperts
    model = _Blocks(lambda: made(config)).to(device)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model.requires_grad_(False)


def experts_models(case: ExpertsCase, device: torch.device) -> Iterator[tuple[str, str, nn.Module | None]]:
    """(provider, method, model) of everyone; no model where the provider's library is not there."""
    blocks = blocks_of(case, device)
    yield FROZEN, "", blocks
    with_peft = importlib.util.find_spec("peft") is not None
    yield PEFT, str(LORA), _peft_experts(copy.deepcopy(blocks), case.r) if with_peft else None
    for method in EXPERTS_METHODS:
        config = ResLoRAConfig(
            r=case.r, lora_alpha=2 * case.r, target_modules=[], target_parameters=PARAMETERS,
            shortcut=method.shortcut, pre_num=method.pre_num,
        )  # fmt: skip
        yield OURS, str(method), apply_reslora(copy.deepcopy(blocks), config)


def _peft_experts(blocks: nn.Module, r: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=[], target_parameters=PARAMETERS)
    adapted: Any = get_peft_model(blocks, config)
    inner: nn.Module = adapted.base_model.model
    return inner


def run_experts(bench: Bench, case: ExpertsCase, note: Callable[[str], None] = lambda _: None) -> list[Measurement]:
    """Every provider in interleaved rounds; the peak is that of one forward and backward above what there was."""

    def subject(name: str, model: nn.Module, row: Measurement) -> timing.Subject:
        timed = _experts_subject(case, name, model, bench.device)
        assert timed.backward is not None
        backward = timed.backward
        row.peak_bytes = peak_bytes(lambda: backward(0, timed.forward(0)), bench.device)
        return timed

    rows, models = [], []
    for provider, method, model in experts_models(case, bench.device):
        reason = "peft is not installed" if model is None else None
        rows.append(
            Measurement("experts", str(case), provider, method, SKIPPED if reason else TIMED, reason, asdict(case))
        )
        models.append(model)
    time_rows(bench, rows, models, subject, bench.plan, note)
    return rows


def _experts_subject(case: ExpertsCase, name: str, model: nn.Module, device: torch.device) -> timing.Subject:
    generator = torch.Generator().manual_seed(case.m)
    x, dy = (torch.randn(case.m, case.hidden, generator=generator).to(device) for _ in range(2))
    scores = torch.rand(case.m, case.experts, generator=generator).to(device)
    weights, chosen = scores.topk(case.top_k)
    x.requires_grad_()
    leaves = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]

    def forward(index: int) -> Tensor:
        y: Tensor = model(x, chosen, weights)
        return y

    def backward(index: int, y: Tensor) -> None:
        y.backward(dy)  # type: ignore[no-untyped-call]
        for leaf in leaves:
            leaf.grad = None

    backward(0, forward(0))
    return timing.Subject(name, forward, backward)

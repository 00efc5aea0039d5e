"""Adapted experts beside PEFT's ``target_parameters``, which makes every W + s B A anew for each forward.

One module of experts as Transformers has it (that of Qwen3-MoE), on tokens whose experts are drawn evenly, forward and
backward. For "block" a second one of the same sizes stands before it in the chain, and only the last is timed.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reslora_kernels.adapt.apply import apply_reslora
from reslora_kernels.bench import timing
from reslora_kernels.bench.cases import LORA, Method
from reslora_kernels.bench.host import FROZEN, OURS, PEFT, time_rows
from reslora_kernels.bench.results import SKIPPED, TIMED, Measurement
from reslora_kernels.bench.suite import Bench
from reslora_kernels.bench.workload import peak_bytes
from reslora_kernels.config import ResLoRAConfig

PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
METHODS = (LORA, Method("block", 1))


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


def subjects(case: ExpertsCase, device: torch.device) -> Iterator[tuple[str, str, nn.Module | None]]:
    """(provider, method, model) of everyone; no model where the provider's library is not there."""
    blocks = blocks_of(case, device)
    yield FROZEN, "", blocks
    with_peft = importlib.util.find_spec("peft") is not None
    yield PEFT, str(LORA), _peft(copy.deepcopy(blocks), case.r) if with_peft else None
    for method in METHODS:
        config = ResLoRAConfig(
            r=case.r, lora_alpha=2 * case.r, target_modules=[], target_parameters=PARAMETERS,
            shortcut=method.shortcut, pre_num=method.pre_num,
        )  # fmt: skip
        yield OURS, str(method), apply_reslora(copy.deepcopy(blocks), config)


def _peft(blocks: nn.Module, r: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=[], target_parameters=PARAMETERS)
    adapted: Any = get_peft_model(blocks, config)
    inner: nn.Module = adapted.base_model.model
    return inner


def run_experts(bench: Bench, case: ExpertsCase, note: Callable[[str], None] = lambda _: None) -> list[Measurement]:
    """Every provider in interleaved rounds; the peak is that of one forward and backward above what there was."""

    def subject(name: str, model: nn.Module, row: Measurement) -> timing.Subject:
        timed = _subject(case, name, model, bench.device)
        assert timed.backward is not None
        backward = timed.backward
        row.peak_bytes = peak_bytes(lambda: backward(0, timed.forward(0)), bench.device)
        return timed

    rows, models = [], []
    for provider, method, model in subjects(case, bench.device):
        reason = "peft is not installed" if model is None else None
        rows.append(
            Measurement("experts", str(case), provider, method, SKIPPED if reason else TIMED, reason, asdict(case))
        )
        models.append(model)
    time_rows(bench, rows, models, subject, bench.plan, note)
    return rows


def _subject(case: ExpertsCase, name: str, model: nn.Module, device: torch.device) -> timing.Subject:
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

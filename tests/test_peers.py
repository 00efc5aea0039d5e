"""Other ways to compute LoRA give the same results, and libraries are called by the names that they have."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from benchmarks.gpu_check.__main__ import model_tables
from reslora_kernels.bench import model_cases, providers
from reslora_kernels.bench.cases import LORA, SETS, Case
from reslora_kernels.bench.providers import PROVIDERS
from reslora_kernels.bench.results import TIMED, ModelMeasurement
from reslora_kernels.bench.workload import Pass, draw

CPU = torch.device("cpu")
CASE = Case(6, 16, 24, 4, "float32", layers=2, methods=(LORA,), compiled=(LORA,))


def results(name: str, case: Case = CASE) -> list[Tensor]:
    """Of a provider: all y, dx, dA and dB."""
    workload = draw(case, CPU)
    found = Pass(PROVIDERS[name].build(workload, LORA), workload).results()
    return [tensor for tensors in found.values() for tensor in tensors]


@pytest.mark.parametrize(
    "name", ["hand-written", "addmm", "peft", pytest.param("plain-compiled", marks=pytest.mark.slow)]
)
def test_peers_on_a_cpu_compute_the_plain_layers(name: str) -> None:
    for found, expected in zip(results(name), results("plain"), strict=True):
        torch.testing.assert_close(found, expected)


def test_hand_written_has_no_dropout_and_addmm_draws_its_own() -> None:
    dropping = CASE.replace(p=0.5)
    assert PROVIDERS["hand-written"].missing(dropping, LORA, CPU) == "it has no dropout"
    assert PROVIDERS["addmm"].missing(dropping, LORA, CPU) is None
    assert not torch.equal(results("addmm", dropping)[0], results("addmm", dropping)[0])


class LoRA_W(torch.autograd.Function):
    """Takes what Unsloth's of 2026.10.9 takes: X [batch, tokens, K], and S A and B as they are trained."""

    @staticmethod
    def forward(
        ctx: Any, X: Tensor, W: Tensor, W_quant: None, A: Tensor, B: Tensor, S: float,
        dropout_p: float | None = None, bias: None = None,
    ) -> Tensor:  # fmt: skip
        assert X.dim() == 3 and W_quant is None and bias is None and dropout_p in (None, 0.5)
        ctx.save_for_backward(X, W, A, B)
        ctx.S = S
        return X @ W.T + S * (X @ A.T @ B.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        X, W, A, B = ctx.saved_tensors
        dA, dB = ctx.S * (dY @ B)[0].T @ X[0], ctx.S * dY[0].T @ (X @ A.T)[0]
        return dY @ W + ctx.S * (dY @ B @ A), None, None, dA, dB, None, None, None


class OlderLoRA_W(LoRA_W):
    """Takes what it took until August 2026, at commit 015bdef0d94a."""

    @staticmethod
    def forward(ctx: Any, X: Tensor, W: Tensor, W_quant: None, A: Tensor, B: Tensor, S: float) -> Tensor:
        return LoRA_W.forward(ctx, X, W, W_quant, A, B, S)


def fused_linear_lora(
    x: Tensor, linear_w: Tensor, lora_a: Tensor, lora_b: Tensor, alpha: float,
    seed: int | None = None, dropout_p: float = 0.0, linear_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Takes what LoRAFusion's takes at commit c48d7fdb1b54; alpha is s itself."""
    assert x.dim() == 3 and seed is not None and dropout_p > 0 and linear_bias is None
    return x @ linear_w.T + alpha * (x @ lora_a.T @ lora_b.T)


@pytest.mark.parametrize("version", [LoRA_W, OlderLoRA_W])
def test_unsloth_is_called_as_it_is_written(version: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "_unsloth", lambda: SimpleNamespace(LoRA_W=version))
    monkeypatch.setattr(providers, "_gpu_library_missing", lambda *_: None)
    for found, expected in zip(results("unsloth"), results("plain"), strict=True):
        torch.testing.assert_close(found, expected)
    dropping = CASE.replace(p=0.5)
    reason = PROVIDERS["unsloth"].missing(dropping, LORA, CPU)
    assert reason == (None if version is LoRA_W else "this version of it has no dropout")
    if reason is None:
        results("unsloth", dropping)


def test_lorafusion_is_called_as_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "_lorafusion", lambda: SimpleNamespace(fused_linear_lora=fused_linear_lora))
    almost_none = CASE.replace(p=PROVIDERS["lorafusion"].least_p)
    for found, expected in zip(results("lorafusion", almost_none), results("plain"), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["unsloth", "lorafusion"])
def test_a_library_that_is_not_there_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, gpu = SETS["peers"](True)[1], torch.device("cuda")
    assert case.p > 0 and LORA in case.compiled
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda name: None)
    assert PROVIDERS[name].missing(case, LORA, gpu) == f"{name} is not installed"
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda name: object())

    def broken() -> None:
        raise ImportError("no kernel\nimage")

    monkeypatch.setattr(providers, f"_{name}", broken)
    assert PROVIDERS[name].missing(case, LORA, CPU) == f"{name} needs a GPU"
    assert PROVIDERS[name].missing(case, LORA, gpu) == f"{name} cannot be imported: ImportError: no kernel"


def test_what_others_publish_stands_under_the_models(capsys: pytest.CaptureFixture[str]) -> None:
    """10,000 tokens a second through 4 layers of 218 million weights are 34.9 TFLOP/s in their products."""
    from dataclasses import asdict

    from rich.console import Console

    (llama, roberta, _) = model_cases.models(True, False)
    rows = [
        ModelMeasurement(str(case), "", 0, "ours", "lora", TIMED, settings=asdict(case), seconds=[1.0] * 3,
                         per_second=10000.0)
        for case in (llama, roberta)
    ]  # fmt: skip
    assert model_cases.frozen_products(asdict(llama)) == 4.0 * 4 * 218_103_808
    console = Console(width=200)
    for table in model_tables({"models": [asdict(row) for row in rows]}):
        console.print(table)
    first, second = (" ".join(part.split()) for part in capsys.readouterr().out.split(str(roberta)))
    assert " 35 " in first and "12,473 tokens/s, 402 TFLOP/s" in first
    assert "12,473" not in second

"""Pipelines whose chains go on from stage to stage equal one process; sequences cut over processes do.

All scenarios run in one group of four processes; each test reads what its scenario found.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ..processes import Report, run_command, run_ranks
from .residual import SHORTCUTS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed"),
]

EXACT = [
    *(
        f"{kind} {shortcut}"
        for kind in ("gpipe", "1f1b", "interleaved", "zero bubble", "in a V", "on meta", "context")
        for shortcut in SHORTCUTS
    ),
    *(f"{kind} {shortcut}" for kind in ("recomputed", "passed through") for shortcut in SHORTCUTS[1:]),
    "gates middle",
    *(f"all earlier blocks {shortcut}" for shortcut in ("block", "middle")),
    "start",
    "dora",
    "evaluated",
]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[Report]:
    return run_ranks("tests.distributed.stages", tmp_path_factory.mktemp("processes"), count=4)


def found(reports: list[Report], name: str) -> list[dict[str, Any]]:
    """What each process found."""
    for report in reports:
        assert "traceback" not in report[name], report[name]["traceback"]
    return [report[name] for report in reports]


@pytest.mark.parametrize("name", EXACT)
def test_equals_one_process(reports: list[Report], name: str) -> None:
    """Losses and adapters after three AdamW steps, each of four microbatches."""
    for result in found(reports, name):
        assert result["difference"] < 1e-12
        assert not result.get("left"), "gradients are left on what other processes train"


def test_gathered_adapters_are_saved_by_one_process(reports: list[Report]) -> None:
    """NVIDIA-NeMo/Automodel#3096: one stage's layers were saved as if they were all."""
    for result in found(reports, "saved"):
        assert result["equal"]
        assert "pipeline.gather()" in result["early"]["message"]


def test_over_a_border_go_r_values_of_a_token(reports: list[Report]) -> None:
    """For each of two chains, microbatches of 2 times 5 tokens and r = 3; ``middle`` sends two blocks'."""
    one = [2, 5, 3]
    for result in found(reports, "sizes"):
        assert result["none"] == [[], []]
        assert result["block"] == [[], []]
        assert result["input"] == [[one] * 2, [one] * 2]
        assert result["middle"] == [[one] * 2, [one] * 4]


@pytest.mark.parametrize(
    ("action", "error", "message"),
    [
        ("alone", "RuntimeError", "ran outside a forward pass"),
        ("alone, block", "RuntimeError", "a part of a model is trained alone"),
        ("averaged", "RuntimeError", "in DDP"),
        ("outside", "RuntimeError", "with pipeline.step()"),
        ("left out", "ValueError", "'blocks.2.up' is in none"),
        ("backwards", "ValueError", "a pipeline has no way back"),
        ("merged", "ValueError", "unmerge_reslora"),
        ("placement", "ValueError", "placement must name one of 4 processes for each of 2 parts"),
        ("twice", "RuntimeError", "must run once in each forward"),
    ],
)
def test_refused_with_the_alternative(reports: list[Report], action: str, error: str, message: str) -> None:
    for result in found(reports, "refusals"):
        assert result[action]["error"] == error, result[action]
        assert message in result[action]["message"]


def test_pytorchs_own_context_parallel_has_no_attention_on_the_cpu(reports: list[Report]) -> None:
    """Why ``context`` gathers keys and values by itself; when this fails, test PyTorch's instead."""
    for result in found(reports, "ring"):
        assert "flash_attention_for_cpu" in result["message"]


def test_killed_in_a_save_nothing_is_lost(tmp_path: Path) -> None:
    """Whichever process dies at whatever file: the save before loads, and a save with its .metadata is whole."""
    run_command([sys.executable, "-m", "tests.distributed.killed_save", str(tmp_path)])
    report = json.loads((tmp_path / "report.json").read_text())
    assert all(found["first"] for found in report)
    assert all(found["second"] for found in report if found["whole"])
    assert not any(found["whole"] for found in report if found["killed"] and found["victim"] == 0)
    for victim in (0, 1):
        own = [found for found in report if found["victim"] == victim]
        assert len(own) > 2, "it was hardly killed"
        assert own[-1]["second"], "the last one ended undisturbed"

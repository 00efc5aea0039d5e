"""Tensor parallel plans: two processes equal one, and so do two times two with FSDP2 across them; quantised bases.

All scenarios run in one group of four processes; each test reads what its scenario found.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .distributed.residual import SHORTCUTS
from .processes import Report, run_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed"),
]

EXACT = [
    *(f"{kind} {shortcut}" for kind in ("tp", "tp sequence", "tp x fsdp", "merged") for shortcut in SHORTCUTS),
    "tp biases",
    "tp dora",
    "tp dora block",
    "tp start",
    *(f"tp recomputed {shortcut}" for shortcut in SHORTCUTS[1:]),
    "tp restarted",
    "tp x fsdp dora",
    "merged dora",
    *(f"nf4 {kind} {shortcut}" for kind in ("ddp", "fsdp") for shortcut in SHORTCUTS),
    "nf4 in bfloat16 fsdp",
    "torchao ddp",
    "offloaded",
]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[Report]:
    return run_ranks("tests.distributed.tensor_parallel", tmp_path_factory.mktemp("processes"), count=4)


def found(reports: list[Report], name: str) -> list[dict[str, Any]]:
    """What each process found."""
    for report in reports:
        assert "traceback" not in report[name], report[name]["traceback"]
    return [report[name] for report in reports]


@pytest.mark.parametrize("name", EXACT)
def test_equals_one_process(reports: list[Report], name: str) -> None:
    for result in found(reports, name):
        distances = {what: value for what, value in result.items() if isinstance(value, float) and what != "seconds"}
        exported = distances.pop("exported", 0.0)  # of least squares A, which small eigenvalues of G let wander
        assert max(distances.values()) < 1e-12, distances
        assert exported < 1e-8
        assert all(value for value in result.values() if isinstance(value, bool)), result


def test_nothing_is_sent_for_a_shortcut(reports: list[Report]) -> None:
    """A forward speaks as often as the frozen base's, a backward once more for each layer: A or B is whole in each."""
    for result in found(reports, "communication"):
        for shortcut in SHORTCUTS:
            assert result[shortcut]["forward"] == result["base"]["forward"]
            assert result[shortcut]["backward"] == result["base"]["backward"] + result["layers"]


def test_adapters_go_from_any_layout_to_any_other(reports: list[Report]) -> None:
    for result in found(reports, "saved"):
        assert all(result["equal"].values()), result["equal"]
        assert result["files"] == 1, "two layouts wrote different files"
        assert result["outputs"] < 1e-12


def test_sharded_checkpoints_go_on_elsewhere(reports: list[Report]) -> None:
    """Adapters and AdamW's moments, by torch.distributed.checkpoint in the background, from four processes."""
    for result in found(reports, "checkpointed"):
        assert [result[layout] for layout in ("one", "two", "two by two")] == [True, True, True]


def test_dropout_is_one_function_of_its_parameters(reports: list[Report]) -> None:
    for result in found(reports, "dropped"):
        assert result["alike"]
        assert result["slope"] < 1e-6
        assert result["drops"] > 1


@pytest.mark.parametrize("name", [*(f"auto {shortcut}" for shortcut in SHORTCUTS), "own none"])
def test_plans_of_transformers(reports: list[Report], name: str) -> None:
    """LLaMA's norms compute in float32, so that its logits differ by less than a float64 can show, or by a step."""
    for results in found(reports, "transformers"):
        result = results[name]
        assert result["kinds"] == ["TensorParallelResLoRALinear"]
        assert max(result["loss"], result["logits"], result["gradients"]) < 1e-6


def test_plan_of_transformers_goes_on_after_unloading(reports: list[Report]) -> None:
    assert all(result["unloaded"]["logits"] < 1e-6 for result in found(reports, "transformers"))


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("adapted first", "call parallelize_module"),
        ("half a chain", "'blocks.1.up' is whole"),
        ("no mesh", "give mesh="),
        ("sequential", "load and merge it in one process"),
        ("switched", "cannot be switched"),
        ("torchao", "quantised by torchao and cannot be cut"),
        ("cast", "bnb_4bit_quant_storage=torch.float16"),
        ("sharded", "load and merge it in one process"),
        ("unchanged", ""),
    ],
)
def test_refused_with_the_alternative(reports: list[Report], action: str, message: str) -> None:
    for result in found(reports, "refusals"):
        assert result[action]["error"] == "ValueError"
        assert message in result[action]["message"]

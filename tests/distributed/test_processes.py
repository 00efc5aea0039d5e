"""Two processes equal one, under torchrun and accelerate launch too; so do tensor parallel plans, on two times two.

All scenarios of a kind run in one group of processes; each test reads what its scenario found.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ..processes import REPOSITORY, Report, environment, run, run_command, run_ranks
from .launched import SEVERAL_PROCESSES
from .residual import FORMS, GATED, SHORTCUTS, adapters, residual

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed"),
]


EXACT = [
    *(f"{kind} {form} {shortcut}" for kind in ("ddp", "fsdp") for form in FORMS for shortcut in SHORTCUTS),
    "fsdp root resharded too",
    "fsdp trained biases",
    "fsdp hybrid",
    "fsdp on meta",
    *(f"fsdp recomputed {where} {shortcut}" for where in ("inside", "outside") for shortcut in SHORTCUTS[1:]),
    "fsdp calibrated",
    "fsdp exported",
    *(f"{kind} gates {shortcut}" for kind in ("ddp", "fsdp") for shortcut in GATED),
    *(f"recipe {kind} {shortcut}" for kind in ("ignored", "bank") for shortcut in SHORTCUTS),
    *(f"pipeline {shortcut}" for shortcut in SHORTCUTS),
    *(f"nf4 {kind} {shortcut}" for kind in ("ddp", "fsdp") for shortcut in SHORTCUTS),
    "nf4 in bfloat16 fsdp",
    "torchao ddp",
    "offloaded",
    *(KINDS := [f"kinds {kind} {shortcut}" for kind in ("ddp", "fsdp") for shortcut in ("none", "block")]),
]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[Report]:
    return run_ranks("tests.distributed.worker", tmp_path_factory.mktemp("processes"))


def found(reports: list[Report], name: str) -> list[dict[str, Any]]:
    """What each process found."""
    results = [report[name] for report in reports]
    for result in results:
        if "whose fully_shard cuts integers" in result.get("traceback", ""):
            pytest.skip("this PyTorch cuts no integers")
        assert "traceback" not in result, result["traceback"]
    return results


def test_all_processes_end(reports: list[Report]) -> None:
    assert not any(report.trouble for report in reports), reports[0].trouble


@pytest.mark.parametrize("name", EXACT)
def test_equals_one_process(reports: list[Report], name: str) -> None:
    """Losses and adapters after three AdamW steps, in float64."""
    assert all(result["difference"] < 1e-12 for result in found(reports, name))


@pytest.mark.parametrize("name", ["ddp saved", "fsdp saved"])
def test_adapters_are_saved_whole_under_their_names(reports: list[Report], name: str) -> None:
    for result in found(reports, name):
        assert result["names"] == sorted(adapters(residual("block")))
        assert result["equal"]
        assert result.get("full_state_dict", True)
        assert result.get("outputs", 0.0) < 1e-12


@pytest.mark.parametrize("name", KINDS)
def test_other_layers_are_saved_whole(reports: list[Report], name: str) -> None:
    """Embedding, attention with its output, convolution and experts."""
    for result in found(reports, name):
        assert result["equal"]
        assert result["kinds"] == 5


@pytest.mark.parametrize("name", ["ddp restarted", "ddp started", "ddp adapted too late"])
def test_processes_keep_one_model(reports: list[Report], name: str) -> None:
    """Where they draw adapters or start them from data, and after a change that is refused."""
    assert all(not any(result["apart"]) for result in found(reports, name))


@pytest.mark.parametrize(
    ("name", "message", "count"),
    [
        ("ddp adapted too late", "after DistributedDataParallel (or accelerate's prepare)", 4),
        ("fsdp1", "FullyShardedDataParallel (FSDP1) is not supported", 4),
        ("traced block", "let the chains go on with pipeline_reslora", 1),
    ],
    ids=["ddp", "fsdp1", "traced"],
)
def test_what_would_train_another_model_is_refused(reports: list[Report], name: str, message: str, count: int) -> None:
    for result in found(reports, name):
        assert len(result["said"]) == count and all(message in said for said in result["said"]), result["said"]


def test_all_processes_may_save_to_one_folder(reports: list[Report]) -> None:
    assert all(result["equal"] for result in found(reports, "ddp saved by all"))


@pytest.mark.parametrize("shortcut", ["none", "middle"])
def test_a_model_cut_by_tracing_equals_one_process(reports: list[Report], shortcut: str) -> None:
    assert all(result["difference"] < 1e-12 for result in found(reports, f"traced {shortcut}"))


def test_one_replica_of_several_saves(reports: list[Report]) -> None:
    assert all(result["equal"] for result in found(reports, "fsdp hybrid"))


def test_merged_then_sharded_exports_the_same_files(reports: list[Report]) -> None:
    assert all(result["equal"] for result in found(reports, "fsdp exported"))


def test_blocks_are_resharded_and_adapters_stay_whole(reports: list[Report]) -> None:
    for result in found(reports, "fsdp resharding"):
        result.pop("seconds")
        assert all(result.values()), result


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_mixed_precision(reports: list[Report], shortcut: str) -> None:
    """bf16 has 8 bits; what differs from one process is the order of sums, over three steps."""
    for result in found(reports, f"fsdp mixed precision {shortcut}"):
        assert result["difference"] < 0.05
        assert result["compute"] == ["torch.bfloat16"]
        assert result["kept"] == ["torch.float32"]
        assert result["equal"], "the adapters on disk are not the float32 ones"


def test_failing_writer_leaves_nobody_waiting(reports: list[Report]) -> None:
    errors = [result["error"] for result in found(reports, "fsdp writer fails")]
    assert errors == ["NotADirectoryError", "RuntimeError"]


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("merge", "save_adapter"),
        ("export", "save_adapter"),
        ("shard twice", "sharded again"),
        ("adapt", "call apply_reslora first"),
        ("load", "load the adapter first"),
        ("merged", "unmerge_reslora"),
        ("FSDP1", "use shard_reslora"),
    ],
)
def test_refused_with_the_alternative(reports: list[Report], action: str, message: str) -> None:
    for result in found(reports, "fsdp refusals"):
        assert result[action]["error"] == "ValueError"
        assert message in result[action]["message"]


@pytest.mark.parametrize("shortcut", ["input", "block"])
def test_adapters_in_their_blocks_group_fail_loudly(reports: list[Report], shortcut: str) -> None:
    """Why shard_reslora exists: the usual recipe."""
    for result in found(reports, f"recipe naive {shortcut}"):
        assert result["error"] == "RuntimeError"
        assert "mixed torch.Tensor and DTensor" in result["message"]


def test_gathering_up_front_is_silently_wrong(reports: list[Report]) -> None:
    """The gradient that a later block has for the next layer's A arrives after that block's reduction."""
    for shortcut in ("none", "block", "middle"):
        assert all(result["difference"] < 1e-12 for result in found(reports, f"recipe gathered up front {shortcut}"))
    assert all(result["difference"] > 1e-2 for result in found(reports, "recipe gathered up front input"))


def test_adapters_that_fsdp2_ignores_are_left_out_of_the_rest_too(reports: list[Report]) -> None:
    """Exact, but a mixed precision policy passes them over, and clipping takes them only alone."""
    for result in found(reports, "recipe ignored_costs"):
        assert result["dtypes"] == ["torch.bfloat16", "torch.float32"]
        assert "mixed torch.Tensor and DTensor" in result["clipping"]["message"]


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_adapters_in_a_bank_lose_their_names(reports: list[Report], shortcut: str) -> None:
    for result in found(reports, f"recipe bank {shortcut}"):
        assert result["adapter_keys"] == []
        assert "Unexpected key" in result["load"]["message"]


@pytest.mark.parametrize("shortcut", ["input", "block"])
def test_trainer_saves_whole_adapters(reports: list[Report], shortcut: str) -> None:
    names = [f"model.layers.{i}.self_attn.{role}.{kind}" for i in range(3) for role in "qv" for kind in "AB"]
    for result in found(reports, f"trainer saved {shortcut}"):
        assert result["names"] == [name.replace("q.", "q_proj.lora_").replace("v.", "v_proj.lora_") for name in names]
        assert result["wrapped"] == "DistributedDataParallel"
        assert result["ddp"]
        assert result["fsdp"]


@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_trainer_evaluates_merged(reports: list[Report], shortcut: str) -> None:
    for result in found(reports, f"trainer merged {shortcut}"):
        assert result["restored"], "the frozen weights are not those from before"
        assert result["trained_alike"], "training was disturbed"
        seen, unmerged = result["seen"], result["unmerged"]
        assert seen[0] == unmerged[0]
        assert all(a != b for a, b in zip(seen[1:], unmerged[1:], strict=True))
        assert seen[-1] == result["hand"]


EXACT_IN_PARTS = [
    *(f"{kind} {shortcut}" for kind in ("tp", "tp sequence", "tp x fsdp", "merged") for shortcut in SHORTCUTS),
    "tp biases",
    "tp dora",
    "tp dora block",
    "tp start",
    *(f"tp recomputed {shortcut}" for shortcut in SHORTCUTS[1:]),
    *(f"{kind} gates {shortcut}" for kind in ("tp", "merged") for shortcut in GATED),
    "tp x fsdp gates",
    "tp restarted",
    "tp x fsdp dora",
    "merged dora",
]


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[Report]:
    return run_ranks("tests.distributed.tensor_parallel", tmp_path_factory.mktemp("processes"), count=4)


@pytest.mark.parametrize("name", EXACT_IN_PARTS)
def test_tensor_parallel_equals_one_process(four: list[Report], name: str) -> None:
    for result in found(four, name):
        distances = {what: value for what, value in result.items() if isinstance(value, float) and what != "seconds"}
        exported = distances.pop("exported", 0.0)  # of least squares A, which small eigenvalues of G let wander
        assert max(distances.values()) < 1e-12, distances
        assert exported < 1e-8
        assert all(value for value in result.values() if isinstance(value, bool)), result


def test_nothing_is_sent_for_a_shortcut(four: list[Report]) -> None:
    """A forward speaks as often as the frozen base's, a backward once more for each layer: A or B is whole in each."""
    for result in found(four, "communication"):
        for shortcut in SHORTCUTS:
            assert result[shortcut]["forward"] == result["base"]["forward"]
            assert result[shortcut]["backward"] == result["base"]["backward"] + result["layers"]


def test_adapters_go_from_any_layout_to_any_other(four: list[Report]) -> None:
    for result in found(four, "saved"):
        assert all(result["equal"].values()), result["equal"]
        assert result["files"] == 1, "two layouts wrote different files"
        assert result["outputs"] < 1e-12


def test_sharded_checkpoints_go_on_elsewhere(four: list[Report]) -> None:
    """Adapters and AdamW's moments, by torch.distributed.checkpoint in the background, from four processes."""
    for result in found(four, "checkpointed"):
        assert [result[layout] for layout in ("one", "two", "two by two")] == [True, True, True]


def test_dropout_is_one_function_of_its_parameters(four: list[Report]) -> None:
    for result in found(four, "dropped"):
        assert result["alike"]
        assert result["slope"] < 1e-6
        assert result["drops"] > 1


@pytest.mark.parametrize("name", [*(f"auto {shortcut}" for shortcut in SHORTCUTS), "own none"])
def test_plans_of_transformers(four: list[Report], name: str) -> None:
    """LLaMA's norms compute in float32, so that its logits differ by less than a float64 can show, or by a step."""
    for results in found(four, "transformers"):
        result = results[name]
        assert result["kinds"] == ["TensorParallelResLoRALinear"]
        assert max(result["loss"], result["logits"], result["gradients"]) < 1e-6


def test_plan_of_transformers_goes_on_after_unloading(four: list[Report]) -> None:
    assert all(result["unloaded"]["logits"] < 1e-6 for result in found(four, "transformers"))


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("adapted first", "call parallelize_module"),
        ("half a chain", "'blocks.1.up' is whole"),
        ("no mesh", "give mesh="),
        ("ranks", "rank_pattern"),
        ("experts", "spread by a tensor parallel plan"),
        ("sequential", "load and merge it in one process"),
        ("switched", "cannot be switched"),
        ("torchao", "quantised by torchao and cannot be cut"),
        ("cast", "bnb_4bit_quant_storage=torch.float16"),
        ("sharded", "load and merge it in one process"),
        ("unchanged", ""),
    ],
)
def test_tensor_parallel_refuses_with_the_alternative(four: list[Report], action: str, message: str) -> None:
    for result in found(four, "refusals"):
        assert result[action]["error"] == "ValueError"
        assert message in result[action]["message"]


EXACT_UNDER_ZERO = [
    *(f"zero {stage} {form} {shortcut}" for stage in (2, 3) for form in FORMS for shortcut in SHORTCUTS),
    "zero 3 dora",
    "zero 3 projections",
    "zero 3 in groups",
    "zero 3 offloaded",
    *(f"made in parts {shortcut}" for shortcut in SHORTCUTS),
    *(f"trainer {shortcut}" for shortcut in ("block", "middle")),
    "from_pretrained",
]
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")


@pytest.fixture(scope="module")
def zero(tmp_path_factory: pytest.TempPathFactory) -> list[Report]:
    return run_ranks("tests.distributed.zero", tmp_path_factory.mktemp("processes"), DS_ACCELERATOR="cpu")


@needs_deepspeed
@pytest.mark.parametrize("name", EXACT_UNDER_ZERO)
def test_deepspeed_equals_one_process(zero: list[Report], name: str) -> None:
    """In float32. huggingface/peft#2500, huggingface/peft#2450: what ZeRO-3 saved was empty, trained heads too."""
    for result in found(zero, name):
        assert result["difference"] < 1e-5
        assert result.get("equal", True), "saved is something else than trained"
        assert result.get("apart", True) and result.get("spread", True), "ZeRO-3 has spread nothing"


@needs_deepspeed
def test_zero_3_holds_no_weight_between_its_layers(zero: list[Report]) -> None:
    for result in found(zero, "gathered"):
        assert result["kept"] < result["all"] / 10


@needs_deepspeed
def test_zero_3_goes_on_from_its_own_checkpoint(zero: list[Report]) -> None:
    assert all(result["equal"] for result in found(zero, "resumed"))


@needs_deepspeed
@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("merge", "partitioned by DeepSpeed ZeRO-3"),
        ("export", "partitioned by DeepSpeed ZeRO-3"),
        ("load", "partitioned by DeepSpeed ZeRO-3"),
        ("dora", "GatheredParameters"),
        ("pissa", "GatheredParameters"),
        ("attention", "train with ZeRO-2"),
    ],
)
def test_zero_3_refuses_with_the_alternative(zero: list[Report], action: str, message: str) -> None:
    for result in found(zero, "refusals"):
        assert result[action]["error"] == "ValueError", result[action]
        assert message in result[action]["message"]


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
TORCHRUN += ["--rdzv-endpoint=127.0.0.1:0", "--rdzv-conf=timeout=900,read_timeout=900"]  # a free port, patient
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes=2"]
ACCELERATE += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]

needs_accelerate = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("accelerate", "transformers")),
    reason="needs accelerate and transformers",
)


def test_killed_rank_ends_bit_exact(tmp_path: Path) -> None:
    command = [*TORCHRUN, "--max-restarts", "3", "--monitor-interval", "0.1", "-m", "tests.distributed.launched"]
    output = run_command([*command, "elastic", str(tmp_path)])
    assert "exitcode: -9" in output
    for rank in (0, 1):
        report = json.loads((tmp_path / f"report.{rank}.json").read_text())
        assert report.pop("attempt") >= 1
        assert report == {"resumed_from": 3, "equal": True, "losses_equal": True}


@needs_accelerate
def test_accelerate_equals_one_process(tmp_path: Path) -> None:
    """LLaMA computes norms, rotations and the loss in float32, whatever its weights are."""
    run_command([*ACCELERATE, "-m", "tests.distributed.accelerated", str(tmp_path)], ACCELERATE_USE_CPU="true")
    for rank in (0, 1):
        report = json.loads((tmp_path / f"report.{rank}.json").read_text())
        for shortcut in ("input", "block"):
            ddp, fsdp = report[f"DDP {shortcut}"], report[f"FSDP2 {shortcut}"]
            assert ddp["kind"] == "DistributedDataParallel"
            assert fsdp["kind"] == "FSDPLlamaForCausalLM"
            assert ddp["difference"] < 1e-6
            assert fsdp["difference"] < 1e-6
            assert fsdp["equal"]
        assert "mixed torch.Tensor and DTensor" in report["its own wrap policy"]["message"]


@needs_deepspeed
def test_example_of_zero_3(tmp_path: Path) -> None:
    command = [*TORCHRUN, "-m", "tests.distributed.launched", "zero3_accelerate", str(tmp_path)]
    run_command(command, DS_ACCELERATOR="cpu", ACCELERATE_USE_DEEPSPEED="true")
    assert json.loads((tmp_path / "report.json").read_text()) == {"trained": True, "layers": 28}


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder with one for each of them, and what torchrun has printed."""
    folder = tmp_path_factory.mktemp("examples")
    restart = ["--max-restarts", "2"]  # torchrun's own store now and then loses a process that ends
    command = [*TORCHRUN, *restart, "-m", "tests.distributed.launched", "examples", str(folder)]
    finished = run(command, cwd=REPOSITORY, env=environment())
    return folder, finished.stdout + finished.stderr


@needs_accelerate
@pytest.mark.parametrize("example", SEVERAL_PROCESSES)
def test_example(examples: tuple[Path, str], example: str) -> None:
    folder, output = examples
    report = folder / example / "report.json"
    assert report.exists(), output
    assert json.loads(report.read_text()) == {"trained": True, "layers": 28}

"""torchrun and accelerate launch: the scripts of examples/, accelerate's two modes, a rank that is killed."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from .launch import run_command

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
TORCHRUN += ["--rdzv-endpoint=127.0.0.1:0", "--rdzv-conf=timeout=120,read_timeout=120"]  # a free port, patient
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes=2"]
ACCELERATE += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]

pytestmark = [pytest.mark.slow]
needs_accelerate = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("accelerate", "transformers")),
    reason="needs accelerate and transformers",
)


def test_killed_rank_ends_bit_exact(tmp_path: Path) -> None:
    command = [*TORCHRUN, "--max-restarts", "3", "--monitor-interval", "0.1", "-m", "tests.distributed.elastic"]
    output = run_command([*command, str(tmp_path)])
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


@needs_accelerate
@pytest.mark.parametrize("example", ["ddp", "fsdp2", "fsdp2_accelerate"])
def test_example(tmp_path: Path, example: str) -> None:
    restart = ["--max-restarts", "2"]  # torchrun's own store now and then loses a process that ends
    run_command([*TORCHRUN, *restart, "-m", "tests.distributed.example", example, str(tmp_path)])
    assert json.loads((tmp_path / "report.json").read_text()) == {"trained": True, "layers": 28}

"""``reslora finetune`` as its own processes: two under torchrun, and one that is killed and resumed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reslora_kernels.cli import main
from reslora_kernels.testing import max_error

from ..distributed.launch import run_command

pytestmark = pytest.mark.slow

COMMON = ["--device", "cpu", "--learning-rate", "0.01", "--shortcut", "input", "--target-modules", "q_proj,v_proj"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    lines = [{"prompt": f"{i} plus {i} is", "completion": f" {2 * i}"} for i in range(20)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def command(base: Path, data: Path, out: Path, *more: str) -> list[str]:
    return ["finetune", "--model", str(base), "--data", str(data), "--output-dir", str(out), *COMMON, *more]


def adapter_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "reslora_model.safetensors")


def newest_checkpoint(out: Path) -> int:
    return max(
        (int(state.parent.name.split("-")[1]) for state in out.glob("checkpoint-*/trainer_state.json")), default=0
    )


def test_two_processes_train_what_one_does_with_the_same_batches(base: Path, sums: Path, tmp_path: Path) -> None:
    """The first process writes, both train; resuming needs as many processes again."""
    options = ["--max-steps", "6", "--save-steps", "3", "--eval-fraction", "0.2", "--merge", "--export"]
    one, two = (command(base, sums, tmp_path / name, *options) for name in ("one", "two"))
    assert main([*one, "--per-device-train-batch-size", "4"]) == 0
    two += ["--per-device-train-batch-size", "2"]
    printed = run_command([*TORCHRUN, "-m", "reslora_kernels", *two], timeout=90)
    assert printed.count("layers adapted in") == 1

    single, double = adapter_of(tmp_path / "one"), adapter_of(tmp_path / "two")
    assert single.keys() == double.keys()
    largest = max(float(tensor.abs().max()) for tensor in single.values())
    assert max(max_error(double[name], tensor) for name, tensor in single.items()) < 1e-5 * largest
    records = [json.loads((tmp_path / name / "finetune.json").read_text()) for name in ("one", "two")]
    assert [record["settings"]["processes"] for record in records] == [1, 2]
    for name, loss in records[0]["losses"].items():
        assert records[1]["losses"][name] == pytest.approx(loss, abs=2e-3), name  # merges calibrate on other batches
    assert records[1]["losses"]["train_last"] < records[1]["losses"]["train_first"]
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == sorted(p.name for p in (tmp_path / "one").iterdir())
    assert main([*two, "--resume"]) == 2


def test_killed_at_any_moment_and_resumed_ends_bit_for_bit_the_same(base: Path, sums: Path, tmp_path: Path) -> None:
    options = ["--max-steps", "60", "--save-steps", "4", "--per-device-train-batch-size", "2", "--lora-dropout", "0.1"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert main(command(base, sums, straight, *options)) == 0
    arguments = command(base, sums, killed, *options)
    process = subprocess.Popen(
        [sys.executable, "-m", "reslora_kernels", *arguments],
        env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    after, delay, deadline = random.randrange(4, 48), random.uniform(0, 0.05), time.monotonic() + 120
    while newest_checkpoint(killed) < after and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert main([*arguments, "--resume"]) == 0
    expected, actual = adapter_of(straight), adapter_of(killed)
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items()), (
        f"killed {delay} s after step {after}"
    )

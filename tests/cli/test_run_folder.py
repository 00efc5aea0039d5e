"""The folder of a run: what resuming needs, what overwriting removes, and what is refused before it is touched."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from reslora_kernels.cli import finetune as command

from .conftest import Finetune, adapter_of, chat, write_lines


def assert_same_adapter(one: Path, other: Path) -> None:
    first, second = adapter_of(one), adapter_of(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    "shortcut", [*(pytest.param(s, marks=pytest.mark.slow) for s in ("none", "input", "block")), "middle"]
)
def test_interrupted_and_resumed_equals_straight_through(shortcut: str, tmp_path: Path, finetune: Finetune) -> None:
    """Bit for bit, with dropout, evaluation and a learning rate that falls: all of the state has to come back."""
    options = ["--shortcut", shortcut, "--lora-dropout", "0.2", "--eval-fraction", "0.2", "--eval-steps", "2"]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert finetune(straight, *options) == 0
    shutil.copytree(straight, stopped)
    shutil.rmtree(stopped / "adapter")
    (stopped / "checkpoint-6" / "trainer_state.json").unlink()  # as if killed while it was written
    assert finetune(stopped, *options, "--resume") == 0
    assert json.loads((stopped / "finetune.json").read_text())["resumed_from"] == "checkpoint-3"
    assert_same_adapter(straight, stopped)


@pytest.mark.slow
def test_three_steps_and_three_more_equal_six(tmp_path: Path, finetune: Finetune) -> None:
    options = ["--lr-scheduler-type", "constant", "--lora-dropout", "0.2", "--shortcut", "middle", "--pre-num", "-1"]
    assert finetune(tmp_path / "six", *options) == 0
    assert finetune(tmp_path / "three", *options, "--max-steps", "3") == 0
    before = adapter_of(tmp_path / "three")
    assert finetune(tmp_path / "three", *options, "--max-steps", "6", "--resume") == 0
    assert any(not torch.equal(before[key], tensor) for key, tensor in adapter_of(tmp_path / "three").items())
    assert_same_adapter(tmp_path / "six", tmp_path / "three")


def test_overwrite_removes_the_earlier_run_and_nothing_else(tmp_path: Path, finetune: Finetune) -> None:
    out = tmp_path / "run"
    assert finetune(out, "--max-steps", "3", "--export") == 0
    assert finetune(out, "--max-steps", "1", "--overwrite") == 0
    assert {path.name for path in out.iterdir()} == {"adapter", "checkpoint-1", "finetune.json"}
    (out / "notes.txt").write_text("mine")
    assert finetune(out, "--max-steps", "1", "--overwrite") == 2
    assert (out / "notes.txt").read_text() == "mine"


def test_output_that_would_be_lost_or_cannot_be_written(
    tmp_path: Path, finetune: Finetune, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert finetune(tmp_path) == 2
    assert "is not empty; give another folder, --resume to go on" in capsys.readouterr().err
    assert finetune(tmp_path, "--overwrite") == 2
    assert "is not overwritten: other files than a run's are in it" in capsys.readouterr().err
    assert finetune(tmp_path / "notes.txt") == 2
    assert "is a file, not a folder" in capsys.readouterr().err
    assert finetune(tmp_path / "notes.txt" / "run") == 2
    assert "cannot be made" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_resume_with_other_settings_is_refused(
    tmp_path: Path, finetune: Finetune, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert finetune(out, "--max-steps", "3") == 0
    capsys.readouterr()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    other = write_lines(tmp_path / "other.jsonl", [chat(i) for i in range(5)])
    assert finetune(out, "--resume", "--seed", "7", "--shortcut", "none", data=other) == 2
    error = capsys.readouterr().err
    assert "seed was 42, is 7" in error
    assert "'shortcut': 'block'" in error
    assert "data_sha256" in error
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("harm", "missing"),
    [
        (lambda folder: (folder / "optimizer.pt").unlink(), "optimizer.pt"),
        (lambda folder: (folder / "optimizer.pt").write_bytes(b""), "optimizer.pt"),
        (lambda folder: os.truncate(folder / "scheduler.pt", 300), "scheduler.pt"),
        (lambda folder: (folder / "rng_state.pth").unlink(), "rng_state.pth"),
    ],
    ids=["deleted", "empty", "cut off", "random numbers"],
)
def test_a_checkpoint_without_all_that_goes_on_exactly_is_none(
    harm: Callable[[Path], Any], missing: str, tmp_path: Path
) -> None:
    """The Trainer begins anew with what is not there, and says nothing."""
    for step in (1, 2):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({"state": list(range(99))}, folder / name)
        for name in ("trainer_state.json", "reslora_config.json", "reslora_model.safetensors"):
            (folder / name).write_text("{}")
    assert command.folder.last_checkpoint(tmp_path).name == "checkpoint-2"
    harm(tmp_path / "checkpoint-2")
    assert command.folder.last_checkpoint(tmp_path).name == "checkpoint-1"
    harm(tmp_path / "checkpoint-1")
    with pytest.raises(FileNotFoundError, match=f"no complete checkpoint: checkpoint-2 has no whole {missing}"):
        command.folder.last_checkpoint(tmp_path)


def test_a_longer_run_is_another_one_where_the_learning_rate_falls(
    tmp_path: Path, finetune: Finetune, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune(tmp_path / "run", "--max-steps", "1") == 0
    assert finetune(tmp_path / "run", "--max-steps", "2", "--resume") == 2
    assert "max_steps was 1, is 2" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--model", "--tokenizer"])
def test_what_is_read_is_not_replaced(
    option: str, base: Path, tmp_path: Path, finetune: Finetune, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(base, out / "merged")
    assert finetune(out, option, str(out / "merged"), "--overwrite") == 2
    assert "merged', which is read; give another folder" in capsys.readouterr().err
    assert (out / "merged" / "model.safetensors").is_file()


def test_an_earlier_run_is_there_until_a_step_has_gone_well(tmp_path: Path, finetune: Finetune) -> None:
    out = tmp_path / "run"
    assert finetune(out, "--max-steps", "1") == 0
    before = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (out / ".finetune.json.12.tmp").touch()  # of a run that was killed
    assert (
        finetune(out, "--overwrite", "--lr-scheduler-type", "cosine_with_min_lr") == 2
    )  # needs more than options give
    assert {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    command.folder.set_aside(out)
    (out / "finetune.json").write_text("{}")  # and killed here
    assert finetune(out, "--max-steps", "2", "--overwrite") == 0
    assert {path.name for path in out.iterdir()} == {"adapter", "checkpoint-2", "finetune.json"}


def test_what_follows_training_loses_nothing_where_it_fails(
    base: Path, tmp_path: Path, finetune: Finetune, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a base whose generation settings the Trainer makes unsavable merges, as it does by ``reslora merge``."""
    from reslora_kernels.cli.finetune import run

    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "eos_token_id": 1}))
    assert finetune(tmp_path / "run", "--max-steps", "1", "--merge", model=tmp_path / "base") == 0
    monkeypatch.setattr(run, "merge_trained", lambda *_: 1 / 0)
    capsys.readouterr()
    assert finetune(tmp_path / "other", "--max-steps", "1", "--merge") == 2
    error = capsys.readouterr().err
    assert f"the trained adapter is in {str(tmp_path / 'other' / 'adapter')!r}; what was to follow failed" in error
    assert json.loads((tmp_path / "other" / "finetune.json").read_text())["status"] == "trained"
    assert adapter_of(tmp_path / "other")

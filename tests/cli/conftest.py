"""Shared by tests of the command line: ``reslora finetune`` on the small saved model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from reslora_kernels.cli import main

FAST = ["--max-steps", "6", "--save-steps", "3", "--per-device-train-batch-size", "2", "--learning-rate", "0.01"]
Finetune = Callable[..., int]


def chat(i: int) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "system", "content": "Add."},
            {"role": "user", "content": f"What is {i} plus {i}?"},
            {"role": "assistant", "content": f"It is {2 * i}."},
            {"role": "user", "content": "Thanks"},
            {"role": "assistant", "content": "You are welcome."},
        ]
    }


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("data") / "chats.jsonl", [chat(i) for i in range(12)])


@pytest.fixture
def finetune(base: Path, chats: Path) -> Finetune:
    """Run the command on the small model and the chats, unless the arguments say otherwise."""

    def run(out: Path, *arguments: str, model: Path = base, data: Any = chats) -> int:
        return main(
            ["finetune", "--model", str(model), "--data", str(data), "--output-dir", str(out), *FAST, *arguments]
        )

    return run


def adapter_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "reslora_model.safetensors")

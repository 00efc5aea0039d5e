"""The README's Python blocks, run word for word on a small model, in an empty folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from .models import llama

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def train(model: nn.Module) -> None:
    """What the README leaves to the reader: a loop."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.randint(3, 48, (2, 8))
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


def test_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    llama().save_pretrained("path/or/id")
    names = {"train": train, "x": torch.randn(2, 1024)}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "adapter" / "reslora_model.safetensors").is_file()
    assert (tmp_path / "peft-adapter" / "adapter_model.safetensors").is_file()
    assert names["model"].model.layers[0].self_attn.q_proj.merged
    assert "model.layers.2.self_attn.v_proj" in capsys.readouterr().out
    assert names["x"].shape == (2, 1024)
    assert len(BLOCKS) == 2

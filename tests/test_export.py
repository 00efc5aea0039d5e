"""torch.export and ONNX with dynamic lengths: saved, loaded, and exact at a length that the export never saw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reslora_kernels import ResLoRAConfig, apply_reslora

from .models import randomize


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def adapted(shortcut: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(3))).eval()
    config = ResLoRAConfig(r=2, shortcut=shortcut, target_modules=["up", "down"])
    return randomize(apply_reslora(model, config, example_inputs=torch.randn(1, 4, 8)))


@pytest.mark.parametrize("shortcut", ["none", "input", "block", "middle"])
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_an_export_serves_every_length(shortcut: str, strict: bool, tmp_path: Path) -> None:
    model, length = adapted(shortcut), torch.export.Dim("length")
    exported = torch.export.export(model, (torch.randn(1, 4, 8),), dynamic_shapes=({1: length},), strict=strict)
    torch.export.save(exported, tmp_path / "model.pt2")
    x = torch.randn(1, 9, 8)
    torch.testing.assert_close(torch.export.load(tmp_path / "model.pt2").module()(x), model(x), rtol=0, atol=0)
    assert not any("reslora" in str(node.target) for node in exported.graph.nodes)  # runs without this package


@pytest.mark.parametrize("shortcut", ["none", "input", "block", "middle"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # sizes that are the same at every length
@pytest.mark.parametrize("dynamo", [False, True], ids=["traced", "exported"])
def test_onnx_runtime_serves_an_unmerged_model(shortcut: str, dynamo: bool, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, path = adapted(shortcut).double(), str(tmp_path / "model.onnx")
    dynamic: dict[str, Any] = {"dynamic_axes": {"x": {1: "length"}}}
    if dynamo:
        dynamic = {"dynamic_shapes": ({1: torch.export.Dim("length")},)}
    torch.onnx.export(model, (torch.randn(1, 4, 8).double(),), path, dynamo=dynamo, input_names=["x"], **dynamic)
    x = torch.randn(1, 9, 8).double()
    (y,) = runtime.InferenceSession(path).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=1e-10, atol=1e-10)

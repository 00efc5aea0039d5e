"""The one-process scripts of examples/, run as they stand in an empty folder; test_launchers.py has the others."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
SEVERAL_PROCESSES = {"ddp", "fsdp2", "fsdp2_accelerate"}
NEEDS = {
    "language_trainer": ("transformers", "accelerate"),
    "language_sft": ("trl",),
    "diffusion_unet": ("diffusers",),
    "vision_vit": ("transformers",),
}
WRITTEN = {
    "language_trainer": ["adapter/reslora_model.safetensors", "checkpoints/checkpoint-20/reslora_model.safetensors"],
    "language_sft": ["peft-adapter/adapter_model.safetensors", "checkpoints/checkpoint-10/reslora_model.safetensors"],
    "diffusion_unet": ["adapter/reslora_model.safetensors", "peft-adapter/adapter_model.safetensors"],
    "vision_vit": ["adapter/reslora_model.safetensors"],
}


def test_every_script_is_run() -> None:
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    assert scripts == {"stand_ins", *NEEDS} | SEVERAL_PROCESSES
    listed = (EXAMPLES / "README.md").read_text()
    assert all(f"[{name}.py]({name}.py)" in listed for name in scripts)


@pytest.mark.parametrize("name", sorted(NEEDS))
def test_script(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in NEEDS[name]:
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert all((tmp_path / file).is_file() for file in WRITTEN[name])

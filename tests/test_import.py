"""``import reslora_kernels`` needs torch alone, touches no GPU and pulls in nothing heavy."""

from __future__ import annotations

import subprocess
import sys

OPTIONAL = ["safetensors", "transformers", "peft", "accelerate", "datasets", "diffusers", "triton"]
OPTIONAL += ["typer", "rich", "matplotlib", "jinja2", "pandas"]
BLOCKED = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL!r}))\n"  # importing one of them now fails


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_import_needs_torch_alone() -> None:
    finished = python(BLOCKED + "import reslora_kernels as r; [getattr(r, name) for name in r.__all__]")
    assert finished.returncode == 0, finished.stderr


def test_import_touches_no_gpu() -> None:
    finished = python(
        "import torch\n"
        "def refuse(*_): raise AssertionError('CUDA was queried')\n"
        "torch.cuda.is_available = torch.cuda.device_count = torch.cuda.init = torch.cuda._lazy_init = refuse\n"
        "import reslora_kernels as r; [getattr(r, name) for name in r.__all__]\n"
        "assert not torch.cuda.is_initialized()"
    )
    assert finished.returncode == 0, finished.stderr


def test_import_adds_no_heavy_module() -> None:
    finished = python(
        "import sys, torch; before = set(sys.modules)\n"
        "import reslora_kernels as r; [getattr(r, name) for name in r.__all__]\n"
        f"print(sorted({{name.split('.')[0] for name in set(sys.modules) - before}} & set({OPTIONAL!r})))"
    )
    assert finished.stdout.strip() == "[]", finished.stderr


def test_training_a_layer_needs_torch_alone() -> None:
    finished = python(
        BLOCKED + "import torch, reslora_kernels as r\n"
        "layer = r.ResLoRALinear(4, 3, config=r.ResLoRAConfig(r=2, shortcut='none'))\n"
        "layer(torch.ones(2, 4)).sum().backward()\n"
        "assert layer.lora_B.grad is not None and layer.weight.grad is None"
    )
    assert finished.returncode == 0, finished.stderr


def test_command_without_typer_names_the_fix() -> None:
    finished = python(BLOCKED + "from reslora_kernels.cli import main; sys.exit(main(['doctor']))")
    assert finished.returncode == 2
    assert finished.stderr == "reslora: error: typer and rich are not installed; run: pip install typer rich\n"

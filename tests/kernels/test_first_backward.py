"""A backward pass may be the first that autograd's thread does on the GPU: it has no context yet."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Adapters in x's type: nothing is converted by a kernel of PyTorch's before ours encodes its tensor maps.
SCRIPT = """
import sys
import torch
from reslora_kernels.ops import lora_linear

backend, dtype = sys.argv[1], torch.bfloat16
x, w, a, b = (torch.randn(*size, device="cuda", dtype=dtype) for size in ((256, 512), (768, 512), (16, 512), (768, 16)))
leaves = [tensor.requires_grad_() for tensor in (x, a, b)]
y, _ = lora_linear(x, w, None, [a], [b], scaling=2.0, backend=backend)
for gradient in torch.autograd.grad(y, leaves, torch.ones_like(y)):
    assert bool(gradient.isfinite().all())
"""


@pytest.mark.gpu
@pytest.mark.parametrize("setting", ["off", "cooperative-pair", "one-pass-pair"])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_backward_pass_is_the_first_of_its_thread(
    backend: str, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reslora_kernels.backends import hopper, select

    if reason := select.unavailable_reason(backend):
        pytest.skip(reason)
    if backend == "triton" and setting != "off":
        pytest.skip("it has no such setting")
    monkeypatch.setenv(hopper.VARIABLE, setting)
    finished = subprocess.run([sys.executable, "-c", SCRIPT, backend], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr

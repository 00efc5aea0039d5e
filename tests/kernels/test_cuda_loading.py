"""What keeps the CUDA backend from running is one sentence with the fix; nothing else of the package is concerned."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from reslora_kernels.backends import cuda


@pytest.fixture(autouse=True)
def _fresh() -> None:
    cuda.unavailable_reason.cache_clear()


def test_no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_extension", lambda: None)
    monkeypatch.setattr(cuda, "_why_not_built", lambda: "no nvcc on PATH or under CUDA_HOME")
    assert cuda.unavailable_reason() == "this build has no CUDA extension (no nvcc on PATH or under CUDA_HOME)"


def test_reason_names_the_command() -> None:
    assert "pip install ." in cuda._why_not_built()


def test_extension_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ImportError("libstdc++.so.6: version `GLIBCXX_3.4.32' not found")

    monkeypatch.setattr(cuda, "_extension", broken)
    reason = cuda.unavailable_reason()
    assert reason is not None and "GLIBCXX" in reason and "pip install" in reason


def test_kernel_that_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver too old, or another architecture: found by a small launch, not by the first training step."""

    def finish(*_: object) -> None:
        raise RuntimeError("CUDA kernel finish[...] failed: no kernel image is available for execution on the device")

    extension = SimpleNamespace(finish=finish, Device=lambda *_: None, Output=lambda *_: None, Sum=lambda *_: None)
    monkeypatch.setattr(cuda, "_extension", lambda: extension)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, device: ones(*size))
    reason = cuda._launch_failure()
    assert reason is not None and "no kernel image" in reason and "RESLORA_CUDA=1" in reason

"""Kernels run on the GPU where there is one, in the patched interpreter elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch.utils import deterministic

from reslora_kernels.backends import cuda, native, select, triton
from tests import cuda_on_cpu

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which deterministic algorithms need, see ``poisoned``


@pytest.fixture(autouse=True)
def interpreted(triton_interpreter: bool, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Whether this test's kernels run in the interpreter; its programs run in the same order each time it is run."""
    if triton_interpreter:
        monkeypatch.setattr(triton, "unavailable_reason", lambda: None)
    select.forget()
    yield triton_interpreter
    select.forget()


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, so that an element which no kernel wrote cannot pass."""
    assert deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """The emulated CUDA extension, built once for all test processes; None where there is a GPU for the real one."""
    if torch.cuda.is_available():
        return None
    if reason := cuda_on_cpu.unavailable_reason():
        pytest.skip(reason)
    run = tmp_path_factory.getbasetemp()
    folder = (run.parent if "PYTEST_XDIST_WORKER" in os.environ else run) / "cuda_on_cpu"
    with FileLock(folder.with_suffix(".lock")):
        folder.mkdir(exist_ok=True)
        module = folder / cuda_on_cpu.MODULE
        return module if module.exists() else cuda_on_cpu.build(folder)


@pytest.fixture
def hopper_extension(emulated: Path | None, monkeypatch: pytest.MonkeyPatch) -> Path | None:
    """What the cuda backend loads has the Hopper kernels: this GPU's, or without a GPU the emulated extension."""
    if emulated is None:
        if reason := cuda.unavailable_reason():
            pytest.skip(reason)
        if torch.cuda.get_device_capability() != (9, 0) or not native.load().HAS_SM90:
            pytest.skip("needs a GPU of compute capability 9.0 and a build for it")
    else:
        module = cuda_on_cpu.load(emulated)
        monkeypatch.setattr(native, "load", lambda: module)
        cuda_on_cpu.set_seed(emulated, 1)
    return emulated

"""Which backend serves a call, and why, answerable in words."""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor

from ..tuning.gpus import calls_of, gpu_of, nearest
from . import kinds

PREFERENCE = ("triton", "cuda", "torch")  # "auto": the first that can serve the call, "cuda" only where it was measured
OVERRIDE = "RESLORA_BACKEND"
MOST_KINDS = 10_000  # of calls that are remembered
_chosen: dict[tuple[object, ...], Any] = {}


class Status(NamedTuple):
    """One backend on this machine."""

    name: str
    available: bool
    reason: str


class BackendChoice(NamedTuple):
    """The backend that serves a call, and why this one."""

    name: str
    reason: str


@cache
def _load(name: str) -> ModuleType | None:
    """The backend's module; None when this release does not have it."""
    module = f"{__package__}.{name}"
    return importlib.import_module(module) if importlib.util.find_spec(module) else None


@cache
def unavailable_reason(name: str) -> str | None:
    """Why the backend cannot run here at all; None when it can."""
    module = _load(name)
    if module is None:
        return f"this release has no {name} backend"
    reason: str | None = module.unavailable_reason()
    return reason


def status() -> list[Status]:
    """Every backend, in order of preference."""
    rows = []
    for name in PREFERENCE:
        reason, module = unavailable_reason(name), _load(name)
        described = module.describe() if module is not None and reason is None else ""
        rows.append(Status(name, reason is None, reason or described))
    return rows


def override() -> str | None:
    """The backend that the environment asks for whatever the code says; None when it leaves the choice."""
    name = os.environ.get(OVERRIDE, "auto")
    if name not in ("auto", *PREFERENCE):
        raise ValueError(f"{OVERRIDE} must be one of 'auto', {', '.join(map(repr, PREFERENCE))}, got {name!r}")
    return None if name == "auto" else name


def check(backend: str) -> None:
    """Raise a RuntimeError unless ``backend``, or what the environment puts in its place, can run on this machine."""
    backend = override() or backend
    if backend != "auto" and (reason := unavailable_reason(backend)):
        usable = ", ".join(
            repr(name) for name in ("auto", *PREFERENCE) if name == "auto" or not unavailable_reason(name)
        )
        raise RuntimeError(f"backend {backend!r} cannot run here: {reason}; usable on this machine: {usable}")


def explain(backend: str, x: Tensor, weight: Tensor, rank: int, dropout: bool = False) -> BackendChoice:
    """The backend that serves x [M, K] with weight [N, K] and ``rank`` rows of A, with the reason.

    Raises:
        RuntimeError: the backend asked for cannot run on this machine.
        ValueError: it can, but not with these arguments.
    """
    asked = override()
    if asked or backend != "auto":
        name = asked or backend
        check(name)
        module = _require(name)
        if reason := module.unsupported_reason(x, weight, rank):
            raise ValueError(f"backend {name!r}: {reason}; use backend='auto' or 'torch'")
        why = f"{OVERRIDE}={name}" if asked else "asked for"
        return BackendChoice(name, f"{why}; {module.explain(x, weight, rank)}")
    if x.device.type != "cuda":
        return BackendChoice("torch", f"x is on device {x.device}; {_require('torch').explain(x, weight, rank)}")
    passed_over: list[str] = []
    able: list[str] = []
    for name in PREFERENCE:
        if reason := unavailable_reason(name):
            _warn_of_missing(name, reason)
        else:
            reason = _require(name).unsupported_reason(x, weight, rank)
        if reason is None:
            able.append(name)
        else:
            passed_over.append(f"{name}: {reason}")
    name, why = _fastest(able, x, weight, rank, dropout)
    return BackendChoice(name, "; ".join([why, _require(name).explain(x, weight, rank), *passed_over]))


def choose(backend: str, x: Tensor, weight: Tensor, rank: int, dropout: bool = False) -> ModuleType:
    """The module whose ``forward`` and ``backward`` serve this call; found once for each kind of call.

    No kernel is launched on nothing: a call with an empty x or weight goes to torch.
    """
    kind = (backend, x.device, x.dtype, x.shape, weight.shape, rank, dropout)
    module: ModuleType | None = recall(kind)
    if module is None:
        module = _require(explain(backend, x, weight, rank, dropout).name)
        module = module if x.numel() and weight.numel() else _require("torch")
        remember(kind, module)
    return module


def recall(kind: tuple[object, ...]) -> Any:
    """What ``remember`` was told of this kind of call under the present environment; None for a new one."""
    return _chosen.get((os.environ.get(OVERRIDE), kind))


def remember(kind: tuple[object, ...], decided: Any) -> None:
    """Keep what was decided for a kind of call."""
    if len(_chosen) >= MOST_KINDS:
        _chosen.clear()
    _chosen[(os.environ.get(OVERRIDE), kind)] = decided


def forget() -> None:
    """Decide anew from here on: which backends can run, or how fast, has changed."""
    kinds.forget()
    _chosen.clear()
    unavailable_reason.cache_clear()


def _fastest(able: list[str], x: Tensor, weight: Tensor, rank: int, dropout: bool = False) -> tuple[str, str]:
    """The first backend by preference, unless the committed table knows a faster one near this shape.

    The portable CUDA kernels are behind the vendor library's matmul on many GPUs: without a measurement they wait.
    """
    if x.numel() and weight.numel():
        sizes = {"m": x.shape[0], "n": weight.shape[0], "k": weight.shape[1], "rank": rank}
        row = nearest(gpu_of(x.device).generation, calls_of(dropout), sizes, {"dtype": str(x.dtype)})
        times = {name: row["microseconds"][name] for name in able if name in row["microseconds"]} if row else {}
        if able[0] in times:
            name = min(times, key=times.__getitem__)
            return name, f"measured fastest near this shape ({times[name]:.0f} us)"
    first = next(name for name in able if name != "cuda" or able == ["cuda"])
    return first, "first choice" if first == able[0] else f"first choice: {able[0]} was not measured near this shape"


@cache
def _warn_of_missing(name: str, reason: str) -> None:
    """Once, where a GPU is in use: the fused kernels are not."""
    if name == "triton":
        warnings.warn(f"reslora_kernels runs without its Triton kernels: {reason}", RuntimeWarning, stacklevel=2)


def _require(name: str) -> ModuleType:
    module = _load(name)
    if module is None:
        raise RuntimeError(f"this release has no {name} backend")
    return module

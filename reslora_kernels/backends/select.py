"""Which backend serves a call, and why, answerable in words."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from types import ModuleType
from typing import NamedTuple

from torch import Tensor

PREFERENCE = ("cuda", "triton", "torch")  # "auto" takes the first that can serve the call


class Status(NamedTuple):
    """One backend on this machine."""

    name: str
    available: bool
    reason: str


class Choice(NamedTuple):
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


def check(backend: str) -> None:
    """Raise a RuntimeError unless ``backend`` is "auto" or can run on this machine."""
    if backend != "auto" and (reason := unavailable_reason(backend)):
        usable = ", ".join(
            repr(name) for name in ("auto", *PREFERENCE) if name == "auto" or not unavailable_reason(name)
        )
        raise RuntimeError(f"backend {backend!r} cannot run here: {reason}; usable on this machine: {usable}")


def explain(backend: str, x: Tensor, weight: Tensor, rank: int) -> Choice:
    """The backend that serves x [M, K] with weight [N, K] and ``rank`` rows of A, with the reason."""
    if backend != "auto":
        check(backend)
        reason = _require(backend).unsupported_reason(x, weight, rank)
        if reason:
            raise RuntimeError(f"backend {backend!r} cannot serve this call: {reason}; use backend='auto' or 'torch'")
        return Choice(backend, "asked for")
    passed_over: list[str] = []
    for name in PREFERENCE:
        module = _load(name)
        if module is None:
            continue
        reason = unavailable_reason(name) or module.unsupported_reason(x, weight, rank)
        if reason is None:
            return Choice(name, "; ".join(passed_over) or "fastest backend of this release")
        passed_over.append(f"{name}: {reason}")
    raise RuntimeError(f"no backend can serve this call: {'; '.join(passed_over)}")


def choose(backend: str, x: Tensor, weight: Tensor, rank: int) -> ModuleType:
    """The module whose ``forward`` and ``backward`` serve this call."""
    return _require(explain(backend, x, weight, rank).name)


def _require(name: str) -> ModuleType:
    module = _load(name)
    if module is None:
        raise RuntimeError(f"this release has no {name} backend")
    return module

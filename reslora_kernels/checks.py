"""Checks of arguments, which name the argument, the value and what is allowed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn


def check_module(name: str, value: Any) -> None:
    """Raise a TypeError unless ``value`` is an ``nn.Module``."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be an nn.Module, got {type(value).__name__}")


def check_bool(name: str, value: Any) -> None:
    """Raise a TypeError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_int(name: str, value: Any, low: int, high: int | None) -> None:
    """Raise a TypeError or ValueError unless ``value`` is an int from ``low`` to ``high``, None for no limit."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < low or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be {allowed}, got {value}")


def check_number(name: str, value: Any, allowed: str, holds: Any) -> None:
    """Raise a TypeError or ValueError unless ``value`` is a finite number that ``holds``; ``allowed`` says which do."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be {allowed}, got {value!r}")
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an int that no float can hold
        finite = False
    if not finite or not holds(value):
        raise ValueError(f"{name} must be {allowed}, got {value!r:.80}")


def check_floating(name: str, value: Any) -> None:
    """Raise a TypeError or ValueError unless ``value`` is a floating ``torch.dtype`` or None."""
    if value is not None and not isinstance(value, torch.dtype):
        raise TypeError(f"{name} must be a torch.dtype or None, got {value!r}")
    if value is not None and not value.is_floating_point:
        raise ValueError(f"{name} must be a floating dtype, got {value}")

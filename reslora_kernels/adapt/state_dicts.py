"""Loading into an adapted model: adapters for some of its layers only are no base checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..layers.linear import ResLoRALinear


class _RefusePartial:
    """Hooks of an adapted root around load_state_dict: adapters for some layers only are no base checkpoint.

    A layer by itself takes a checkpoint without its adapters for one of the base model; only the root sees all keys.
    """

    def __init__(self) -> None:
        self.absent: list[str] = []

    def before(self, module: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
        adapters = [
            [f"{prefix}{name}.{own}" for own in child.adapter_parameters()]
            for name, child in module.named_modules()
            if isinstance(child, ResLoRALinear)
        ]
        known = any(key in state for keys in adapters for key in keys)
        self.absent = [key for keys in adapters if not state.keys() & set(keys) for key in keys] if known else []

    def after(self, module: nn.Module, incompatible: Any) -> None:
        incompatible.missing_keys.extend(self.absent)
        self.absent = []

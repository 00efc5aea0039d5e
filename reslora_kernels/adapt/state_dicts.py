"""Loading into an adapted model: a state dict without its adapters, or with some of them, is not taken silently."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..layers.adapter import AdapterLayer
from .record import TOKENS

_HANDLES = "_reslora_state_dict_hooks"


def guard(root: nn.Module) -> None:
    """Let an adapted root watch ``load_state_dict``; once, however many adapters it gets."""
    if _HANDLES not in root.__dict__:
        watch = _Watch()
        root.__dict__[_HANDLES] = [
            root.register_load_state_dict_pre_hook(watch.before),  # type: ignore[no-untyped-call]
            root.register_load_state_dict_post_hook(watch.after),  # type: ignore[no-untyped-call]
        ]


def release(root: nn.Module) -> None:
    """The inverse of ``guard``."""
    for handle in root.__dict__.pop(_HANDLES, ()):
        handle.remove()


class _Watch:
    """Hooks of an adapted root around load_state_dict: adapters for some layers only are no base checkpoint.

    A layer by itself takes a checkpoint without its adapters for one of the base model; only the root sees all keys.
    """

    def __init__(self) -> None:
        self.absent: list[str] = []
        self.is_base = False

    def before(self, module: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
        layers = {name: child for name, child in module.named_modules() if isinstance(child, AdapterLayer)}
        adapters = [[f"{prefix}{name}.{own}" for own in layer.adapter_parameters()] for name, layer in layers.items()]
        known = any(key in state for keys in adapters for key in keys)
        self.absent = [key for keys in adapters if not state.keys() & set(keys) for key in keys] if known else []
        self.is_base = not known
        if not known and not all(layer.merged for layer in layers.values()):
            warnings.warn(
                "the state dict holds no adapters, as that of a base model: the model's own stay as they are. To "
                "resume training from a checkpoint, load_adapter(model, path) reads what save_adapter wrote",
                stacklevel=2,
            )

    def after(self, module: nn.Module, incompatible: Any) -> None:
        if self.is_base:  # which has no rows of its own for tokens that train
            missing = [key for key in incompatible.missing_keys if not key.endswith(f".{TOKENS}")]
            incompatible.missing_keys[:] = missing
        incompatible.missing_keys.extend(self.absent)
        self.absent = []

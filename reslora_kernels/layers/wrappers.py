"""Modules around others that change no computation, torch.compile's and checkpoint_wrapper's: names leave them out."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

COMPILED = "_orig_mod"
_WRAPPERS = (COMPILED, "_checkpoint_wrapped_module")  # what they call the module inside
_IN_NAMES = re.compile(rf"(?:^|\.)(?:{'|'.join(_WRAPPERS)})(?=\.|$)")


def without_wrappers(name: str) -> str:
    """The name of a module or parameter without the parts that wrappers add."""
    return _IN_NAMES.sub("", name).removeprefix(".") if "_" in name else name


def unwrapped(module: nn.Module) -> nn.Module:
    """What wrappers are around; a module by itself is that already."""
    inner: nn.Module | None = module
    while inner is not None:
        module = inner
        inner = next((child for child in map(module._modules.get, _WRAPPERS) if child is not None), None)
    return module


def modules_of(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``named_modules`` without wrappers."""
    for name, module in root.named_modules():
        if module is unwrapped(module):
            yield without_wrappers(name), module


def at(root: nn.Module, name: str) -> nn.Module | None:
    """The module of that name, with the wrappers around it; None where there is none."""
    module: nn.Module | None = root
    for part in name.split(".") if name else ():
        if module is None:
            return None
        children = module._modules if part in module._modules else unwrapped(module)._modules
        module = children.get(part)
    return module


def module_at(root: nn.Module, name: str) -> nn.Module:
    """The module of that name itself. AttributeError, as ``get_submodule``, where there is none."""
    return unwrapped(root.get_submodule(name))

"""What a layer that stands in for another shares with it."""

from __future__ import annotations

from typing import Any

from torch import nn

from .adapter import ADAPTER_PARAMETERS

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOK_FLAGS = (
    "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs",
    "_is_full_backward_hook",
)  # fmt: skip
_MACHINERY = {*vars(nn.Module()), "_hf_hook", "_old_forward", "forward"}  # not a layer's own: PyTorch's, accelerate's


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """What the module holds beside what every module does."""
    return {name: value for name, value in vars(module).items() if name not in _MACHINERY}


def share_base(layer: nn.Linear, other: nn.Linear) -> None:
    """Give ``layer`` the frozen parameters, buffers, hooks and training mode of ``other``."""
    frozen = other._parameters.keys() - set(ADAPTER_PARAMETERS)
    layer._parameters.update({name: value for name, value in other._parameters.items() if name in frozen})
    for name, buffer in other._buffers.items():
        layer.register_buffer(name, buffer, persistent=name not in other._non_persistent_buffers_set)
    share_hooks(other, layer)
    layer.training = other.training


def share_hooks(source: nn.Module, target: nn.Module) -> None:
    """The same dicts, so that handles that remove a hook go on working."""
    for name in (*_HOOKS, *_HOOK_FLAGS):
        setattr(target, name, getattr(source, name))

"""Frozen layers that accelerate has hooked: it moves inputs between devices, and weights on and off for each forward.

``accelerate.hooks.add_hook_to_module`` replaces ``forward`` on the instance and looks up every parameter of the module
by its name in the offloaded weights, which know no adapters. An adapted layer therefore keeps the hooked layer and
runs its hook on that one, and has its weights while they are there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def is_hooked(module: nn.Module) -> bool:
    """Whether accelerate has replaced the module's forward, and nobody else has before it."""
    forward, original = vars(module).get("forward"), vars(module).get("_old_forward")
    by_accelerate = getattr(getattr(forward, "func", None), "__module__", "") == "accelerate.hooks"
    return by_accelerate and getattr(original, "__func__", None) is type(module).forward


def bare_forward(module: nn.Module) -> Callable[..., Any]:
    """The module's forward without accelerate's hook, for who has run that."""
    forward: Callable[..., Any] = vars(module)["_old_forward"] if is_hooked(module) else module.forward
    return forward


def offloader(module: nn.Module) -> Any:
    """The hook that keeps the module's weights elsewhere between its forwards; None if there is none."""
    hook = vars(module).get("_hf_hook")
    hook = hook._hook if isinstance(hook, BaseHook) else hook
    return next((part for part in getattr(hook, "hooks", [hook]) if getattr(part, "offload", False)), None)


def device_of(linear: nn.Linear) -> torch.device:
    """Where the layer computes."""
    hook = offloader(linear)
    return linear.weight.device if hook is None else torch.device(hook.execution_device)


def held(linear: nn.Linear) -> Tensor:
    """The layer's weight, from where it is kept between forwards."""
    hook = offloader(linear) if linear.weight.is_meta else None
    return linear.weight.detach() if hook is None else hook.weights_map["weight"]


def hold(linear: nn.Linear, weight: Tensor) -> None:
    """Give the layer another weight, wherever it is kept."""
    hook = offloader(linear)
    if hook is None:
        linear.weight.data.copy_(weight)
        return
    kept = {name: hook.weights_map[name] for name, value in linear.named_parameters() if name == "bias"}
    hook.weights_map = {**kept, "weight": weight.detach().to("cpu", linear.weight.dtype, copy=True)}


class BaseHook:
    """Hook of an adapted layer: runs that of its base on the base, and shares the weights as they come and go."""

    def __init__(self, base: nn.Module, share: Callable[[nn.Module], None]) -> None:
        self.base, self.share = base, share

    def __getattr__(self, name: str) -> Any:
        """All else is as the base's hook has it (``offload``, ``weights_map``, ``no_grad``)."""
        if name in ("base", "share") or name.startswith("__"):  # a copy in the making
            raise AttributeError(name)
        return getattr(self._hook, name)

    @property
    def _hook(self) -> Any:
        return vars(self.base)["_hf_hook"]

    def init_hook(self, module: nn.Module) -> nn.Module:
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        arguments = self._hook.pre_forward(self.base, *args, **kwargs)
        self.share(self.base)
        return arguments

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        output = self._hook.post_forward(self.base, output)
        self.share(self.base)
        return output

    def detach_hook(self, module: nn.Module) -> nn.Module:
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(self.base)
        self.share(self.base)
        return module


def hook_like(base: nn.Module, layer: nn.Module, share: Callable[[nn.Module], None]) -> None:
    """Let accelerate call ``layer`` as it calls ``base``, if it has hooked that."""
    if is_hooked(base):
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(layer, BaseHook(base, share))


def unhooked(layer: nn.Module) -> nn.Module | None:
    """Undo ``hook_like``: the base as it was, hooks included; None if there were none."""
    hook = vars(layer).get("_hf_hook")
    if not isinstance(hook, BaseHook):
        return None
    for name in ("_hf_hook", "_old_forward", "forward"):
        del layer.__dict__[name]
    return hook.base

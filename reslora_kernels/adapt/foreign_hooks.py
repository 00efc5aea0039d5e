"""What other libraries hang on a model's layers that an adapter would lose, or that would lose the adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from ..config import ResLoRAConfig
from ..layers.offloading import is_hooked, offloader
from ..layers.tensor_parallel import is_parallelized
from .matching import matches
from .targets import with_parents


def refuse_foreign_hooks(model: nn.Module, targets: Mapping[str, nn.Module], config: ResLoRAConfig) -> None:
    """Raise a ValueError that names the first module that cannot be adapted, or trained, as it stands."""
    for fault in _faults(model, targets, config):
        raise ValueError(fault)


def _faults(model: nn.Module, targets: Mapping[str, nn.Module], config: ResLoRAConfig) -> Iterator[str]:
    for name, module in model.named_modules():
        registry = vars(module).get("_diffusers_hook")
        if registry is not None and "group_offloading" in registry.hooks:
            yield f"{name or 'model'!r} is under diffusers' group offloading: call apply_reslora first, then offload"
        hook = offloader(module)
        if hook is not None and hook.place_submodules and any(target.startswith(f"{name}.") for target in targets):
            yield (
                f"accelerate loads {name!r} with all its submodules (preload_module_classes), which would look for the "
                "adapters among the offloaded weights: leave it out of preload_module_classes"
            )
        if hook is not None and _is_trained(name, module, config, targets):
            yield (
                f"{name!r} would be trained (modules_to_save, bias), but accelerate offloads it, so that every forward "
                "starts from the old value: keep it on a device in device_map"
            )
    for name, linear in targets.items():
        if isinstance(linear, nn.Module) and _is_replaced(linear):
            yield (
                f"the forward of {name!r} is replaced on the instance by {_whose(linear)}, which an adapter would "
                "lose: call apply_reslora first and replace it afterwards. For diffusers' layerwise casting that is "
                "enable_layerwise_casting(skip_modules_classes=(ResLoRALinear,)): adapters are not held in 8 bits"
            )


def _is_trained(name: str, module: nn.Module, config: ResLoRAConfig, targets: Mapping[str, nn.Module]) -> bool:
    if config.modules_to_save and any(matches(parent, config.modules_to_save) for parent in with_parents(name)):
        return True
    biases = any(parameter.endswith("bias") for parameter, _ in module.named_parameters(recurse=False))
    return biases and (config.bias == "all" or (config.bias == "lora_only" and name in targets))


def _is_replaced(linear: nn.Module) -> bool:
    """Whether ``forward`` is another than the class's, and not by accelerate or Transformers' tensor parallel styles,
    which are carried over."""
    forward = vars(linear).get("forward")
    own = getattr(forward, "__func__", None) is type(linear).forward
    return forward is not None and not own and not is_hooked(linear) and not is_parallelized(linear)


def _whose(linear: nn.Module) -> str:
    registry = vars(linear).get("_diffusers_hook")
    if registry is not None and registry.hooks:
        return f"diffusers ({', '.join(registry.hooks)})"
    forward = vars(linear)["forward"]
    forward = getattr(forward, "func", forward)
    return f"{getattr(forward, '__module__', '?')}.{getattr(forward, '__qualname__', type(forward).__name__)}"

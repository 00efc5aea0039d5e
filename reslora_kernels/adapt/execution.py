"""The order in which layers execute, read off one forward, to confirm what the structure says and to find layers that
read one tensor."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layers.offloading import offloader


class Execution(NamedTuple):
    """A layer's first call in a forward: its name, and how many other x came before.

    Layers that run one after the other on the same tensor have the same ``source``.
    """

    name: str
    source: int


def record_order(layers: Mapping[str, nn.Module], run: Callable[[], Any]) -> list[Execution]:
    """Call ``run`` and list the layers that executed, first to execute first. Hooks are removed whatever happens."""
    order: dict[str, Execution] = {}
    latest: list[weakref.ref[Tensor]] = []

    def watch(name: str) -> Callable[..., None]:
        def first_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if not latest or latest[-1]() is not x:
                latest.append(weakref.ref(x))
            order.setdefault(name, Execution(name, len(latest)))

        return first_call

    handles = [layer.register_forward_pre_hook(watch(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return list(order.values())


def find_samples(model: nn.Module, layers: Iterable[Any]) -> None:
    """Run one sample, if inputs for it are known, and mark the layers that have it in the first dimension of x."""
    unknown = [layer for layer in layers if layer.samples_first is None]
    inputs = example_inputs(model) if unknown else None
    for layer in unknown:
        layer.samples_first = False
    if inputs is None:
        return

    def mark(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shape = (args[0] if args else next(iter(kwargs.values()))).shape
        layer.samples_first = len(shape) > 2 and shape[0] == 1 and shape[1] > 1

    handles = [layer.register_forward_pre_hook(mark, with_kwargs=True) for layer in unknown]
    try:
        with undisturbed(model), suppress(Exception):  # inputs that do not do leave it unknown
            call_with(model, inputs)
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """No gradients, evaluation mode, and afterwards every training flag and the random state as before.

    ``enable_grad`` works inside, in a caller's ``inference_mode`` too.
    """
    modes = [(module, module.training) for module in model.modules()]
    cuda = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=cuda):
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training


def call_with(model: Callable[..., Any], inputs: Any) -> Any:
    """Call a model with a batch: a mapping by keyword, a tuple or list by position, anything else as one argument."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def example_inputs(model: nn.Module) -> dict[str, Any] | None:
    """Small inputs for a run of a Transformers model or a diffusers UNet, from its config; None for other models."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    parameter: Tensor | None = next(model.parameters(), None)
    if parameter is None:
        return None
    offloaders = [hook for hook in map(offloader, model.modules()) if hook is not None]
    if parameter.is_meta and offloaders:
        parameter = torch.empty(0, dtype=parameter.dtype, device=offloaders[0].execution_device)
    if hasattr(model, "main_input_name"):
        return _transformers_inputs(model, config, parameter)
    if type(model).__name__ == "UNet2DConditionModel":
        return _unet_inputs(config, parameter)
    return None


def _transformers_inputs(model: Any, config: Any, parameter: Tensor) -> dict[str, Any] | None:
    accepted = inspect.signature(model.forward).parameters
    tokens = torch.zeros(1, 7, dtype=torch.long, device=parameter.device)
    if model.main_input_name == "pixel_values":
        size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
        if size is None:
            return None
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": parameter.new_zeros(1, channels, height, width)}
    if model.main_input_name != "input_ids":
        return None
    inputs: dict[str, Any] = {"input_ids": tokens}
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = tokens[:, :5]
    if "attention_mask" in accepted:  # left out, it would be made from values, which the meta device has not
        inputs["attention_mask"] = torch.ones_like(tokens)
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return inputs


def _unet_inputs(config: Any, parameter: Tensor) -> dict[str, Any] | None:
    width = config["cross_attention_dim"]
    if not isinstance(width, int):
        return None
    side = 4 * 2 ** len(config["block_out_channels"])
    return {
        "sample": parameter.new_zeros(1, config["in_channels"], side, side),
        "timestep": 0,
        "encoder_hidden_states": parameter.new_zeros(1, 7, width),
    }

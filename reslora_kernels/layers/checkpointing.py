"""Activation checkpointing: a recomputed layer meets what the layers before it had handed on in the same forward.

Only non-reentrant checkpointing can be exact here. Reentrant checkpointing runs the first forward without a graph, so
the gradient of a tensor that one checkpointed region hands to the next would be lost; it is refused.

Across a region's border go M r values per layer. They stay alive until backward, as any input of a region does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import nn

from ..checks import check_module
from .adapter import AdapterLayer
from .chain import Chain

Contexts = tuple[AbstractContextManager[None], AbstractContextManager[None]]


def checkpoint_context(model: nn.Module) -> Callable[[], Contexts]:
    """The ``context_fn`` with which PyTorch's non-reentrant checkpointing recomputes the layers of ``model`` exactly.

        checkpoint(block, x, use_reentrant=False, context_fn=checkpoint_context(model))

    Also for ``torch.distributed``'s ``checkpoint_wrapper``. Models of Transformers and diffusers need no such call:
    their own ``gradient_checkpointing_enable(...)`` and ``enable_gradient_checkpointing()`` are served as they are.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: it has no adapted layer.
    """
    check_module("model", model)
    layers = [module for module in model.modules() if isinstance(module, AdapterLayer)]
    if not layers:
        raise ValueError("model has no ResLoRALinear: adapt it first, with apply_reslora or load_adapter")

    def context_fn() -> Contexts:
        in_force = [each for layer in layers for each in layer.in_sum]
        chains = {id(layer.chain): layer.chain for layer in in_force if layer.chain is not None}
        return nullcontext(), _Resumed(_Snapshot(list(chains.values())))

    return context_fn


class CarryThroughCheckpoints:
    """Pre-hook of a module that opens passes: takes the checkpointing functions inside it, if any, under its care.

    Every such module has one, as a client may call the forward of the root, whose hooks then do not run.
    """

    def __init__(self, module: nn.Module, chains: Sequence[Chain[AdapterLayer]]) -> None:
        self.chains = chains
        self.inside = [child for child in module.modules() if hasattr(child, "gradient_checkpointing")]

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or not self.chains[0].active:
            return
        for child in self.inside:
            function = child.__dict__.get("_gradient_checkpointing_func")
            if isinstance(function, _CarriedCheckpoint):
                others = [chain for chain in function.chains if chain.active and chain not in self.chains]
                function.chains = [*others, *self.chains]
            elif function is not None:
                child.__dict__["_gradient_checkpointing_func"] = _CarriedCheckpoint(function, self.chains)


class _CarriedCheckpoint:
    """A checkpointing function whose regions resume the forward state that they began with."""

    def __init__(self, checkpoint: Callable[..., Any], chains: Sequence[Chain[AdapterLayer]]) -> None:
        self.checkpoint = checkpoint
        self.chains = chains

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        snapshot, differentiable = _Snapshot(self.chains), torch.is_grad_enabled()

        def region(*region_args: Any, **region_kwargs: Any) -> Any:
            snapshot.refuse_others()
            if snapshot.is_stale:
                with _Resumed(snapshot):
                    return function(*region_args, **region_kwargs)
            if differentiable and not torch.is_grad_enabled() and snapshot.hands_on:
                raise RuntimeError(
                    "reentrant activation checkpointing loses the gradients that flow between the layers of a chain; "
                    'pass gradient_checkpointing_kwargs={"use_reentrant": False}'
                )
            return function(*region_args, **region_kwargs)

        return self.checkpoint(region, *args, **kwargs)


class _Snapshot:
    """The open forward passes of some chains, and which of these are in force, as they are now."""

    def __init__(self, chains: Sequence[Chain[AdapterLayer]]) -> None:
        self._active = [(chain, chain.active) for chain in chains]
        open_now = ((chain.passes, chain.passes.current()) for chain in chains)
        self._states = [(passes, state.copy()) for passes, state in open_now if state is not None]

    @property
    def hands_on(self) -> bool:
        return bool(self._states)

    def refuse_others(self) -> None:
        """RuntimeError if a layer would be recomputed with another adapter than it ran with."""
        if any(chain.active != active for chain, active in self._active):
            raise RuntimeError(
                "activation checkpointing recomputes in the backward pass what ran with another adapter in force: call "
                "backward before set_adapter, or sum the losses of adapters that are in force together"
            )

    @property
    def is_stale(self) -> bool:
        return any(state.is_stale for _, state in self._states)

    def resume(self, stack: ExitStack) -> None:
        for passes, state in self._states:
            stack.enter_context(passes.resumed(state))


class _Resumed(AbstractContextManager[None]):
    """Within: the passes of a snapshot are open again. Can be entered for every backward through the same graph."""

    def __init__(self, snapshot: _Snapshot) -> None:
        self._snapshot = snapshot
        self._stack = ExitStack()

    def __enter__(self) -> None:
        self._snapshot.refuse_others()
        self._snapshot.resume(self._stack)

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

"""DistributedDataParallel: it averages the gradients of the parameters that it was made with, and of no others.

It is met in the forward of an adapted model, wherever the wrapper is: who changes the adapters later may hold the
model inside it (a Trainer's callback does), and its process group is known all the same.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..dtensors import initialised


@dataclass
class _Wrapper:
    """A wrapper that was met: it averages what trained then, or soon after it was made."""

    ddp: weakref.ref[Any]
    averaged: frozenset[int]  # ids of parameters
    named: bool  # whether it was told to leave some parameters to others


_wrapper_of: weakref.WeakKeyDictionary[nn.Module, _Wrapper] = weakref.WeakKeyDictionary()


def running(root: nn.Module) -> Any:
    """The wrapper in whose forward ``root`` begins its own, or which it is; None if there is none."""
    kind = nn.parallel.DistributedDataParallel
    ddp: Any = root if isinstance(root, kind) else kind._active_ddp_module
    return ddp if ddp is not None and _holds(ddp, root) else None


def _holds(ddp: Any, root: nn.Module) -> bool:
    known = _wrapper_of.get(root)
    return (known is not None and known.ddp() is ddp) or any(module is root for module in ddp.modules())


def meet(ddp: Any, root: nn.Module, parameter: Tensor) -> None:
    """Remember the wrapper whose forward is running, which must average ``parameter``, of an adapter that trains.

    Raises:
        ValueError: it was made before the adapter, or while that was frozen: the adapter would train on the gradients
            of this process alone.
    """
    known = _wrapper_of.get(root)
    if known is None or known.ddp() is not ddp:
        trained = frozenset(id(each) for each in ddp._module_parameters if each.requires_grad)
        apart = getattr(ddp, "parameters_to_ignore", None) or getattr(ddp, "_delay_all_reduce_params", None)
        known = _wrapper_of[root] = _Wrapper(weakref.ref(ddp), trained, bool(apart))
    if id(parameter) not in known.averaged and not known.named:
        raise ValueError(
            "the adapters were made, or put in force, after DistributedDataParallel (or accelerate's prepare), which "
            "averages the gradients of the parameters that trained then: the processes would train models of their "
            "own. Adapt the model first (apply_reslora, load_adapter, add_adapter and set_adapter), then wrap it"
        )


def share(model: nn.Module, root: nn.Module, tensors: Iterable[Tensor]) -> None:
    """Give all processes of a wrapper around ``root`` the first one's values, as it does itself when it is made.

    A warning says so where there are several processes and no such wrapper is known.

    Args:
        model: what the caller was given: ``root``, or something around it.
    """
    if not initialised() or torch.distributed.get_world_size() == 1:
        return
    kind = nn.parallel.DistributedDataParallel
    wrappers = (each for each in model.modules() if isinstance(each, kind))
    ddp: Any = next((each for each in wrappers if _holds(each, root)), None)
    if ddp is None and (known := _wrapper_of.get(root)) is not None:
        ddp = known.ddp()
    if ddp is None:
        warnings.warn(
            "each process has drawn or fitted its own values, as no DistributedDataParallel around the model is known "
            "that would make them one: give the wrapper itself, or let the model train in it first",
            stacklevel=3,
        )
        return
    first = torch.distributed.get_global_rank(ddp.process_group, 0)
    with torch.no_grad():
        for tensor in tensors:
            torch.distributed.broadcast(tensor, first, group=ddp.process_group)

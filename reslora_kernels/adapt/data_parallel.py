"""DistributedDataParallel: it averages the gradients of the parameters that it was made with, and of no others.

It is met in the forward of an adapted model, wherever the wrapper is: who changes the adapters later may hold the
model inside it (a Trainer's callback does), and its process group is known all the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..dtensors import initialised

_around: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Any]] = weakref.WeakKeyDictionary()


def running(root: nn.Module) -> Any:
    """The wrapper in whose forward ``root`` begins its own, or which it is; None if there is none."""
    kind = nn.parallel.DistributedDataParallel
    return root if isinstance(root, kind) else kind._active_ddp_module


def meet(ddp: Any, root: nn.Module, parameter: Tensor) -> None:
    """Remember the wrapper whose forward is running, which must know ``parameter``, one of the adapters of ``root``.

    Raises:
        ValueError: it was made before the adapter, which would train on the gradients of this process alone.
    """
    if not any(known is parameter for known in ddp._module_parameters):
        raise ValueError(
            "the adapters were made after DistributedDataParallel (or accelerate's prepare), which averages the "
            "gradients of the parameters that it was given then: the processes would train models of their own. Adapt "
            "the model first (apply_reslora, load_adapter, add_adapter and set_adapter), then wrap it"
        )
    _around[root] = weakref.ref(ddp)


def share(model: nn.Module, root: nn.Module, tensors: Iterable[Tensor]) -> None:
    """Give all processes of a wrapper around ``root`` the first one's values, as it does itself when it is made.

    Args:
        model: what the caller was given: ``root``, or something around it.
    """
    if not initialised():
        return
    kind = nn.parallel.DistributedDataParallel
    given = next((module for module in model.modules() if isinstance(module, kind)), None)
    met = _around.get(root)
    ddp: Any = given if given is not None else None if met is None else met()
    if ddp is not None:
        first = torch.distributed.get_global_rank(ddp.process_group, 0)
        with torch.no_grad():
            for tensor in tensors:
                torch.distributed.broadcast(tensor, first, group=ddp.process_group)

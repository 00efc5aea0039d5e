"""Parameters that are spread over processes (DTensors): told apart, gathered whole, filled from whole values.

torch.distributed's parts are imported where processes were started only: they cost most of a second.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

_FLAT = "FullyShardedDataParallel (FSDP1) is not supported: use shard_reslora(model, blocks)"


def initialised() -> bool:
    """Whether this process belongs to a group; else nothing can be sharded."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_sharded(model: nn.Module) -> bool:
    """Whether a parameter of ``model`` is a DTensor, or a module of it is managed by FSDP2 (also while gathered)."""
    if not initialised():
        return False
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in model.parameters()) or any(
        isinstance(module, FSDPModule) for module in model.modules()
    )


def is_dtensor(tensor: Any) -> bool:
    """Whether ``tensor`` is spread over processes."""
    if tensor is None or not initialised():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def placements_of(tensor: Any) -> str:
    """How ``tensor`` is spread over processes, in words for a message; "whole" where it is not."""
    return str(tensor.placements) if is_dtensor(tensor) else "whole"


def refuse_sharded(model: nn.Module, action: str, alternative: str) -> None:
    """ValueError if ``model`` is sharded over processes: by FSDP2, tensor parallelism or FSDP1."""
    refuse_flat(model)
    if is_sharded(model):
        raise ValueError(f"model is sharded over processes and cannot be {action}: {alternative}")


def refuse_fsdp(model: nn.Module, action: str, alternative: str) -> None:
    """ValueError if FSDP shards ``model``; a tensor parallel model passes."""
    refuse_flat(model)
    if is_fsdp(model):
        raise ValueError(f"model is sharded over processes and cannot be {action}: {alternative}")


def is_fsdp(model: nn.Module) -> bool:
    """Whether FSDP2 manages a module of ``model``, or a parameter is spread over several dimensions of a mesh."""
    if not initialised():
        return False
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    return any(isinstance(module, FSDPModule) for module in model.modules()) or any(
        isinstance(parameter, DTensor) and parameter.device_mesh.ndim > 1 for parameter in model.parameters()
    )


def refuse_flat(model: nn.Module) -> None:
    """ValueError for a model in FSDP1's wrapper, whose parameters are views into one flat one, or empty."""
    if not initialised():
        return
    from torch.distributed.fsdp import FullyShardedDataParallel

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(_FLAT)


def refuse_flattened(parameter: Any) -> None:
    """The same for a parameter of a model somewhere inside that wrapper, as its forward runs."""
    flat = sys.modules.get("torch.distributed.fsdp._flat_param")
    if flat is not None and (parameter.dim() < 2 or isinstance(parameter._base, flat.FlatParameter)):
        raise ValueError(_FLAT)


def whole_shape(parameter: Any) -> tuple[int, ...]:
    """The shape of a parameter while it is whole, where ZeRO-3 may have spread it."""
    return tuple(parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape)


def is_partitioned(parameter: Any) -> bool:
    """Whether DeepSpeed's ZeRO-3 has spread a parameter over processes, each of which holds a part of it, or none.

    It has its whole shape (``ds_shape``) and no values but while it is gathered.
    """
    return hasattr(parameter, "ds_shape") and tuple(parameter.shape) != whole_shape(parameter)


def refuse_partitioned(model: nn.Module) -> None:
    """ValueError for a model of which ZeRO-3 has spread a parameter."""
    for name, parameter in model.named_parameters():
        if is_partitioned(parameter):
            raise ValueError(
                f"parameter {name!r} is partitioned by DeepSpeed ZeRO-3: gather it first "
                "(deepspeed.zero.GatheredParameters), or call save_adapter in all processes and go on in one"
            )


def under_zero3(model: nn.Module) -> bool:
    """Whether DeepSpeed's ZeRO-3 manages a parameter of ``model``, gathered or not (``ds_id``)."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def refuse_zero3(model: nn.Module) -> None:
    """ValueError for a model of which DeepSpeed's ZeRO-3 manages a parameter, gathered or not (``ds_id``).

    It gathers what a module owns for that module's own forward; PEFT's layers hold weight and adapters in other ones.
    """
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise ValueError(
                f"parameter {name!r} is managed by DeepSpeed ZeRO-3, which does not gather what PEFT's layers "
                "share: train with ZeRO-2, with FSDP2 (shard_reslora), or adapt the model with apply_reslora"
            )


def reshard(model: nn.Module) -> None:
    """Make FSDP2's sharded parameters the registered ones. Gathered ones are copies, in the policy's dtype."""
    if not initialised():
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def class_of(module: nn.Module) -> type[nn.Module]:
    """The module's class, without the one that FSDP2 derives from it for a sharded module."""
    if not initialised():
        return type(module)
    from torch.distributed.fsdp import FSDPModule

    classes = [cls for cls in type(module).__mro__ if issubclass(cls, nn.Module) and not issubclass(cls, FSDPModule)]
    return classes[0]


def mesh_of(model: nn.Module) -> Any:
    """The device mesh over which FSDP2 or tensor parallelism spread a parameter of ``model``; None if there is none."""
    if not initialised():
        return None
    from torch.distributed.tensor import DTensor

    return next((p.device_mesh for p in model.parameters() if isinstance(p, DTensor)), None)


def whole(tensor: Tensor) -> Tensor:
    """The values of a tensor that may be spread over processes, all of which must ask together; no autograd."""
    tensor = tensor.detach()
    return cast(Any, tensor).full_tensor() if is_dtensor(tensor) else tensor


def gathered(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
    """Every tensor whole, in main memory, and the device mesh that they were sharded over (None if none was).

    With a mesh, all its processes must call this together and the result is the same in all of them. Of parameters
    that DeepSpeed's ZeRO-3 has spread it is that of its process group.
    """
    spread: list[Any] = [tensor for tensor in tensors.values() if hasattr(tensor, "ds_id")]
    if spread:
        from deepspeed import zero
        from torch.distributed.device_mesh import DeviceMesh

        with zero.GatheredParameters(spread):
            whole = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        return whole, DeviceMesh.from_group(spread[0].ds_process_group, spread[0].device.type)
    if not initialised():
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, None
    from torch.distributed.tensor import DTensor

    whole = {}
    mesh = None
    for name, tensor in tensors.items():
        plain = tensor.detach()
        if isinstance(plain, DTensor):
            mesh = plain.device_mesh
            plain = plain.full_tensor()
        whole[name] = plain.cpu().contiguous()
    return whole, mesh


@contextmanager
def one_writer(mesh: Any) -> Iterator[bool]:
    """True in the one process of ``mesh`` that is to write files; the others wait until it has.

    Raises:
        RuntimeError: in the others, when the writer failed. Nobody is left waiting.
    """
    if mesh is None:
        yield True
        return
    writes = not any(mesh.get_coordinate())
    failed = torch.zeros(1, device=mesh.device_type)
    try:
        yield writes
    except BaseException:
        failed += 1
        raise
    finally:
        for dim in range(mesh.ndim):
            torch.distributed.all_reduce(failed, group=mesh.get_group(dim))
    if failed.item():
        raise RuntimeError("the process that writes the files failed; see its error")


def fill(parameter: Tensor, values: Tensor) -> None:
    """Copy whole ``values``, the same in all processes, into a parameter, which may be sharded. No communication."""
    if initialised():
        from torch.distributed.tensor import DTensor, distribute_tensor

        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            values = values.to(mesh.device_type, parameter.dtype)
            values = distribute_tensor(values, mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(values)

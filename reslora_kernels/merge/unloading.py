"""unload and merge_and_unload: the model without a trace of its adapters, for who serves or saves it as a plain one."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..adapt.apply import replace_modules
from ..adapt.checkpoints import release
from ..adapt.record import adapted_layers, record_of, refuse_beside, root_of
from ..checks import check_bool
from ..dtensors import refuse_fsdp
from ..layers.adapter import AdapterLayer
from ..layers.quantized_linear import QuantizedResLoRALinear
from ..quantizers import quantizer_of
from .merging import merge_reslora


def unload(model: nn.Module) -> nn.Module:
    """Take every adapter out: the layers are again what they were before ``apply_reslora``, with the weights of now.

    A merged model keeps the merge in its weights. Of quantised layers the dequantised ones (``dequantize=True``) stay,
    as plain ``nn.Linear``s of the dtype around them, and the model's quantisation config leaves them out from then on.
    A model that is not merged computes what its base does. Adapters that are not in force go too. What trains and what
    is frozen stays as it is.

    Returns:
        ``model``.

    Raises:
        TypeError, ValueError: ``model`` is not adapted, or is sharded over processes.
        RuntimeError: statistics of it are being collected. In every case the model is as it was.
    """
    layers = _unloadable(model)
    root, record = root_of(model), record_of(model)
    for adapter in (record, *(other.record for other in record.others.values())):
        for hook in adapter.hooks:
            hook.remove()
    for rows in record.tables.values():
        rows.remove()
    plain = {id(layer): layer.leave() for layer in layers.values()}
    replace_modules(root, plain)
    dense = [
        plain[id(layer)] for layer in layers.values() if isinstance(layer, QuantizedResLoRALinear) and layer.merged
    ]
    if dense:
        fit_in(root, dense)
    release(root)
    del root.__dict__["_reslora"]
    return model


def _unloadable(model: nn.Module) -> dict[str, AdapterLayer]:
    """The adapted layers, if they can be taken out now."""
    layers = adapted_layers(model)
    refuse_beside(model, "unloaded", "call unload or merge_and_unload of the PeftModel")
    refuse_fsdp(model, "unloaded", "unload it before it is sharded")
    if any(layer.observer is not None for layer in layers.values()):
        raise RuntimeError("statistics of this model are being collected: unload it after that")
    return layers


def fit_in(root: nn.Module, dense: list[nn.Linear]) -> None:
    """Give dequantised layers the dtype of the model around them, and name them in its quantisation config as dense."""
    own = {id(parameter) for linear in dense for parameter in linear.parameters()}
    around = (p.dtype for p in root.parameters() if p.is_floating_point() and id(p) not in own)
    dtype = next(around, dense[0].weight.dtype)
    for linear in dense:
        linear.to(dtype)
    settings = getattr(getattr(root, "config", None), "quantization_config", None)
    for field in ("llm_int8_skip_modules", "modules_to_not_convert"):
        if hasattr(settings, field):
            plain = [name for name, m in root.named_modules() if isinstance(m, nn.Linear) and quantizer_of(m) is None]
            setattr(settings, field, plain)


def merge_and_unload(model: nn.Module, *, safe_merge: bool = True, **merge: Any) -> nn.Module:
    """``merge_reslora(model, keep_original=False, **merge)``, unless it is merged already, then ``unload``.

    Args:
        safe_merge: taken for those who know it from PEFT, and either way the same: every merge makes all merged weights
            and checks them for NaN and Inf before the first is put in place.
        merge: arguments of ``merge_reslora`` (``method``, ``calibration``, ...), but ``keep_original``.

    Returns:
        ``model``, with plain layers: ``save_pretrained`` writes what any Transformers model has.

    Raises:
        TypeError, ValueError, RuntimeError: as ``merge_reslora`` and ``unload``. The model is as it was then.
    """
    check_bool("safe_merge", safe_merge)
    _unloadable(model)
    if record_of(model).merged is None:
        merge_reslora(model, keep_original=False, **merge)
    elif merge:
        raise ValueError(f"model is merged already: give no arguments of a merge, got {', '.join(sorted(merge))}")
    return unload(model)

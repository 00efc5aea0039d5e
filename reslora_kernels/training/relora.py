"""ReLoRA (Lialin et al., arXiv 2307.05695): merge what was learnt, start the adapters afresh, train on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..adapt.record import adapted_layers, record_of, refuse_beside
from ..merge.merging import MergeReport, merge_reslora


def restart_reslora(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, **merge: Any) -> MergeReport:
    """Merge the adapters into the frozen weights for good and start them again, so that the updates' ranks add up.

        for step, batch in enumerate(batches):
            if step and step % 1000 == 0:
                restart_reslora(model, optimizer, calibration=batches[:16])
            ...

    From then on the weights are not those of the base model: save the whole model (``state_dict``); ``save_adapter``
    and ``export_peft`` refuse.

    Args:
        model: an adapted model; changed in place.
        optimizer: what trains it; it forgets its state of the adapters, which belongs to the old ones. The learning
            rate is the caller's: ReLoRA warms it up again.
        merge: arguments of ``merge_reslora`` other than ``keep_original`` and ``dequantize``.

    Returns:
        what ``merge_reslora`` returns.

    Raises:
        TypeError, ValueError: as ``merge_reslora``, or the model has several adapters, which share the weights, or
            magnitudes (``use_dora``). The model and the optimizer are unchanged then.
    """
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer or None, got {type(optimizer).__name__}")
    if unknown := merge.keys() & {"keep_original", "dequantize"}:
        raise TypeError(f"a restart merges for good, into plain weights: it takes no {', '.join(sorted(unknown))}")
    layers, record = adapted_layers(model), record_of(model)
    refuse_beside(model, "restarted", "its save_pretrained would leave the merged weights out; use apply_reslora")
    if record.others:
        raise ValueError(f"the adapters {[record.name, *record.others]} share the weights: delete the others first")
    if record.config.use_dora:
        raise ValueError("magnitudes (use_dora=True) are not low-rank updates that add up: train without them")
    report = merge_reslora(model, keep_original=False, **merge)
    record.merged = None
    record.restarts += 1
    for layer in layers.values():
        layer.merged = False
        layer.reset_lora_parameters()
        for parameter in layer.adapter_parameters().values():
            parameter.grad = None
            if optimizer is not None:
                optimizer.state.pop(parameter, None)
    return report

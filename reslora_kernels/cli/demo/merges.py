"""After training: every merge of a model and what it costs, and the exported adapter as PEFT sees it."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from reslora_kernels.adapt.record import record_of
from reslora_kernels.cli.demo.fine_tuning import evaluate, inputs
from reslora_kernels.config import MergeMethod
from reslora_kernels.files.peft_export import export_peft
from reslora_kernels.layers.shortcuts import hands_on
from reslora_kernels.merge.merging import merge_reslora, unmerge_reslora
from reslora_kernels.merge.statistics import Statistics, collect_statistics

EXACT = (None,)  # in place of a list of methods


@dataclass(frozen=True)
class Merge:
    """One merge. ``loss_added`` is against the unmerged model; ``worst_layer`` the largest error of a layer's term."""

    method: str
    loss: float
    loss_added: float
    worst_layer: float | None


@dataclass(frozen=True)
class PeftComparison:
    """The exported adapter, loaded by PEFT, against the model that was merged here by the same method."""

    method: str
    max_lora_rank: int
    logit_difference: float
    largest_logit: float
    loss: float
    merged_loss: float


def methods_of(model: nn.Module) -> tuple[MergeMethod | None, ...]:
    """Every merge method of a model; None alone where the merge is exact and there is nothing to choose."""
    config = record_of(model).config
    return get_args(MergeMethod) if hands_on(config.shortcut, config.pre_num) else EXACT


def gather_statistics(model: nn.Module, batches: Tensor) -> Statistics | None:
    """Statistics of ``batches`` [count, sequences, bytes] in evaluation mode; None where merging needs none."""
    if methods_of(model) == EXACT:
        return None
    with torch.no_grad(), collect_statistics(model) as statistics:
        for batch in batches:
            model(**inputs(batch))
    return statistics


def measure_merge(
    model: nn.Module, method: MergeMethod | None, statistics: Statistics | None, evaluation: Tensor, loss: float
) -> Merge:
    """Merge, evaluate, and restore the model. ``loss`` is the unmerged model's."""
    report = merge_reslora(model, method, statistics=statistics)
    merged_loss = evaluate(model, evaluation)
    unmerge_reslora(model)
    return Merge(method or "exact", merged_loss, merged_loss - loss, report.worst())


def compare_with_peft(
    model: nn.Module, base: nn.Module, folder: Path, statistics: Statistics | None, evaluation: Tensor
) -> PeftComparison:
    """Export to ``folder`` with the configured merge, load that onto a copy of ``base`` with PEFT, and compare."""
    from peft import PeftModel

    exported = export_peft(model, folder, statistics=statistics)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's use of names that Transformers has renamed
        served = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    merge_reslora(model, statistics=statistics)
    with torch.no_grad():
        ours, theirs = model(**inputs(evaluation)).logits, served(**inputs(evaluation)).logits
    merged_loss = evaluate(model, evaluation)
    unmerge_reslora(model)
    method = methods_of(model)[0] and record_of(model).config.merge
    return PeftComparison(
        method or "exact",
        exported.max_lora_rank,
        (ours - theirs).abs().max().item(),
        ours.abs().max().item(),
        evaluate(served, evaluation),
        merged_loss,
    )

"""add_weighted_adapter: one plain adapter out of several, by a weighted sum of what each of them merges to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..adapt.record import adapted_layers, record_of, root_of
from ..adapt.switching import adapter_names, add_adapter, in_place_of_the_active_one, set_adapter
from ..adapt.targets import endings_of
from ..checks import check_int
from ..config import MergeMethod, ResLoRAConfig
from .closed_form import LowRankUpdate
from .merging import compute_updates

Combination = Literal["svd", "cat", "linear"]
Weighted = list[tuple[float, LowRankUpdate]]


def add_weighted_adapter(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: Combination = "svd",
    svd_rank: int | None = None,
    *,
    method: MergeMethod | None = None,
    calibration: Iterable[Any] | None = None,
) -> nn.Module:
    """Add the adapter Σ w_i ΔW_i, ΔW_i being what adapter i merges to; ``set_adapter`` puts it in force.

    It is plain LoRA (shortcut "none", scaling 1) in every layer that one of the adapters has. As PEFT's method of this
    name computes it, with merged updates for A and B.

    Args:
        adapters: names of the model's adapters; ``weights``: a number for each, negative ones included.
        combination_type: "svd": the best approximation of the sum of rank ``svd_rank``; "cat": the exact sum, of the
            ranks' sum; "linear": A and B are summed by themselves, with √|w s| for both factors, which needs one rank
            and is another map than the sum of updates.
        svd_rank: for "svd"; None is the largest rank of an update.
        method, calibration: as for ``merge_reslora``; batches are needed where an adapter's shortcut does not merge
            exactly.

    Returns:
        ``model``, with the adapter in force that was so before.

    Raises:
        TypeError, ValueError: as ``merge_reslora`` and ``add_adapter``; an adapter is not there, there are not as many
            weights, a magnitude (DoRA) or grouped convolution does not add up, or ranks do not go together. The model
            is as it was then.
    """
    _check(model, adapters, weights, adapter_name, combination_type, svd_rank)
    updates = _merged(model, adapters, method, calibration)
    names = dict.fromkeys(name for of_adapter in updates for name in of_adapter)
    weighted = {
        name: [(w, found[name]) for w, found in zip(weights, updates, strict=True) if name in found] for name in names
    }
    combined = {name: _combined(name, parts, combination_type, svd_rank) for name, parts in weighted.items()}
    r = max(len(a) for a, _ in combined.values())
    config = ResLoRAConfig(r=r, lora_alpha=r, target_modules=endings_of(root_of(model), list(names)), shortcut="none")
    add_adapter(model, adapter_name, config)
    with in_place_of_the_active_one(model, adapter_name), torch.no_grad():
        for name, layer in adapted_layers(model).items():
            a, b = combined[name]
            layer.lora_A.copy_(nn.functional.pad(a, (0, 0, 0, r - len(a))))
            layer.lora_B.copy_(nn.functional.pad(b, (0, r - len(a))))
    return model


def _check(
    model: nn.Module, adapters: Any, weights: Any, adapter_name: str, combination_type: Any, svd_rank: int | None
) -> None:
    known = adapter_names(model)
    if isinstance(adapters, str) or not adapters or not set(adapters) <= set(known):
        raise ValueError(f"adapters must be names of the model's adapters {known}, got {adapters!r}")
    if len(set(adapters)) != len(adapters) or len(weights) != len(adapters):
        raise ValueError(f"there must be a weight for each adapter, each named once: got {adapters!r}, {weights!r}")
    if adapter_name in known:
        raise ValueError(f"adapter_name must be a new one, got {adapter_name!r}: the model has {known}")
    if not all(isinstance(w, (int, float)) and not isinstance(w, bool) and math.isfinite(w) for w in weights):
        raise TypeError(f"weights must be finite numbers, got {weights!r}")
    if combination_type not in get_args(Combination):
        raise ValueError(f"combination_type must be one of {get_args(Combination)}, got {combination_type!r}")
    if svd_rank is not None:
        check_int("svd_rank", svd_rank, 1, None)
        if combination_type != "svd":
            raise ValueError(f"svd_rank is for combination_type='svd', got {svd_rank} with {combination_type!r}")


def _merged(
    model: nn.Module, adapters: Sequence[str], method: MergeMethod | None, calibration: Iterable[Any] | None
) -> list[dict[str, LowRankUpdate]]:
    """What each adapter merges to; the one in force stays so."""
    record = record_of(model)
    before = [record.name, *record.together]
    updates = []
    try:
        for adapter in adapters:
            set_adapter(model, adapter)
            for name, layer in adapted_layers(model).items():
                if layer.lora_magnitude_vector is not None or layer.kernel_groups > 1:
                    raise ValueError(f"layer {name!r} of adapter {adapter!r} is no update that adds up (DoRA, groups)")
            updates.append(compute_updates(model, method, calibration=calibration))
    finally:
        set_adapter(model, before)
    return updates


def _combined(name: str, parts: Weighted, how: str, svd_rank: int | None) -> tuple[Tensor, Tensor]:
    """A [r, K] and B [N, r] of one layer, for scaling 1."""
    if how == "cat":
        return torch.cat([w * update.scaling * update.a for w, update in parts]), torch.cat([u.b for _, u in parts], 1)
    ranks = {update.rank for _, update in parts}
    if how == "linear":
        if len(ranks) > 1:
            raise ValueError(f"combination_type='linear' needs updates of one rank, and those of {name!r} have {ranks}")
        roots = [math.sqrt(abs(w * update.scaling)) for w, update in parts]
        signs = [math.copysign(1.0, w) for w, _ in parts]
        a = [sign * root * update.a for sign, root, (_, update) in zip(signs, roots, parts, strict=True)]
        b = [root * update.b for root, (_, update) in zip(roots, parts, strict=True)]
        return torch.stack(a).sum(0), torch.stack(b).sum(0)
    delta = torch.stack([w * update.delta() for w, update in parts]).sum(0)
    u, sizes, v = torch.linalg.svd(delta, full_matrices=False)
    r = min(svd_rank or max(ranks), len(sizes))
    return v[:r], u[:, :r] * sizes[:r]

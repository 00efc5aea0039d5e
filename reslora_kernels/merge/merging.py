"""Shortcuts folded into the frozen weights and restored bit for bit, and a model without a trace of its adapters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ..adapt.apply import replace_modules
from ..adapt.checkpoints import release
from ..adapt.coverage import table
from ..adapt.execution import call_with, undisturbed
from ..adapt.linking import passes_on
from ..adapt.obstacles import refuse_fused
from ..adapt.record import (
    Record,
    complete_layers,
    in_force,
    layers_in_place,
    record_of,
    refuse_beside,
    refuse_incomplete,
    root_of,
)
from ..adapt.surroundings import release_methods
from ..adapt.trained_tokens import heads_with_adapters
from ..checks import check_bool, check_int, check_number
from ..config import MergeMethod, ResLoRAConfig
from ..dtensors import is_sharded, refuse_fsdp, refuse_partitioned
from ..layers.adapter import AdapterLayer
from ..layers.quantized_linear import QuantizedResLoRALinear
from ..layers.shortcuts import hands_on
from ..quantizers import quantizer_of
from .closed_form import NEVER_RAN, LowRankUpdate, summed_updates, updates_of_chain
from .joint_fit import joint_updates
from .sequential import sequential_updates
from .statistics import Statistics, collect_statistics


@dataclass(frozen=True)
class MergeRow:
    """One merged layer; ``relative_error`` is that of its low-rank output on the data, None if not measured."""

    name: str
    method: str
    rank: int
    relative_error: float | None


@dataclass(frozen=True)
class MergeReport:
    """What a merge did to each layer. ``str()`` gives a table."""

    rows: tuple[MergeRow, ...]

    def worst(self) -> float | None:
        """The largest relative error that was measured; None if none was."""
        return max((row.relative_error for row in self.rows if row.relative_error is not None), default=None)

    def __str__(self) -> str:
        rows = [
            (row.name, row.method, str(row.rank), "-" if row.relative_error is None else f"{row.relative_error:.2e}")
            for row in self.rows
        ]
        return table(("layer", "merge", "rank", "relative error"), rows)


@dataclass(frozen=True)
class Merged:
    """A merge in force: the updates, and the weights as they were (None when they were not kept)."""

    updates: dict[str, LowRankUpdate]
    originals: dict[str, Any] | None


def merge_reslora(
    model: nn.Module,
    method: MergeMethod | None = None,
    *,
    statistics: Statistics | None = None,
    calibration: Iterable[Any] | None = None,
    sequential: bool = False,
    joint_steps: int = 0,
    extra_rank: int = 0,
    regularization: float = 1e-6,
    keep_original: bool = True,
    dequantize: bool = False,
) -> MergeReport:
    """Fold every adapted layer's term into its weight: W*_n = W_n + ΔW_n, computed in float32 or better, rounded once.

    ``none`` and ``block`` merge exactly, whatever the method, and need no data; neither does ``input`` with "weights".
    Every other merge is an approximation and needs ``statistics`` or ``calibration``. A layer that never ran on those
    merges as plain LoRA, and the report says so. Of several adapters in force the sum is merged, if each is exact.

    Args:
        model: an adapted model; changed in place.
        method: "input", "weights" (the paper's, Section 3.3) or "least_squares"; None takes ``config.merge``.
        statistics: from ``collect_statistics``.
        calibration: batches to collect them from, run here in evaluation mode: a mapping calls ``model(**batch)``, a
            tuple or list ``model(*batch)``, anything else ``model(batch)``. Padding counts as any other input, but for
            the output in a joint fit: batches without it are better.
        sequential: fit layer n of every chain on the model whose layers before n are merged already (least_squares
            only, ``calibration`` re-iterable). Runs the model once per batch, and once more for each position of the
            longest chain but the first; or twice for each, if ``calibration`` is no list or once a GiB of the unmerged
            model's r values per token and layer is kept.
        joint_steps: afterwards, steps of a joint fit of A and B of all layers to the unmerged model's output
            (least_squares only, ``calibration`` re-iterable; see ``reslora_kernels.merge.joint_fit``). A step costs a
            forward and a backward pass of one batch, and another forward pass if ``calibration`` is no list or once a
            GiB of its outputs is kept on the model's device; each layer another K² values beside its statistics. 128
            steps over 16 batches are a good start.
        extra_rank: rows that the joint fit adds to A and columns to B, as far as r + extra_rank is within min(N, K).
            It comes nearer then, in some models only after a second or third try: as a merged weight for nothing, as an
            exported adapter for a larger rank. Needs one more pass, forward and backward, over ``calibration`` and N K
            values for each layer meanwhile. The adapter's r is a good start.
        regularization: λ as a share of the mean diagonal of G_n.
        keep_original: keep the weights, in main memory, so that ``unmerge_reslora`` can restore them.
        dequantize: let dequantised weights take the place of quantised ones, which cannot hold an update; kept
            originals are the quantised layers themselves. ``export_peft`` needs no such thing.

    Returns:
        the method, rank and relative error of every layer.

    Raises:
        TypeError, ValueError: an argument is not as above, data is missing, an update holds NaN or Inf, a weight is
            shared with another module, quantised or fused with others, or the model is sharded over processes; or
            several adapters are in force of which one hands on. The model is unchanged then.
    """
    adapters = in_force(model)
    layers = _places(adapters)
    record = record_of(model)
    check_bool("keep_original", keep_original)
    if record.merged is not None:
        raise ValueError("model is merged already; call unmerge_reslora(model) first")
    check_bool("dequantize", dequantize)
    quantized = next((name for name, layer in layers.items() if isinstance(layer, QuantizedResLoRALinear)), None)
    if quantized and not dequantize:
        raise ValueError(
            f"layer {quantized!r} has a quantised weight, which cannot hold an update: export_peft(model, path) keeps "
            "the adapter apart from it, merge_reslora(..., dequantize=True) merges into dequantised weights"
        )
    grouped = next((name for name, layer in layers.items() if layer.kernel_groups > 1), None)
    if grouped:
        raise ValueError(
            f"layer {grouped!r} has groups={layers[grouped].kernel_groups} and an A that sees all channels: "
            "no weight in groups can hold its update. export_peft(model, path) keeps the adapter apart"
        )
    refuse_fused(root_of(model), layers)
    for one, own in adapters:
        refuse_incomplete(root_of(model), one, own)
        _refuse_tied(root_of(model), one, own)
    updates = compute_updates(
        model, method,
        statistics=statistics, calibration=calibration, sequential=sequential, joint_steps=joint_steps,
        extra_rank=extra_rank, regularization=regularization,
    )  # fmt: skip
    merged_weights: dict[str, Tensor] = {}
    for name, layer in layers.items():
        merged_weights[name] = layer.with_update(updates[name].delta()).to(layer.merged_dtype)
        if not torch.isfinite(merged_weights[name]).all():
            raise ValueError(f"layer {name!r}: the merged weight holds NaN or Inf; nothing was merged")
    originals = {name: layer.original() for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.set_merged(merged_weights.pop(name))
    _mark(adapters, True)
    for rows in record.tables.values():
        rows.merge(keep_original)
    record.merged = Merged(updates, originals if keep_original else None)
    return MergeReport(
        tuple(MergeRow(name, update.method, update.rank, update.relative_error) for name, update in updates.items())
    )


def unmerge_reslora(model: nn.Module) -> nn.Module:
    """Restore the weights from before ``merge_reslora``, bit for bit, and let the adapters run again.

    Raises:
        ValueError: the model is not merged, was merged with ``keep_original=False``, or is sharded over processes.
    """
    adapters = in_force(model)
    refuse_fsdp(model, "unmerged", "unmerge it before it is sharded")
    record = record_of(model)
    if record.merged is None:
        raise ValueError("model is not merged: there is nothing to restore")
    if record.merged.originals is None:
        raise ValueError("model was merged with keep_original=False: its weights can only be loaded from a checkpoint")
    for name, layer in _places(adapters).items():
        layer.restore(record.merged.originals[name])
    _mark(adapters, False)
    for rows in record.tables.values():
        rows.unmerge()
    record.merged = None
    return model


def _places(adapters: Sequence[tuple[Record, Mapping[str, AdapterLayer]]]) -> dict[str, AdapterLayer]:
    """The layer whose weight is merged into, by the name that adapters in force may share."""
    return {name: layer for _, layers in reversed(adapters) for name, layer in layers.items()}


def _mark(adapters: Sequence[tuple[Record, Mapping[str, AdapterLayer]]], merged: bool) -> None:
    """Say of all adapters that the weights hold them, or do not."""
    for _, layers in adapters:
        for layer in layers.values():
            layer.merged = merged


def compute_updates(
    model: nn.Module,
    method: MergeMethod | None,
    *,
    statistics: Statistics | None = None,
    calibration: Iterable[Any] | None = None,
    sequential: bool = False,
    joint_steps: int = 0,
    extra_rank: int = 0,
    regularization: float = 1e-6,
) -> dict[str, LowRankUpdate]:
    """The plain update of every adapted layer, by name; arguments and errors as for ``merge_reslora``."""
    refuse_partitioned(model)
    refuse_fsdp(model, "merged or exported", "save_adapter(model, path), then load and merge it in one process")
    _check_arguments(method, statistics, calibration, sequential, joint_steps, regularization)
    if record_of(model).together:
        return summed_updates(root_of(model), in_force(model))
    layers = complete_layers(model)
    if (sequential or joint_steps) and is_sharded(model):
        raise ValueError(
            f"a tensor parallel model merges without sequential={sequential} and joint_steps={joint_steps}, which "
            "change layers while they run: save_adapter(model, path), then load and merge it in one process"
        )
    record = record_of(model)
    config = record.config
    exact = not any(passes_on(chain) for chain in record.chains)
    method = method or config.merge
    if not exact:
        _check_method(config, method, statistics, calibration, sequential, joint_steps)
    _check_extra_rank(extra_rank, joint_steps)
    if exact:
        calibration = None  # data would change nothing
    if calibration is not None and (joint_steps or not sequential):
        with undisturbed(model), collect_statistics(model) as statistics:
            for batch in calibration:
                call_with(model, batch)
    _check_statistics(statistics, layers)
    seen = {layer: statistics.layers[name] for name, layer in layers.items()} if statistics else None
    if calibration is not None and sequential:
        by_layer = sequential_updates(model, record.chains, calibration, regularization)
    else:
        by_layer = {}
        for chain in record.chains:
            of_chain = [seen[layer] for layer in chain.layers] if seen else None
            by_layer |= zip(chain.layers, updates_of_chain(chain, method, of_chain, regularization), strict=True)
    if joint_steps and calibration is not None and seen:
        fitted = {
            layer: update
            for layer, update in by_layer.items()
            if update.method != NEVER_RAN and hands_on(layer.config.shortcut, layer.config.pre_num)
        }
        by_layer |= joint_updates(model, fitted, seen, calibration, joint_steps, extra_rank)
    return {name: by_layer[layer] for name, layer in layers.items()}


def _check_arguments(
    method: str | None,
    statistics: Statistics | None,
    calibration: Iterable[Any] | None,
    sequential: bool,
    joint_steps: int,
    regularization: float,
) -> None:
    allowed = get_args(MergeMethod)
    if method is not None and method not in allowed:
        raise ValueError(f"method must be None or one of {', '.join(map(repr, allowed))}, got {method!r}")
    if statistics is not None and not isinstance(statistics, Statistics):
        raise TypeError(f"statistics must come from collect_statistics, got {type(statistics).__name__}")
    if statistics is not None and calibration is not None:
        raise ValueError("give statistics or calibration, not both")
    if calibration is not None and (
        not isinstance(calibration, Iterable) or isinstance(calibration, (Mapping, Tensor, str, bytes))
    ):
        raise TypeError(f"calibration must be an iterable of batches, got {type(calibration).__name__}")
    check_bool("sequential", sequential)
    check_int("joint_steps", joint_steps, 0, None)
    check_number("regularization", regularization, "a finite number of 0 or more", lambda v: v >= 0)


def _check_method(
    config: ResLoRAConfig,
    method: str,
    statistics: Statistics | None,
    calibration: Iterable[Any] | None,
    sequential: bool,
    joint_steps: int,
) -> None:
    """What a merge needs that is fitted, because some layer hands on."""
    again = "sequential=True" if sequential else f"joint_steps={joint_steps}" if joint_steps else None
    if again and (method != "least_squares" or calibration is None or iter(calibration) is calibration):
        raise ValueError(
            f"{again} needs method='least_squares' and calibration as a list or another re-iterable, "
            f"got method {method!r} and calibration of type {type(calibration).__name__}"
        )
    needs_data = not (config.shortcut == "input" and method == "weights")
    if needs_data and statistics is None and calibration is None:
        hint = ", or method='weights', which needs none" if config.shortcut == "input" else ""
        raise ValueError(
            f"merging shortcut {config.shortcut!r} with method {method!r} needs data: pass calibration=<batches> or "
            f"statistics=<from collect_statistics>{hint}"
        )


def _check_extra_rank(extra_rank: int, joint_steps: int) -> None:
    check_int("extra_rank", extra_rank, 0, None)
    if extra_rank and not joint_steps:
        raise ValueError(f"extra_rank={extra_rank} needs joint_steps: only a joint fit makes updates wider")


def _check_statistics(statistics: Statistics | None, layers: dict[str, AdapterLayer]) -> None:
    if statistics is None:
        return
    if statistics.layers.keys() != layers.keys():
        raise ValueError("statistics were collected from another model: their layers are not this model's")
    for name, layer in layers.items():
        if statistics.layers[name].sizes != layer.whole_A_shape:
            raise ValueError(
                f"statistics were collected from another model: A of {name!r} was "
                f"{list(statistics.layers[name].sizes)} there, it is {list(layer.whole_A_shape)} here"
            )
    if not any(seen.calls for seen in statistics.layers.values()):
        raise ValueError("statistics hold no batch: run the model inside collect_statistics")


def _refuse_tied(root: nn.Module, record: Record, layers: Mapping[str, AdapterLayer]) -> None:
    owners: dict[int, str] = {}
    weights = {id(layer.weight): name for name, layer in layers.items()}
    tied = {
        f"{head}.weight" for heads in heads_with_adapters(root, record, layers).values() for head in heads
    }  # change alike
    for name, parameter in root.named_parameters(remove_duplicate=False):
        if id(parameter) in weights and name not in tied:
            first = owners.setdefault(id(parameter), name)
            module, other = root.get_submodule(name.rpartition(".")[0]), root.get_submodule(first.rpartition(".")[0])
            if module is not other:
                raise ValueError(
                    f"weight {name!r} is shared with {first!r}: merging would change both. export_peft(model, path) "
                    "keeps the adapter apart; ensure_weight_tying=True adapts embedding and head as one; or give "
                    f"{name!r} a weight of its own before it is adapted, with tie_word_embeddings=False in the config"
                )


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
    for layer in layers.values():
        layer.stand_alone()
    plain = {id(layer): layer.leave() for layer in layers.values()}
    replace_modules(root, plain)
    dense = [
        plain[id(layer)] for layer in layers.values() if isinstance(layer, QuantizedResLoRALinear) and layer.merged
    ]
    if dense:
        fit_in(root, dense)
    release(root)
    release_methods(root)
    del root.__dict__["_reslora"]
    return model


def _unloadable(model: nn.Module) -> dict[str, AdapterLayer]:
    """The adapted layers in their places, if they can be taken out now."""
    layers = layers_in_place(model)
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

"""export_peft: the merged result as a PEFT LoRA adapter, which PEFT, Transformers and inference servers load."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import lcm
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..adapt.checkpoints import Beside, beside, named_buffers, named_parameters
from ..adapt.record import TOKENS, complete_layers, record_of, refuse_restarted, root_of
from ..adapt.switching import only_in_force
from ..adapt.targets import endings_of
from ..adapt.trained_tokens import heads_with_adapters
from ..checks import check_bool
from ..config import MergeMethod
from ..dtensors import class_of, gathered, mesh_of, one_writer, refuse_partitioned, reshard, whole
from ..layers.adapter import AdapterLayer
from ..layers.convolution import TransposedResLoRALinear
from ..layers.experts import ResLoRAExperts
from ..layers.linear import ResLoRALinear
from ..merge.closed_form import NEVER_RAN, LowRankUpdate
from ..merge.merging import compute_updates
from ..merge.statistics import Statistics
from .adapter_format import (
    checked_folder,
    one_at_a_time,
    parsed_tensors,
    regular,
    serialized,
    sync_folder,
    write_durably,
)
from .model_card import CARD_NAME, Card, may_write_card, merges_of
from .peft_compatibility import (
    endings_of_parameters,
    flat,
    one_by_one,
    parameter_of,
    refuse_no_expert_names,
    refuse_rewritten,
    refuse_twice_registered,
    refuse_untied,
    task_of,
    wrapper_names,
)

Layout = Literal["peft", "diffusers"]

PREFIX = "base_model.model."
PEFT_TOKENS = "token_adapter.trainable_tokens_delta"
LORA_NAME = "pytorch_lora_weights.safetensors"
_COMPONENTS = {r".*UNet.*": "unet", r".*Transformer\d*D?Model": "transformer", "CLIPTextModel": "text_encoder"}
_READ_BY_PIPELINES = (
    "unet", "prior", "transformer", "transformer_ref", "text_encoder", "text_encoder_2", "connectors",
    "text_conditioner",
)  # fmt: skip


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    ``max_lora_rank`` is what a server must be started with at least; ``never_ran`` names the layers that the
    calibration never reached, which are plain LoRA.
    """

    path: Path
    ranks: Mapping[str, int]
    max_lora_rank: int
    relative_error: float | None
    never_ran: tuple[str, ...] = ()

    def __str__(self) -> str:
        error = "" if self.relative_error is None else f", largest relative error of a layer {self.relative_error:.2e}"
        never = f"\nnever ran, so exported as plain LoRA: {', '.join(self.never_ran)}" if self.never_ran else ""
        return (
            f"LoRA adapter for {len(self.ranks)} modules in {self.path}{error}\n"
            f"max_lora_rank a server needs: {self.max_lora_rank}{never}"
        )


def export_peft(
    model: nn.Module,
    path: str | os.PathLike[str],
    method: MergeMethod | None = None,
    *,
    statistics: Statistics | None = None,
    calibration: Iterable[Any] | None = None,
    sequential: bool = False,
    joint_steps: int = 0,
    extra_rank: int = 0,
    regularization: float = 1e-6,
    pattern: bool = False,
    layout: Layout = "peft",
    per_expert: bool = False,
    component: str | None = None,
    adapter_name: str | None = None,
) -> ExportReport:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``: A and B per module, the scaling folded into B.

    Every module gets the same rank, padded with zeros, and ``lora_alpha = r``: some servers mis-scale per-module
    patterns. A model that is merged exports that merge; else the arguments say how, as for ``merge_reslora``, and the
    model is left unmerged. Trained biases travel as PEFT's ``bias="all"``, other modules as ``modules_to_save``, and
    what is frozen but not in the base checkpoint (see ``save_adapter``) under its own name, as PEFT saves resized
    embeddings. ``README.md`` is a model card, so the folder can be uploaded to the Hub as it is; one that no export
    wrote is left alone. With a model that was merged and then sharded by ``fully_shard`` all processes call this; the
    first writes.

    Args:
        path: folder; made if need be.
        pattern: give every module its exact rank through ``rank_pattern`` and ``alpha_pattern`` instead.
        layout: "peft", or "diffusers": ``pytorch_lora_weights.safetensors``, which ``pipe.load_lora_weights`` takes. It
            holds LoRA matrices only, of one rank. Exports of the pipeline's parts to one folder share the file.
        per_expert: write the adapters of experts that are held as one tensor as those of linear layers, one for each
            expert, by the names in the model's checkpoint (``experts.0.gate_proj``): what vLLM loads for Mixtral,
            Qwen2- and Qwen3-MoE, DeepSeek and OLMoE. It takes those of models whose checkpoints hold one tensor
            (GPT-OSS, Qwen3.5-MoE, Gemma 4) as PEFT writes them.
        component: what the pipeline calls the model ("unet", "text_encoder_2"), for layout "diffusers"; None asks its
            class.
        adapter_name: which adapter of the model, in force or not; None is the one in force.

    Returns:
        the ranks, and the ``max_lora_rank`` that a server needs.

    Raises:
        TypeError, ValueError: as ``merge_reslora``; or merge arguments for a model that is merged already; or a trained
            parameter that the layout cannot hold; or a layer that PEFT would not put back where it was, being
            registered twice or named like a part of fused experts; or the model has lost an adapted layer or is
            partitioned by ZeRO-3, or ``path`` holds a whole model. Nothing is written then.
    """
    how: dict[str, Any] = {
        "method": method, "statistics": statistics, "calibration": calibration, "sequential": sequential,
        "joint_steps": joint_steps, "extra_rank": extra_rank, "regularization": regularization,
    }  # fmt: skip
    with only_in_force(model, adapter_name):
        return _export(model, path, pattern, layout, per_expert, component, how)


def _export(
    model: nn.Module,
    path: str | os.PathLike[str],
    pattern: bool,
    layout: Layout,
    per_expert: bool,
    component: str | None,
    how: Mapping[str, Any],
) -> ExportReport:
    """``export_peft`` of the adapter in force, merged as ``how`` says."""
    layers = complete_layers(model)
    refuse_restarted(model)
    refuse_partitioned(model)
    folder = checked_folder(path)
    check_bool("pattern", pattern)
    check_bool("per_expert", per_expert)
    kind = refuse_no_expert_names(root_of(model)) if per_expert else None
    part = _part(root_of(model), layout, component, pattern)
    _refuse_whole_model(folder)
    refuse_twice_registered(root_of(model), layers)
    refuse_untied(root_of(model), record_of(model).tables)
    for name, layer in layers.items():
        if layer.exports is not None:
            raise ValueError(f"layer {name!r} cannot be exported: {layer.exports}; merge the model and save it whole")
    merged = record_of(model).merged
    if merged is not None:
        if any(value not in (None, False, 0) for name, value in how.items() if name != "regularization"):
            raise ValueError(
                "model is merged already and exports that merge: give no method, statistics, calibration, sequential, "
                "joint_steps or extra_rank"
            )
        updates: dict[str, LowRankUpdate] = merged.updates
    else:
        updates = compute_updates(model, **how)
    ranks = {name: update.rank for name, update in updates.items()}
    rank = max(ranks.values())
    rank += -rank % lcm(*(layer.kernel_groups for layer in layers.values()))
    reshard(model)
    others = beside(model)
    if part is not None:
        _refuse_more_than_lora(others)
    tensors: dict[str, Tensor] = {}
    of_parameters = {parameter_of(name): name for name, layer in layers.items() if isinstance(layer, ResLoRAExperts)}
    wrappers = wrapper_names(root_of(model), of_parameters)
    apart: dict[str, tuple[Tensor, Tensor]] = {}
    heads = heads_with_adapters(root_of(model), record_of(model), layers)
    for name, update in updates.items():
        layer, width = layers[name], update.rank if pattern else rank
        a, b = update.a, update.b * update.scaling
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise ValueError(f"layer {name!r}: the update holds NaN or Inf; nothing was written")
        if isinstance(layer, ResLoRALinear):
            held = _for_peft(name, layer, a, b, width)
            matrices = {f"{name}.{own}": matrix for own, matrix in held.items()}
            for head in heads.get(name, ()):  # of which PEFT's A and B are the embedding's B and A, transposed
                pair = reversed([*held.values()])
                matrices |= {f"{head}.lora_{which}.weight": each.T for which, each in zip("AB", pair, strict=True)}
        else:
            padding = width - update.rank
            a, b = nn.functional.pad(a, (0, 0, 0, padding)), nn.functional.pad(b, (0, padding))
            if kind is not None and a.dim() == 3:
                apart |= (pairs := one_by_one(kind, parameter_of(name), a, b))
            else:
                pairs = {wrappers[parameter_of(name)]: flat(a, b)}
            matrices = {
                f"{module}.lora_{which}.weight": matrix
                for module, pair in pairs.items()
                for which, matrix in zip("AB", pair, strict=True)
            }
        tensors |= {own: matrix.to("cpu", layer.lora_A.dtype).contiguous() for own, matrix in matrices.items()}
        if layer.lora_magnitude_vector is not None:  # PEFT divides by its own norm of W + ΔW
            weight = layer.with_update(update.delta()) if merged is None else layer.dense_weight(torch.float32)
            signs = whole(layer.lora_magnitude_vector.detach())
            magnitudes = torch.linalg.vector_norm(weight, dim=1).copysign(signs)
            # PEFT's files leave ".weight" out and it reads both; Transformers and diffusers read this alone
            tensors[f"{name}.lora_magnitude_vector.weight"] = magnitudes.to("cpu", layer.lora_A.dtype)
    biases, modules = _trained_whole(root_of(model), layers, others)
    extra, _ = gathered(_under_pefts_names(_with_whole(root_of(model), modules, others), layers, modules))
    for name, tensor in extra.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"parameter {name!r} holds NaN or Inf; nothing was written")
    linear = [name for name, layer in layers.items() if isinstance(layer, ResLoRALinear)]
    linear += [head for of_table in heads.values() for head in of_table]
    config = _peft_config(root_of(model), linear, rank, biases, modules)
    written_apart = {
        parameter_of(name) for name, layer in layers.items() if kind is not None and layer.lora_A.dim() == 3
    }
    if parameters := [name for name in of_parameters if name not in written_apart]:
        config["target_parameters"] = endings_of_parameters(root_of(model), parameters)
    if apart:
        of_experts = {name.rpartition(".")[2] for name in apart}
        config["target_modules"] = [*_listed(config["target_modules"]), *sorted(of_experts)]
    config["ensure_weight_tying"] = any(heads.values())
    config["use_dora"] = record_of(model).config.use_dora
    config["trainable_token_indices"] = {
        name: list(table.indices) for name, table in record_of(model).tables.items()
    } or None
    config["fan_in_fan_out"] = any(isinstance(layer, TransposedResLoRALinear) for layer in layers.values())
    if part is None and not apart:
        refuse_rewritten(root_of(model), config, {PREFIX + name: tensor for name, tensor in tensors.items()})
    if pattern:
        ranks = {parameter_of(name): r for name, r in ranks.items()}
        config["rank_pattern"] = {_alone(name, ranks): r for name, r in ranks.items() if r != rank}
        config["alpha_pattern"] = dict(config["rank_pattern"])
    with one_writer(mesh_of(model)) as writes:
        if writes:
            if part is None:
                weights = {f"{PREFIX}{name}": tensor for name, tensor in (tensors | extra).items()}
                files = {
                    "adapter_model.safetensors": serialized(weights),
                    "adapter_config.json": (json.dumps(config, indent=2) + "\n").encode(),
                }
            else:
                files = {LORA_NAME: _content_beside(folder, part, tensors)}
            if may_write_card(folder):
                base, others_said = config["base_model_name_or_path"], {} if part is None else merges_of(folder)
                card = Card(base, record_of(model).config, updates, rank, part, others_said)
                files[CARD_NAME] = str(card).encode()
            _write(folder, files)
    errors = [update.relative_error for update in updates.values() if update.relative_error is not None]
    never_ran = tuple(name for name, update in updates.items() if update.method == NEVER_RAN)
    return ExportReport(folder, ranks, rank, max(errors, default=None), never_ran)


def _for_peft(name: str, layer: ResLoRALinear, a: Tensor, b: Tensor, rank: int) -> dict[str, Tensor]:
    """The layer's update as PEFT holds it; ValueError, which names it, where it cannot."""
    try:
        return layer.for_peft(a, b, rank)
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}; nothing was written") from None


def _part(root: nn.Module, layout: str, component: str | None, pattern: bool) -> str | None:
    """What the pipeline calls the model; None for PEFT's layout."""
    if layout not in get_args(Layout):
        raise ValueError(f"layout must be 'peft' or 'diffusers', got {layout!r}")
    if layout == "diffusers":
        if pattern:
            raise ValueError("layout='diffusers' has no place for patterns: pattern must be False, got True")
        return _component_of(root, component)
    if component is not None:
        raise ValueError(f"component is for layout='diffusers', got {component!r} with layout='peft'")
    return None


def _refuse_whole_model(folder: Path) -> None:
    """Transformers adds an adapter that it finds beside a model's weights, merged ones too."""
    if (folder / "config.json").exists() and any((*folder.glob("model*.safetensors"), *folder.glob("*model*.bin"))):
        raise ValueError(
            f"path {str(folder)!r} holds a whole model: Transformers would load it with the adapter on top of it; give "
            "the adapter a folder of its own"
        )


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    with one_at_a_time(folder):
        for file, content in files.items():
            write_durably(folder / f".{file}.tmp", content)
            os.replace(folder / f".{file}.tmp", folder / file)
        sync_folder(folder)


def _peft_config(root: nn.Module, names: list[str], rank: int, biases: bool, modules: list[str]) -> dict[str, Any]:
    base = getattr(root, "config", None)
    return {
        "peft_type": "LORA",
        "task_type": (task := task_of(root)),
        "auto_mapping": None
        if task
        else {"base_model_class": class_of(root).__name__, "parent_library": class_of(root).__module__},
        "base_model_name_or_path": getattr(base, "_name_or_path", None) or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "bias": "all" if biases else "none",
        "target_modules": endings_of(root, names) if names else [],
        "modules_to_save": modules or None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def _alone(name: str, names: Iterable[str]) -> str:
    """A key of ``rank_pattern`` for one layer: PEFT takes it for an ending, which others' names may have."""
    return f"^{name}$" if any(other.endswith(f".{name}") for other in names) else name


def _trained_whole(root: nn.Module, layers: Mapping[str, AdapterLayer], others: Beside) -> tuple[bool, list[str]]:
    """Whether biases were trained by themselves, and the modules that were trained whole or have moved statistics."""
    trained = [name for name in others.trained if not name.endswith(("bias", f".{TOKENS}"))]
    modules = sorted({name.rpartition(".")[0] for name in trained})
    inside = named_parameters(root)
    for module in modules:
        part = f"{module}." if module else ""
        frozen = [
            name.removeprefix(part)
            for name, parameter in inside.items()
            if name.startswith(part) and name not in others.trained and not parameter.requires_grad
        ]
        if frozen or module in layers:
            raise ValueError(f"a PEFT adapter saves whole modules, but of trained {module!r} {frozen[:3]} is frozen")
    biases = [name for name in others.trained if name.endswith("bias")]
    moved = {name.rpartition(".")[0] for name in others.frozen if name in named_buffers(root)}
    return any(not _is_in(name, modules) for name in biases), modules + sorted(
        name for name in moved if not _is_in(f"{name}.", modules)
    )


def _with_whole(root: nn.Module, modules: list[str], others: Beside) -> Beside:
    """``others`` with all that is in ``modules``: PEFT looks for the whole of each, its buffers included."""
    inside = named_parameters(root) | named_buffers(root)
    rest = {name: v for name, v in inside.items() if _is_in(name, modules) and name not in others.trained}
    return Beside(others.trained, others.frozen | rest)


def _listed(target_modules: list[str] | str) -> list[str]:
    """``target_modules`` as a list, for more to be added; a regular expression as a ValueError."""
    if isinstance(target_modules, str):
        raise ValueError(
            f"per_expert=True needs target_modules as a list, and only a regular expression ({target_modules!r}) means "
            "the adapted layers: export with per_expert=False"
        )
    return target_modules


def _is_in(name: str, modules: list[str]) -> bool:
    owner = name.rpartition(".")[0]
    return any(owner == module or owner.startswith(module + ".") for module in modules)


def _under_pefts_names(others: Beside, layers: Mapping[str, AdapterLayer], modules: list[str]) -> dict[str, Tensor]:
    """The parameters beside the adapters; PEFT holds those of an adapted layer in its ``base_layer``."""
    named: dict[str, Tensor] = {}
    wrapped = [
        parameter_of(name).rpartition(".")[0] for name, layer in layers.items() if isinstance(layer, ResLoRAExperts)
    ]
    for name, parameter in (others.trained | others.frozen).items():
        owner, _, leaf = name.rpartition(".")
        if leaf == TOKENS:
            named[f"{owner}.{PEFT_TOKENS}"] = parameter
            continue
        depth = 0 if _is_in(name, modules) else (owner in layers) + wrapped.count(owner)
        named[".".join((owner, *["base_layer"] * depth, leaf)) if depth else name] = parameter
    return named


def _component_of(root: nn.Module, component: str | None) -> str:
    """What the pipeline calls the model; ValueError where its class does not say it and ``component`` is None."""
    if component is not None:
        if component not in _READ_BY_PIPELINES:
            raise ValueError(
                f"component must be a part that pipelines load adapters of ({', '.join(_READ_BY_PIPELINES)}), "
                f"got {component!r}. The second transformer of a pipeline (Wan 2.2) goes into a folder of its own as "
                "component='transformer', and is loaded with load_into_transformer_2=True"
            )
        return component
    name = type(root).__name__
    for pattern, part in _COMPONENTS.items():
        if re.fullmatch(pattern, name):
            return part
    raise ValueError(
        f"component must say which part of its pipeline the {name} is ('text_encoder_2', say): its class does not"
    )


def _refuse_more_than_lora(others: Beside) -> None:
    """ValueError if there is more to save than LoRA matrices, which are all that the file can hold."""
    for name in (*others.trained, *others.frozen):
        raise ValueError(
            f"layout='diffusers' holds LoRA matrices only, and the model has other parameters to save: {name!r}; "
            "freeze it, or use layout='peft'"
        )


def _content_beside(folder: Path, component: str, tensors: Mapping[str, Tensor]) -> bytes:
    """The file with the tensors of this part of the pipeline; those of others that are in ``folder`` stay."""
    path = folder / LORA_NAME
    others = parsed_tensors(regular(path).read_bytes(), LORA_NAME) if path.exists() else {}
    kept = {key: tensor for key, tensor in others.items() if not key.startswith(f"{component}.")}
    return serialized(kept | {f"{component}.{key}": tensor for key, tensor in tensors.items()})

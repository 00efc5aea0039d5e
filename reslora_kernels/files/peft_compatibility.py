"""Adapters as PEFT wants them: its names for those of parameters, its tasks, and what it makes of an export.

PEFT wraps the module that holds adapted parameters (``target_parameters``) once for each of them, in the order in which
they are registered: the last one's A and B are the outermost wrapper's, the one before is in its ``base_layer``, and so
on. A [E, r, K] is written as [E r, K], expert by expert, and B [E, N, r] as [N, r E], the experts innermost. Servers
want one module per expert.

PEFT rewrites an adapter for a Transformers model before it loads it, so that those from before Transformers 5 fit
models whose experts are fused since: ``gate_proj`` is taken for a part of the experts, in dense blocks too. What comes
out of that is compared here with what went in.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..config import PARAMETER_ADAPTER, matches
from ..layers.experts import TargetParameter
from ..layers.wrappers import module_at

EXPERT_PARTS = {  # how the experts of a checkpoint are called, by model type: (parts of gate_up_proj, down_proj, block)
    "mixtral": (("w1", "w3"), "w2", ("mlp", "block_sparse_moe")),
    "qwen2_moe": (("gate_proj", "up_proj"), "down_proj", None),
    "qwen3_moe": (("gate_proj", "up_proj"), "down_proj", None),
    "deepseek_v2": (("gate_proj", "up_proj"), "down_proj", None),
    "deepseek_v3": (("gate_proj", "up_proj"), "down_proj", None),
    "olmoe": (("gate_proj", "up_proj"), "down_proj", None),
}
_CAUSAL = ("input_ids", "attention_mask", "inputs_embeds", "labels")
_TASKS = {  # ending of the class name: the task, and what PEFT's class for it passes to the model by keyword
    "ForCausalLM": ("CAUSAL_LM", _CAUSAL),
    "ForConditionalGeneration": (
        "SEQ_2_SEQ_LM", (*_CAUSAL, "decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds"),
    ),
}  # fmt: skip


def task_of(model: nn.Module) -> str | None:
    """PEFT's task type for a model; None for one that does not take the arguments of that task (Whisper, LLaVA)."""
    accepted = inspect.signature(model.forward).parameters
    for ending, (task, needed) in _TASKS.items():
        if type(model).__name__.endswith(ending) and all(name in accepted for name in needed):
            return task
    return None


def refuse_twice_registered(root: nn.Module, names: Mapping[str, nn.Module]) -> None:
    """ValueError if a layer has two places in the model: PEFT puts its own in one of them only."""
    places: dict[int, list[str]] = {}
    for parent_name, parent in root.named_modules():
        for name, child in parent._modules.items():
            places.setdefault(id(child), []).append(f"{parent_name}.{name}" if parent_name else name)
    for layer in names.values():
        if len(places[id(layer)]) > 1:
            first, second = places[id(layer)][:2]
            raise ValueError(
                f"layer {first!r} is {second!r} too, and PEFT would put an adapter in one of the places only: merge "
                "the model and save it whole instead; nothing was written"
            )


def refuse_untied(root: nn.Module, tables: Iterable[str]) -> None:
    """ValueError if trained tokens are those of a shared weight, and PEFT would not know that it is shared."""
    if getattr(getattr(root, "config", None), "tie_word_embeddings", False):
        return
    for name in tables:
        weight = root.get_submodule(name).weight
        for other, module in root.named_modules():
            if other != name and module._parameters.get("weight") is weight:
                raise ValueError(
                    f"{other!r} shares its weight with {name!r}, whose trained tokens PEFT would not give it, as the "
                    "model's config has no tie_word_embeddings: merge the model and save it whole; nothing was written"
                )


def refuse_rewritten(root: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """ValueError if PEFT would load ``tensors`` into other places than they were made for."""
    if not hasattr(getattr(root, "config", None), "model_type"):
        return  # PEFT rewrites adapters of Transformers models only
    try:
        from peft import LoraConfig
        from peft.utils.transformers_weight_conversion import (
            convert_peft_adapter_state_dict_for_transformers,
            convert_peft_config_for_transformers,
        )
    except ImportError as error:
        _refuse_fused_experts(root, error)
        return
    read = LoraConfig(
        r=config["r"], lora_alpha=config["lora_alpha"], target_modules=config["target_modules"],
        target_parameters=config.get("target_parameters"),
    )  # fmt: skip
    meant, parameters = read.target_modules, set(read.target_parameters or ())
    try:
        convert_peft_config_for_transformers(read, model=root, conversions=None)
    except ValueError as error:
        raise ValueError(f"{_rewritten(root, str(meant))} ({error})") from error
    if set(getattr(read, "target_parameters", None) or ()) != parameters or _parts(read.target_modules) != _parts(
        meant
    ):
        lost = _parts(meant) - _parts(read.target_modules)
        raise ValueError(_rewritten(root, ", ".join(sorted(lost)) or str(meant)))
    found = convert_peft_adapter_state_dict_for_transformers(root, read, dict(tensors))
    moved = next((key for key, tensor in tensors.items() if found.get(key) is not tensor), None)
    if moved is not None:
        raise ValueError(_rewritten(root, moved))


def _parts(target_modules: Any) -> set[str]:
    return set(target_modules) if not isinstance(target_modules, str) else set()


def _rewritten(root: nn.Module, what: str) -> str:
    return (
        f"PEFT puts {what} of a {type(root).__name__} under another name, as it does with fused experts and with "
        "layers that Transformers renames, so that another model would be loaded: leave these layers out "
        "(exclude_modules), or merge the model and save it whole; nothing was written"
    )


def _refuse_fused_experts(root: nn.Module, error: ImportError) -> None:
    """Without PEFT's own rules at hand, a model with fused experts cannot be checked against them."""
    for name, parameter in root.named_parameters():
        if parameter.dim() == 3 and name.endswith(("gate_up_proj", "down_proj")):
            raise ValueError(
                f"model has fused experts ({name!r}), whose adapters PEFT rewrites: install peft 0.19 or newer, so "
                "that what it makes of them can be checked; nothing was written"
            ) from error


def wrapper_names(root: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Where PEFT holds the adapters of the parameters ``names``: by name, that of the wrapper's module."""
    of_owner: dict[str, set[str]] = {}
    for name in names:
        owner, _, own = name.rpartition(".")
        of_owner.setdefault(owner, set()).add(own)
    found: dict[str, str] = {}
    for owner, wanted in of_owner.items():
        outermost = [own for own in reversed(module_at(root, owner)._parameters) if own in wanted]
        for depth, own in enumerate(outermost):
            found[f"{owner}.{own}" if owner else own] = ".".join(filter(None, (owner, *["base_layer"] * depth)))
    return found


def parameter_of(layer_name: str) -> str:
    """The parameter's name, from that of its adapter."""
    return layer_name.removesuffix(PARAMETER_ADAPTER)


def flat(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A [E, r, K] and B [E, N, r] as PEFT writes them; matrices as they are."""
    if a.dim() == 2:
        return a, b
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def unflattened(a: Tensor, b: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The inverse of ``flat``."""
    if not num_experts:
        return a, b
    by_expert = b.reshape(b.shape[0], -1, num_experts)
    return a.reshape(num_experts, -1, a.shape[-1]), by_expert.permute(2, 0, 1)


def endings_of_parameters(root: nn.Module, names: Sequence[str]) -> list[str]:
    """``target_parameters`` that mean the parameters ``names`` and no others: their last two words where those do."""
    every = [name for name, _ in root.named_parameters() if not _is_adapter(name)]
    chosen = set()
    for name in names:
        ending = ".".join(name.split(".")[-2:])
        alone = all(other in names for other in every if matches(other, [ending]))
        chosen.add(ending if alone else name)
    return sorted(chosen)


def _is_adapter(name: str) -> bool:
    return any(part.endswith(PARAMETER_ADAPTER) for part in name.split("."))


def targets_in(root: nn.Module, wanted: Iterable[str]) -> dict[str, TargetParameter]:
    """The parameters that an adapter file's ``target_parameters`` means, by name."""
    endings = list(wanted)
    return {
        name: TargetParameter(module_at(root, name.rpartition(".")[0]), name.rpartition(".")[2])
        for name, _ in root.named_parameters(remove_duplicate=False)
        if matches(name, endings)
    }


def refuse_no_expert_names(root: nn.Module) -> str:
    """The model type, if it is known how a server calls its experts one by one; else a ValueError."""
    kind = getattr(getattr(root, "config", None), "model_type", None)
    if kind not in EXPERT_PARTS:
        raise ValueError(
            f"per_expert=True is for models whose checkpoints hold experts one by one ({', '.join(EXPERT_PARTS)}), got "
            f"{kind!r}: servers take those of other models as PEFT writes them, with per_expert=False"
        )
    return str(kind)


def one_by_one(kind: str, parameter: str, a: Tensor, b: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """A [r, K] and B [N, r] of every expert's linear layers, by the names that the checkpoint has for them.

    The two halves of ``gate_up_proj`` share their A.
    """
    halves, down, renamed = EXPERT_PARTS[kind]
    owner, _, own = parameter.rpartition(".")
    if renamed is not None:
        owner = owner.replace(f".{renamed[0]}.", f".{renamed[1]}.")
    names = halves if own == "gate_up_proj" else (down,)
    return {
        f"{owner}.{e}.{name}": (a[e], part)
        for e in range(a.shape[0])
        for name, part in zip(names, b[e].chunk(len(names)), strict=True)
    }

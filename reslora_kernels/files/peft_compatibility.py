"""What PEFT makes of an exported adapter: which task its model class serves, and whether it loads what was written.

PEFT rewrites an adapter for a Transformers model before it loads it, so that those from before Transformers 5 fit
models whose experts are fused since: ``gate_proj`` is taken for a part of the experts, in dense blocks too. What comes
out of that is compared here with what went in.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

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
        f"PEFT takes {what} of a {type(root).__name__} for parts of its fused experts, so that another model would be "
        "loaded: leave these layers out (exclude_modules), or merge the model and save it whole; nothing was written"
    )


def _refuse_fused_experts(root: nn.Module, error: ImportError) -> None:
    """Without PEFT's own rules at hand, a model with fused experts cannot be checked against them."""
    for name, parameter in root.named_parameters():
        if parameter.dim() == 3 and name.endswith(("gate_up_proj", "down_proj")):
            raise ValueError(
                f"model has fused experts ({name!r}), whose adapters PEFT rewrites: install peft 0.19 or newer, so "
                "that what it makes of them can be checked; nothing was written"
            ) from error

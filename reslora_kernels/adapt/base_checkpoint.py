"""What of a Transformers model its base checkpoint does not define: task heads, new parameters, resized embeddings.

Loaded anew, the base model has other values there. So heads are trained whole, and all of it is saved with the adapter.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from ..layers.adapter import ADAPTER_PARAMETERS
from .record import without_compiled

_HEADED = re.compile(r"Classification|QuestionAnswering|MultipleChoice")
_HEAD_NAMES = ("classifier", "score", "qa_outputs")  # PEFT's, for classes that do not say what their base model is


def task_heads(model: nn.Module) -> list[str]:
    """The parts of a model for a task (``...ForSequenceClassification``) that are not its base model; else none.

    They are the root's children beside ``base_model``. Language models have an output head, which is the checkpoint's.
    """
    base = getattr(model, "base_model", None)
    if base is None or not _HEADED.search(type(model).__name__) or output_head(model) is not None:
        return []
    return [
        name
        for name, child in model.named_children()
        if any(True for _ in child.parameters()) and (name in _HEAD_NAMES if base is model else child is not base)
    ]


def named_parameters(root: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter by its plain name, without what wrappers put in; a shared one under each of its names."""
    return {
        without_compiled(name).replace(".base_layer.", "."): parameter
        for name, parameter in root.named_parameters(remove_duplicate=False)
    }


def undefined(model: nn.Module) -> set[str]:
    """Parameters that the base checkpoint does not define, as far as is known: new ones, and those of task heads."""
    heads = tuple(f"{name}." for name in task_heads(model))
    return made_anew(model) | {name for name in named_parameters(model) if name.startswith(heads)}


def output_head(model: nn.Module) -> nn.Module | None:
    """The language-model head as Transformers names it; None for other models."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return head if isinstance(head, nn.Module) else None


def made_anew(model: nn.Module) -> set[str]:
    """Parameters that ``from_pretrained`` did not find in the checkpoint, or that were put in since.

    Transformers marks those which it found. Where it marked none (a model made from a config), nothing is known.
    """
    marked = {
        name: getattr(parameter, "_is_hf_initialized", False)
        for name, parameter in named_parameters(model).items()
        if name.rpartition(".")[2] not in ADAPTER_PARAMETERS
    }
    return {name for name, found in marked.items() if not found} if any(marked.values()) else set()


def resized_embeddings(model: nn.Module) -> list[str]:
    """Names of the input and output embeddings if the vocabulary has another size than in the base model's config.

    That config is read from the folder or from the local cache of the Hub; without one nothing is known.
    """
    config: Any = getattr(model, "config", None)
    source = getattr(config, "_name_or_path", None)
    embeddings = getattr(model, "get_input_embeddings", None)
    if not source or not callable(embeddings) or not hasattr(config, "get_text_config"):
        return []
    try:
        base: Any = type(config).from_pretrained(source, local_files_only=True)
    except (OSError, ValueError):  # no longer there, or another kind of model's
        return []
    if base.get_text_config().vocab_size == config.get_text_config().vocab_size:
        return []
    changed = [module for module in (embeddings(), output_head(model)) if module is not None]
    return [name for name, module in model.named_modules() if any(module is one for one in changed)]

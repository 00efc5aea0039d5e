"""An adapted model and checkpoints: what the base's does not define, and so is saved too, and what loading one does.

Of a Transformers model that is task heads, new parameters and resized embeddings: loaded anew, the base model has other
values there. Of any model it is the running statistics of its normalisations, which move while it trains. A parameter
that the model holds under several names (tied embeddings) is saved under each, so that a model in which they are apart
gets all of it, and one in which they are tied can tell whether it was saved from such.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..dtensors import whole
from ..layers.adapter import ADAPTER_PARAMETERS, AdapterLayer
from ..layers.wrappers import without_wrappers
from .record import TOKENS, Record, adapted_layers, record_of, root_of

_HEADED = re.compile(r"Classification|QuestionAnswering|MultipleChoice")
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_TRAINED_WHOLE, _ORIGINAL = ".modules_to_save.", ".original_module."  # in the names of what PEFT trains whole
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
    return _plainly(root, dict(root.named_parameters(remove_duplicate=False)))[0]


def named_buffers(root: nn.Module) -> dict[str, Tensor]:
    """Every buffer that a state dict holds, by its plain name."""
    found = {
        f"{path}.{name}" if path else name: buffer
        for path, module in root.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }
    return _plainly(root, found)[0]


def _plainly(root: nn.Module, tensors: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """Tensors of ``root`` by their plain names, and the names of those that PEFT trains whole in copies.

    Of such a copy for each adapter, that of the one in force is what the model has under the name.
    """
    record = vars(root).get("_reslora")
    names = {without_wrappers(name).replace(".base_layer.", "."): tensor for name, tensor in tensors.items()}
    if record is None or record.layers is None:
        return names, set()
    copies = {name: name.partition(_TRAINED_WHOLE) for name in names if _TRAINED_WHOLE in name}
    own = {
        owner + inside.removeprefix(record.name): names[name]
        for name, (owner, _, inside) in copies.items()
        if inside.startswith(f"{record.name}.")
    }
    return {name.replace(_ORIGINAL, "."): t for name, t in names.items() if name not in copies} | own, set(own)


def statistics_of(root: nn.Module) -> dict[str, Tensor]:
    """Copies of the running statistics of a model's normalisations, as far as they have values."""
    return {
        name: whole(buffer).to("cpu", copy=True)
        for name, buffer in named_buffers(root).items()
        if name.rpartition(".")[2] in _STATISTICS and not buffer.is_meta
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


def input_embedding(model: nn.Module) -> nn.Module | None:
    """The input embedding as Transformers names it; None for other models."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        embedding = get() if callable(get) else None
    except NotImplementedError:  # Transformers' way to say that a model has none
        return None
    return embedding if isinstance(embedding, nn.Module) else None


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
    embedding = input_embedding(model)
    if not source or embedding is None or not hasattr(config, "get_text_config"):
        return []
    try:
        base: Any = type(config).from_pretrained(source, local_files_only=True)
    except (OSError, ValueError):  # no longer there, or another kind of model's
        return []
    before, now = (getattr(one.get_text_config(), "vocab_size", None) for one in (base, config))
    if before == now:  # both None: a model of images
        return []
    changed = [module for module in (embedding, output_head(model)) if module is not None]
    return [name for name, module in model.named_modules() if any(module is one for one in changed)]


@dataclass(frozen=True)
class Beside:
    """Parameters by name: those that train, and those that are frozen and saved all the same; buffers too."""

    trained: dict[str, nn.Parameter]
    frozen: dict[str, Tensor]


def beside(model: nn.Module) -> Beside:
    """What of an adapted model is saved beside its adapters."""
    root, record = root_of(model), record_of(model)
    adapters = {id(p) for layer in adapted_layers(model).values() for p in layer.adapter_parameters().values()}
    named, by_peft = _plainly(root, dict(root.named_parameters(remove_duplicate=False)))
    others = {name: p for name, p in named.items() if id(p) not in adapters}
    _refuse_outside(model, root)
    resized = tuple(f"{without_wrappers(name)}." for name in resized_embeddings(root))
    kept = {
        id(p)
        for name, p in others.items()
        if name in record.kept or name.startswith(resized) or record.noted.has_changed(name, p)
    }
    trained = {name: p for name, p in others.items() if p.requires_grad or name in by_peft}
    frozen: dict[str, Tensor] = {
        name: p for name, p in others.items() if id(p) in kept and p.is_floating_point() and name not in trained
    }
    return Beside(trained, frozen | {name: b for name, b in named_buffers(root).items() if has_moved(name, b, record)})


def trained_beside(root: nn.Module) -> set[str]:
    """The parameters that train now, but for those of adapters: saved from here on, though they be frozen then."""
    trained = {name for name, p in named_parameters(root).items() if p.requires_grad}
    return {name for name in trained if name.rpartition(".")[2] not in ADAPTER_PARAMETERS}


def _refuse_outside(model: nn.Module, root: nn.Module) -> None:
    """ValueError, which names it, for what trains in ``model`` and is no part of ``root``, which has the adapters."""
    inside = {id(parameter) for parameter in root.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in inside:
            raise ValueError(
                f"{name!r} trains beside the {type(root).__name__} that was adapted and would not be saved with it: "
                f"adapt the {type(model).__name__} as a whole (modules_to_save=, target_modules=), or give the adapted "
                "part alone and save the rest yourself"
            )


def has_moved(name: str, buffer: Tensor, record: Record) -> bool:
    """Whether a buffer is a running statistic that is not as it was, or a file gave it its values."""
    before = record.statistics.get(name)
    return name in record.kept or (before is not None and not torch.equal(before.to(buffer.dtype), whole(buffer).cpu()))


def check_shared(root: nn.Module, names: Collection[str], values: Mapping[str, Tensor]) -> None:
    """ValueError if ``values`` holds one of ``names`` that a shared parameter has, and not the same under all others.

    One parameter cannot take two values, nor take one while the file leaves its other name as it was.
    """
    groups: dict[int, list[str]] = {}
    for name, parameter in named_parameters(root).items():
        groups.setdefault(id(parameter), []).append(name)
    for group in groups.values():
        given = [name for name in group if name in names]
        for name in group if given else ():
            if name not in names or not torch.equal(values[name], values[given[0]]):
                raise ValueError(
                    f"the adapter was trained with {given[0]!r} apart from {name!r}, which are one parameter in this "
                    "model: untie them first (tie_word_embeddings=False, and a copy of the weight)"
                )


_HANDLES = "_reslora_state_dict_hooks"
_ADAPTERS = "reslora_adapters"  # in a state dict's metadata, of which adapters it is


def guard(root: nn.Module) -> None:
    """Let an adapted root watch its state dicts; once, however many adapters it gets."""
    if _HANDLES not in root.__dict__:
        watch = _Watch()
        root.__dict__[_HANDLES] = [
            root.register_state_dict_post_hook(_name_adapters),  # type: ignore[no-untyped-call]
            root.register_load_state_dict_pre_hook(watch.before),  # type: ignore[no-untyped-call]
            root.register_load_state_dict_post_hook(watch.after),  # type: ignore[no-untyped-call]
        ]


def release(root: nn.Module) -> None:
    """The inverse of ``guard``."""
    for handle in root.__dict__.pop(_HANDLES, ()):
        handle.remove()


def _name_adapters(module: nn.Module, state: Mapping[str, Any], prefix: str, about: dict[str, Any]) -> None:
    """Hook of an adapted root: the metadata of its state dict says of which adapters that is."""
    record: Record = vars(module)["_reslora"]
    about[_ADAPTERS] = names = [record.name, *record.together]
    if aside := sorted(record.others.keys() - set(names)):
        warnings.warn(
            f"the state dict holds what is in force, adapter {' and '.join(map(repr, names))}, and nothing of "
            f"{', '.join(map(repr, aside))}: save_adapter(model, path, adapter_name=...) saves each",
            stacklevel=2,
        )


class _Watch:
    """Hooks of an adapted root around state_dict and load_state_dict, whose keys do not say of which adapter they are.

    Adapters for some layers only are no base checkpoint. A layer by itself takes a checkpoint without its adapters for
    one of the base model; only the root sees all keys.
    """

    def __init__(self) -> None:
        self.absent: list[str] = []
        self.is_base = False

    def before(self, module: nn.Module, state: Mapping[str, Any], prefix: str, about: Any, *_: Any) -> None:
        record: Record = vars(module)["_reslora"]
        given = (about or {}).get(_ADAPTERS)
        names = [record.name, *record.together]
        if given is not None and given != names and {*names, *record.others}.issuperset(given):
            raise ValueError(
                f"the state dict is of adapter {' and '.join(map(repr, given))}, and {' and '.join(map(repr, names))} "
                f"is in force: call set_adapter(model, {given!r}) first"
            )
        layers = {name: child for name, child in module.named_modules() if isinstance(child, AdapterLayer)}
        adapters = [[f"{prefix}{name}.{own}" for own in layer.adapter_parameters()] for name, layer in layers.items()]
        known = any(key in state for keys in adapters for key in keys)
        self.absent = [key for keys in adapters if not state.keys() & set(keys) for key in keys] if known else []
        self.is_base = not known
        if not known and not all(layer.merged for layer in layers.values()):
            warnings.warn(
                "the state dict holds no adapters, as that of a base model: the model's own stay as they are. To "
                "resume training from a checkpoint, load_adapter(model, path) reads what save_adapter wrote",
                stacklevel=2,
            )

    def after(self, module: nn.Module, incompatible: Any) -> None:
        if self.is_base:  # which has no rows of its own for tokens that train
            missing = [key for key in incompatible.missing_keys if not key.endswith(f".{TOKENS}")]
            incompatible.missing_keys[:] = missing
        incompatible.missing_keys.extend(self.absent)
        self.absent = []

"""load_peft_adapter: go on from a LoRA adapter that PEFT trained."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapt.apply import apply_reslora
from ..adapt.checkpoints import check_shared, named_buffers, named_parameters
from ..adapt.record import TOKENS, adapted_layers, record_of
from ..adapt.targets import endings_of
from ..adapt.trained_tokens import tied_heads, token_shapes
from ..config import PARAMETER_ADAPTER, Gates, ResLoRAConfig, Shortcut, pattern_matches
from ..layers.kinds import kind_of, shapes_of
from .adapter_format import checked_folder, parsed_json, parsed_tensors, regular
from .peft_compatibility import parameter_of, targets_in, unflattened, wrapper_names
from .peft_export import PEFT_TOKENS, PREFIX

_MATRIX = re.compile(r"(.+)\.(lora_[AB]\.weight|lora_embedding_[AB]|lora_magnitude_vector)")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_INITS = (True, False, None, "gaussian", "orthogonal", "eva")  # the others change the base model's weights
_OF_PLAIN_LORA = {  # what may be set; any other field, of today or of a later PEFT, may mean another method
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config", "r", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora"),
    *("use_dora", "target_modules", "target_parameters", "exclude_modules", "modules_to_save", "layers_to_transform"),
    *("layers_pattern", "rank_pattern", "alpha_pattern", "trainable_token_indices", "ensure_weight_tying"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
    *("megatron_config", "megatron_core"),
}


def load_peft_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    shortcut: Shortcut = "none",
    pre_num: int = 1,
    gates: Gates = "none",
    gates_init: float = 1.0,
    example_inputs: Any = None,
    autocast_adapter_dtype: bool = True,
) -> nn.Module:
    """Adapt a plain model with the ranks, scalings and modules of a PEFT LoRA adapter, starting from its A and B.

    With shortcut "none" the model computes what PEFT's does. With another shortcut every layer has the same A and B,
    and the shortcut's terms are added from the first step on: the adapter is where training starts, not what the model
    computes then. To start exactly from it, take gates that start at 0, or let PEFT merge it into the base model
    (``merge_and_unload``) and call ``apply_reslora``.

    Args:
        model: the base model; changed in place.
        path: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        shortcut, pre_num, gates, gates_init: as in ``ResLoRAConfig``.
        example_inputs, autocast_adapter_dtype: as for ``apply_reslora``.

    Returns:
        ``model``.

    Raises:
        FileNotFoundError: the folder lacks one of the files.
        TypeError, ValueError: the adapter is of another method (LoHa, say), damaged, not finite, or does not fit the
            model; or as for ``apply_reslora``. The model is unchanged then.
    """
    folder = checked_folder(path)
    about = _read_config(folder)
    matrices, others = _read_weights(folder)
    matrices = _of_parameters(model, about, matrices)
    _refuse_unequal(model, {name for name, _ in matrices})
    others = _without_base_weights(model, {name for name, _ in matrices}, others)
    untied = _without_tied(model, about, matrices)
    about["ensure_weight_tying"] = len(untied) < len(matrices)  # PEFT knows heads by the names of their embeddings
    matrices = untied
    chosen = {"shortcut": shortcut, "pre_num": pre_num, "gates": gates, "gates_init": gates_init}
    config = _config_of(about, model, matrices, chosen)
    _check_fit(config, model, matrices, others)
    apply_reslora(model, config, example_inputs=example_inputs, autocast_adapter_dtype=autocast_adapter_dtype)
    layers, values = adapted_layers(model), named_parameters(model) | named_buffers(model)
    record_of(model).kept |= others.keys()
    with torch.no_grad():
        for (name, kind), tensor in matrices.items():
            own: Tensor = getattr(layers[name], _own_name(kind))
            own.copy_(tensor.view(own.shape))
        for name, tensor in others.items():
            values[name].copy_(tensor)
    return model


def _own_name(kind: str) -> str:
    return kind.removesuffix(".weight").replace("_embedding", "")


def _content(folder: Path, name: str) -> bytes:
    if not os.path.lexists(folder / name):
        raise FileNotFoundError(f"path {str(folder)!r} holds no {name}: it is not a PEFT adapter in safetensors format")
    return regular(folder / name).read_bytes()


def _read_config(folder: Path) -> dict[str, Any]:
    about = parsed_json(_content(folder, CONFIG), f"{CONFIG} is not valid JSON")
    kind = about.get("peft_type") if isinstance(about, dict) else about
    if not isinstance(about, dict) or kind != "LORA":
        raise ValueError(f"{CONFIG}: peft_type must be 'LORA', got {kind!r:.80}")
    for name in sorted(about.keys() - _OF_PLAIN_LORA):
        if about[name]:
            raise ValueError(f"{CONFIG}: {name}={about[name]!r} is no plain LoRA and has no ResLoRA counterpart")
    if about.get("init_lora_weights", True) not in _INITS:
        raise ValueError(
            f"{CONFIG}: init_lora_weights={about['init_lora_weights']!r} changed the base model; save the adapter "
            "with PEFT's path_initial_model_for_weight_conversion first"
        )
    return about


def _read_weights(folder: Path) -> tuple[dict[tuple[str, str], Tensor], dict[str, Tensor]]:
    """A, B and magnitudes by (module, PEFT's name in it), and what else was trained by the base model's names."""
    matrices: dict[tuple[str, str], Tensor] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in parsed_tensors(_content(folder, WEIGHTS), WEIGHTS).items():
        name = key.removeprefix(PREFIX)
        if name.endswith(".lora_magnitude_vector.weight"):  # by PEFT's own code; its files leave the last part out
            name = name.removesuffix(".weight")
        found = _MATRIX.fullmatch(name)
        if found is not None:
            matrices[found[1], found[2]] = tensor
        elif "lora_" in name:
            raise ValueError(f"{WEIGHTS}: tensor {key!r} is neither A, B nor magnitude of a layer")
        else:
            others[re.sub(r"(\.base_layer)+\.", ".", name).replace(PEFT_TOKENS, TOKENS)] = tensor
    return matrices, others


def _of_parameters(
    model: nn.Module, about: dict[str, Any], matrices: dict[tuple[str, str], Tensor]
) -> dict[tuple[str, str], Tensor]:
    """The same with those of ``target_parameters`` by the names and in the shapes that their adapters have here."""
    wanted = about.get("target_parameters") or []
    if not isinstance(wanted, list) or not all(isinstance(name, str) for name in wanted):
        raise ValueError(f"{CONFIG}: target_parameters must be a list of names, got {wanted!r:.80}")
    targets = targets_in(model, wanted)
    found = dict(matrices)
    for name, wrapper in wrapper_names(model, targets).items():
        try:
            a, b = found.pop((wrapper, "lora_A.weight")), found.pop((wrapper, "lora_B.weight"))
            count = targets[name].num_experts
            own = name + PARAMETER_ADAPTER
            found[own, "lora_A"], found[own, "lora_B"] = unflattened(a, b, count)
        except (KeyError, RuntimeError) as error:
            raise ValueError(
                f"the adapter does not fit the model: A or B of {name!r} is not there as PEFT writes it"
            ) from error
    return found


def _without_tied(
    model: nn.Module, about: dict[str, Any], matrices: dict[tuple[str, str], Tensor]
) -> dict[tuple[str, str], Tensor]:
    """The same without those of heads that have an embedding's adapter; ValueError where they have another one."""
    found = dict(matrices)
    tables = [name for name, kind in matrices if kind == "lora_embedding_A"] if about.get("ensure_weight_tying") else []
    for name in tables:
        for head in tied_heads(model, model.get_submodule(name)):
            for own, other in (("lora_A.weight", "lora_embedding_B"), ("lora_B.weight", "lora_embedding_A")):
                matrix = found.pop((head, own), None)
                if matrix is not None and not torch.equal(matrix.T, matrices[name, other]):
                    raise ValueError(
                        f"{CONFIG} says ensure_weight_tying, and {WEIGHTS} has another adapter for {head!r} than for "
                        f"{name!r}, whose weight it shares"
                    )
    return found


def _refuse_unequal(model: nn.Module, adapted: set[str]) -> None:
    """ValueError, which names it, for a module that PEFT adapts to another function than is computed here."""
    for name, module in model.named_modules():
        if name in adapted and isinstance(module, nn.MultiheadAttention):
            raise ValueError(
                f"{name!r} is an nn.MultiheadAttention, whose out_proj has its update twice in PEFT (as of 0.21): let "
                "PEFT merge it into the base model (merge_and_unload), and call apply_reslora"
            )


def _without_base_weights(model: nn.Module, adapted: set[str], others: dict[str, Tensor]) -> dict[str, Tensor]:
    """``others`` without the weights of adapted embeddings, which PEFT saves along, where the model has the same."""
    parameters = named_parameters(model)
    same = {
        name
        for name, tensor in others.items()
        if name.rpartition(".")[0] in adapted and name in parameters and torch.equal(parameters[name].cpu(), tensor)
    }
    return {name: tensor for name, tensor in others.items() if name not in same}


def _config_of(
    about: dict[str, Any], model: nn.Module, matrices: dict[tuple[str, str], Tensor], chosen: dict[str, Any]
) -> ResLoRAConfig:
    names = sorted({name for name, _ in matrices})
    parameters = [name for name in names if name.endswith(PARAMETER_ADAPTER)]
    known = {name for name, _ in model.named_modules()} | set(parameters)
    if not names or not set(names) <= known:
        raise ValueError(f"the adapter does not fit the model: it has no module {sorted(set(names) - known)[:5]}")

    def pattern(field: str) -> dict[str, Any]:
        entries = about.get(field) or {}
        return {
            key: value
            for key, value in entries.items()
            if any(pattern_matches(key, parameter_of(name)) for name in names)
        }

    fields = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias", "modules_to_save",
              "trainable_token_indices", "ensure_weight_tying")  # fmt: skip
    try:
        return ResLoRAConfig(
            **{field: about[field] for field in fields if field in about},
            rank_pattern=pattern("rank_pattern"),
            alpha_pattern=pattern("alpha_pattern"),
            target_modules=endings_of(model, modules) if (modules := [n for n in names if n not in parameters]) else [],
            target_parameters=list(map(parameter_of, parameters)) or None,
            **chosen,
        )
    except (TypeError, ValueError) as error:
        raise type(error)(f"{CONFIG}: {error}") from None


def _check_fit(
    config: ResLoRAConfig, model: nn.Module, matrices: dict[tuple[str, str], Tensor], others: dict[str, Tensor]
) -> None:
    shapes: dict[str, list[int]] = {}
    found = {f"{name}.{kind}": list(tensor.shape) for (name, kind), tensor in matrices.items()}
    for name in {name for name, _ in matrices}:
        r = config.for_module(name).r
        if name.endswith(PARAMETER_ADAPTER):
            target = targets_in(model, [parameter_of(name)])[parameter_of(name)]
            of_a, of_b = shapes_of(target, r)
            shapes |= {f"{name}.lora_A": list(of_a), f"{name}.lora_B": list(of_b)}
            continue
        module = model.get_submodule(name)
        if (kind := kind_of(module)) is not None:  # of other modules apply_reslora says what they are
            shapes |= {f"{name}.{key}": list(shape) for key, shape in kind.peft_matrices(module, r).items()}
            if config.use_dora:
                shapes[f"{name}.lora_magnitude_vector"] = [kind.sizes(module)[1]]
    values = named_parameters(model) | named_buffers(model)
    parameters = {name: list(value.shape) for name, value in values.items()}
    tokens = {name: list(shape) for name, shape in token_shapes(model, config).items()}
    parameters |= tokens
    shapes |= tokens
    for name, tensor in others.items():
        found[name] = list(tensor.shape)
        shapes[name] = parameters.get(name, [])
    wrong = sorted(name for name in shapes if shapes[name] != found.get(name))
    if wrong:
        raise ValueError(
            f"the adapter does not fit the model: {wrong[0]!r} must be {shapes[wrong[0]] or 'a parameter of it'}, got "
            f"{found.get(wrong[0], 'no such tensor')}"
        )
    check_shared(model, others.keys(), others)

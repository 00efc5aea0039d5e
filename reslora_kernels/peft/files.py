"""Between the two formats of a saved adapter: PEFT's folder of a ``RESLORA`` adapter, and that of ``save_adapter``."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..adapt.record import TOKENS
from ..config import ResLoRAConfig, matches, with_parents
from ..files.adapter_format import (
    CONFIG_NAME,
    checked_folder,
    encoded,
    parsed_json,
    parsed_tensors,
    read,
    regular,
    serialized,
    write,
    write_durably,
)
from ..files.peft_export import PEFT_TOKENS, PREFIX
from ..layers.adapter import ADAPTER_PARAMETERS
from ..layers.shortcuts import hands_on
from .config import ABSENT, RESLORA, ResLoRAPeftConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_HELD = ".reslora_adapter."


def to_native(path: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Write what ``save_pretrained`` of a PeftModel left in ``path`` as ``save_adapter`` would, to the folder ``out``.

    Returns:
        ``out``, for ``load_adapter(model, out)``.

    Raises:
        FileNotFoundError: ``path`` lacks one of the two files.
        TypeError, ValueError: they are damaged, or of another method than ``RESLORA``. Nothing is written then.
    """
    folder, target = checked_folder(path), checked_folder(out)
    config = _peft_config(folder)
    tensors = parsed_tensors(_content(folder, WEIGHTS), WEIGHTS)
    own = {key: _native_name(key) for key in tensors if _HELD in key}
    layers = sorted({name.rpartition(".")[0] for name in own.values()})
    others = {
        key: key.removeprefix(PREFIX).replace(".base_layer.", ".").replace(PEFT_TOKENS, TOKENS)
        for key in tensors if key not in own
    }  # fmt: skip
    native = dataclasses.replace(
        config.native(),
        target_modules=layers if config.layers_pattern else config.native().target_modules,
        layers_to_transform=None if config.layers_pattern else config.native().layers_to_transform,
        modules_to_save=_used(config.modules_to_save, others.values()),
    )
    trained = {name for name in others.values() if _trains(native, name, layers)}
    described = {
        "config": native.to_dict(),
        "chains": None if config.chains is None else _described(config.chains, layers),
        "chains_from": None if config.chains is None else "given",
        "same_input": [],
        "trained_parameters": sorted(trained),
        "frozen_parameters": sorted(set(others.values()) - trained),  # embeddings that PEFT saves along
        "base_model_name_or_path": config.base_model_name_or_path,
    }
    write(target, *encoded(described, {name: tensors[key] for key, name in (own | others).items()}))
    return Path(out)


def from_native(path: str | os.PathLike[str], out: str | os.PathLike[str], *, task_type: str | None = None) -> Path:
    """Write what ``save_adapter`` left in ``path`` as a PEFT adapter of type ``RESLORA``, to the folder ``out``.

    Args:
        task_type: PEFT's, "CAUSAL_LM" say, for ``AutoPeftModelForCausalLM`` and the like.

    Returns:
        ``out``, for ``PeftModel.from_pretrained(model, out)``.

    Raises:
        FileNotFoundError, ValueError: as for ``load_adapter``; or a trained parameter is neither in a module that
            ``modules_to_save`` names nor a bias that ``bias`` trains, which PEFT cannot hold; or an earlier version
            wrote an adapter whose layers hand on. Nothing is written then.
    """
    folder, target = checked_folder(path), checked_folder(out)
    saved = read(folder)
    config, layers = saved.config, saved.layers
    if saved.chains is not None and saved.chains_from is None and hands_on(config.shortcut, config.pre_num):
        raise ValueError(
            f"{CONFIG_NAME}: an earlier version wrote it, and its chains are to be seen with the model only: "
            "load_adapter(model, path), save that with save_adapter, and convert what it writes"
        )
    for name in saved.trained:
        if not _trains(config, name, layers):
            raise ValueError(
                f"{name!r} was trained, but neither modules_to_save nor bias says so: PEFT would not load it"
            )
    chains = None
    if saved.chains is not None and saved.chains_from != "structure":
        chains = {plan.title: plan.names for plan in saved.chains if not plan.experts}
    about = parsed_json((folder / CONFIG_NAME).read_bytes(), f"{CONFIG_NAME} is not valid JSON")
    for name in ("target_parameters", "ensure_weight_tying"):
        if value := getattr(config, name):
            raise ValueError(
                f"{CONFIG_NAME}: {name}={value!r} has no place in a PeftModel of this method: export_peft(model, path) "
                "writes such an adapter as one of PEFT's LoRA"
            )
    values: dict[str, Any] = {name: value for name, value in config.to_dict().items() if name not in ABSENT}
    peft_config = ResLoRAPeftConfig(
        **values, chains=chains, task_type=task_type, inference_mode=True,
        base_model_name_or_path=about["base_model_name_or_path"],
    )  # fmt: skip
    tensors = {_peft_name(key, layers, saved.beside): tensor for key, tensor in saved.tensors.items()}
    target.mkdir(parents=True, exist_ok=True)
    write_durably(target / WEIGHTS, serialized(tensors))
    peft_config.save_pretrained(str(target))
    return Path(out)


def _content(folder: Path, name: str) -> bytes:
    if not (folder / name).exists():
        raise FileNotFoundError(f"path {str(folder)!r} holds no {name}: it is not a PEFT adapter in safetensors format")
    return regular(folder / name).read_bytes()


def _peft_config(folder: Path) -> ResLoRAPeftConfig:
    about = parsed_json(_content(folder, CONFIG), f"{CONFIG} is not valid JSON")
    kind = about.get("peft_type") if isinstance(about, dict) else about
    if kind != RESLORA:
        raise ValueError(f"{CONFIG}: peft_type must be {RESLORA!r}, got {kind!r:.80}")
    config: ResLoRAPeftConfig = ResLoRAPeftConfig.from_pretrained(str(folder))
    return config


def _native_name(key: str) -> str:
    layer, _, parameter = key.removeprefix(PREFIX).rpartition(_HELD)
    if parameter not in ADAPTER_PARAMETERS:
        raise ValueError(f"{WEIGHTS}: unexpected tensor {key!r}; adapters end in {', '.join(ADAPTER_PARAMETERS)}")
    return f"{layer}.{parameter}"


def _peft_name(name: str, layers: set[str], beside: Iterable[str]) -> str:
    owner, _, parameter = name.rpartition(".")
    if name not in beside:
        return f"{PREFIX}{owner}{_HELD}{parameter}"
    if parameter == TOKENS:
        return f"{PREFIX}{owner}.{PEFT_TOKENS}"
    return f"{PREFIX}{owner}.base_layer.{parameter}" if owner in layers else PREFIX + name


def _used(modules: Iterable[str] | None, parameters: Iterable[str]) -> list[str] | None:
    """Those of ``modules_to_save`` that a saved parameter is in: PEFT adds names of heads that a model may lack."""
    names = list(parameters)
    return [module for module in modules or () if any(_inside(name, [module]) for name in names)] or None


def _inside(parameter: str, modules: Iterable[str]) -> bool:
    return any(matches(module, list(modules)) for module in with_parents(parameter)[:-1])


def _described(chains: Mapping[str, list[str]] | list[list[str]], layers: list[str]) -> list[dict[str, Any]]:
    titled = chains if isinstance(chains, Mapping) else {f"chains[{i}]": names for i, names in enumerate(chains)}
    named = {name for names in titled.values() for name in names}
    if named != set(layers):
        raise ValueError(
            f"{CONFIG}: chains must name every adapted layer to be converted, and lack {set(layers) - named}"
        )
    return [{"name": title, "layers": list(names), "experts": False} for title, names in titled.items()]


def _trains(config: ResLoRAConfig, name: str, layers: Container[str]) -> bool:
    """Whether the configuration has the parameter trained beside the adapters of ``layers``."""
    owner, _, parameter = name.rpartition(".")
    is_bias = parameter == "bias" and (config.bias == "all" or (config.bias == "lora_only" and owner in layers))
    return is_bias or parameter == TOKENS or _inside(name, config.modules_to_save or ())

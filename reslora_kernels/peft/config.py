"""ResLoRAPeftConfig: ``ResLoRAConfig`` as a configuration of PEFT; between the two formats of a saved adapter."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Container, Iterable, Mapping
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftType

from ..adapt.record import TOKENS
from ..config import ALL_LINEAR, ResLoRAConfig, matches, with_parents
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

RESLORA = "RESLORA"
ABSENT = ("target_parameters", "split_expert_r", "ensure_weight_tying")  # which PEFT builds with LoRA layers of its own


def extend_peft_types() -> None:
    """Make ``RESLORA`` a member of PEFT's ``PeftType``, which Python lets no one subclass."""
    if RESLORA in PeftType.__members__:
        return
    member = str.__new__(PeftType, RESLORA)
    member._name_, member._value_ = RESLORA, RESLORA
    setattr(PeftType, RESLORA, member)
    PeftType._member_names_.append(RESLORA)
    PeftType._member_map_[RESLORA] = PeftType._value2member_map_[RESLORA] = member


extend_peft_types()


@dataclass
class ResLoRAPeftConfig(PeftConfig):
    """Configuration of ResLoRA (arXiv 2402.18039) for ``get_peft_model``.

    ``task_type``, ``inference_mode`` and the like are PEFT's; every other field is that of ``ResLoRAConfig`` and means
    the same, but for these. ``target_parameters``, ``split_expert_r`` and ``ensure_weight_tying`` are for
    ``apply_reslora`` alone: a ValueError here.

    Args:
        target_modules: None takes PEFT's choice for LoRA in models that it knows.
        chains: as for ``apply_reslora``: chains by hand, as lists of names of adapted layers in their order, or a dict
            of such lists by title. None reads them off the names of the modules.
        layers_pattern: as in PEFT, the name before the index that ``layers_to_transform`` is about.
        init_lora_weights: also False: B is random like A, as PEFT has it for tests.
        merge: what ``merge_adapter()`` and ``merge_and_unload()`` do without arguments. "least_squares" and "input"
            need ``calibration`` or ``statistics`` for the shortcuts "input" and "middle", and are refused without.

    Raises:
        TypeError, ValueError: as for ``ResLoRAConfig``.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    stack_projections: bool = True
    init_lora_weights: bool | str = True
    bias: str = "none"
    shortcut: str = "block"
    pre_num: int = 1
    gates: str = "none"
    gates_init: float = 1.0
    chains: dict[str, list[str]] | list[list[str]] | None = None
    merge: str = "least_squares"
    norm_window: int = 100
    backend: str = "auto"
    target_parameters: InitVar[list[str] | None] = None
    split_expert_r: InitVar[bool] = False
    ensure_weight_tying: InitVar[bool] = False

    def __post_init__(
        self, target_parameters: list[str] | None, split_expert_r: bool, ensure_weight_tying: bool
    ) -> None:
        for name, value in zip(ABSENT, (target_parameters, split_expert_r, ensure_weight_tying), strict=True):
            if value:
                raise ValueError(
                    f"{name}={value!r} has no place in a PeftModel of this method: adapt the model with "
                    f"apply_reslora(model, ResLoRAConfig({name}=...)), which saves, loads and exports it"
                )
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = PeftType(RESLORA)
        self.native()
        for name in ("target_modules", "exclude_modules"):  # as PEFT has them: a set is what names of modules are
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, (list, tuple)) else value)
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError(f"layers_pattern={self.layers_pattern!r} needs layers_to_transform")

    def native(self) -> ResLoRAConfig:
        """The same for ``apply_reslora``."""
        values: dict[str, Any] = {
            each.name: getattr(self, each.name) for each in dataclasses.fields(ResLoRAConfig) if each.name not in ABSENT
        }
        if self.target_modules is None:
            values["target_modules"] = ALL_LINEAR
        if self.init_lora_weights is False:
            values["init_lora_weights"] = True
        return ResLoRAConfig(**values)


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

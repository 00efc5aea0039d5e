"""ResLoRAPeftConfig: ``ResLoRAConfig`` as a configuration of PEFT."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from typing import Any

from peft import PeftConfig, PeftType

from ..config import ALL_LINEAR, ResLoRAConfig

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

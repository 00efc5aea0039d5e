"""What a run of the demo is made of: one frozen value, written to the report as it is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from reslora_kernels.config import ResLoRAConfig, Shortcut

BASELINE: Shortcut = "none"
TITLES: dict[Shortcut, str] = {"none": "LoRA", "input": "input", "block": "block", "middle": "middle"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes and hyperparameters. Batches are (sequences, bytes per sequence); rates are peak learning rates."""

    name: str
    seed: int = 0
    shortcuts: tuple[Shortcut, ...] = ("input", "block", "middle")
    # the model: LLaMA over bytes
    hidden_size: int = 128
    intermediate_size: int = 384
    layers: int = 6
    heads: int = 4
    sequence: int = 128
    # pre-training on English prose
    batch: int = 8
    pretraining_steps: int = 400
    pretraining_rate: float = 4e-3
    # fine-tuning on Python source
    finetuning_steps: int = 120
    finetuning_rate: float = 1e-2  # the best for plain LoRA of 3e-3, 5e-3, 1e-2 and 2e-2
    warmup_steps: int = 10
    r: int = 4
    lora_alpha: float = 8
    target_modules: str | tuple[str, ...] = "all-linear"
    pre_num: int = 2
    # measuring
    evaluations: int = 10
    evaluation_sequences: int = 64
    calibration_batches: int = 16
    timing_rounds: int = 9
    sample_bytes: int = 120
    sample_temperature: float = 0.5

    @property
    def runs(self) -> tuple[Shortcut, ...]:
        """What is trained: plain LoRA first, then the shortcuts."""
        return (BASELINE, *self.shortcuts)

    def replace(self, **changes: Any) -> Settings:
        """A copy with the given fields changed."""
        return dataclasses.replace(self, **changes)

    def adapter_config(self, shortcut: Shortcut) -> ResLoRAConfig:
        """The configuration of one run. They differ in the shortcut alone."""
        return ResLoRAConfig(
            r=self.r,
            lora_alpha=self.lora_alpha,
            target_modules=self.target_modules,
            shortcut=shortcut,
            pre_num=self.pre_num,
        )


FULL = Settings(name="full")
QUICK = Settings(
    name="quick",
    hidden_size=96,
    intermediate_size=256,
    layers=4,
    pretraining_steps=150,
    finetuning_steps=50,
    evaluations=5,
    evaluation_sequences=32,
    calibration_batches=8,
    timing_rounds=5,
    sample_bytes=80,
)

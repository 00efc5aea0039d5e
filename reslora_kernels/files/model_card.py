"""The README.md of an exported adapter, which the Hub shows: what it is, how exact its merge is, how to serve it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .._version import __version__
from ..config import ResLoRAConfig
from ..merge.closed_form import LowRankUpdate

CARD_NAME = "README.md"
_MARK = "<!-- written by reslora_kernels: take this line out, and no export replaces the file -->"
_MERGE = "## Merge of "
_PEFT = """\
from peft import PeftModel
model = PeftModel.from_pretrained(base, adapter)  # the base model, as its library loads it, and this folder or its id
"""
_DIFFUSERS = """\
pipe.load_lora_weights(adapter)  # the diffusers pipeline of the base model, and this folder or its id
"""


@dataclass(frozen=True)
class Card:
    """What a card says.

    ``base`` is the base model's id or folder, None if it has neither; ``part`` what its pipeline calls it, for
    diffusers; ``other_parts`` what an earlier card in the folder said of others (see ``merges_of``).
    """

    base: str | None
    config: ResLoRAConfig
    updates: Mapping[str, LowRankUpdate]
    max_lora_rank: int
    part: str | None = None
    other_parts: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = {**self.other_parts, self.part or "the layers": self._errors()}
        merges = [f"{_MERGE}{part}\n\n{table}" for part, table in parts.items()]
        return "\n\n".join((self._header(), self._method(), *merges, self._serving())) + "\n"

    def _header(self) -> str:
        named = self.base is not None and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", self.base)
        base = self.base if named and not Path(self.base or "").exists() else None  # a folder means nothing on the Hub
        lines = [
            "---",
            *([f"base_model: {base}"] if base else []),
            f"library_name: {'diffusers' if self.part else 'peft'}",
        ]
        title = f"# LoRA adapter for {self.base or 'a base model without a name'}"
        return "\n".join([*lines, "tags:", "- lora", "- reslora", "---", _MARK, "", title])

    def _method(self) -> str:
        config = self.config
        gates = "" if config.gates == "none" else f"gates `{config.gates}`, "
        return (
            f"Trained with [ResLoRA](https://arxiv.org/abs/2402.18039): shortcut `{config.shortcut}`, pre_num "
            f"{config.pre_num}, {gates}r {config.r}, lora_alpha {config.lora_alpha:g}. Merged into plain LoRA by "
            f"reslora_kernels {__version__}."
        )

    def _errors(self) -> str:
        """Each layer's merge: its rank, and how far its low-rank output is from the unmerged layer's."""
        rows = [
            f"| {name} | {update.method} | {update.rank} | "
            f"{'-' if update.relative_error is None else f'{update.relative_error:.2e}'} |"
            for name, update in self.updates.items()
        ]
        return "\n".join(["| layer | merge | rank | relative error |", "| --- | --- | --- | --- |", *rows])

    def _serving(self) -> str:
        code = _DIFFUSERS if self.part else _PEFT
        needs = f"A server that takes LoRA adapters must allow rank {self.max_lora_rank} (vLLM: `--max-lora-rank`)."
        return f"## Use\n\n```python\n{code}```" + ("" if self.part else f"\n\n{needs}")


def merges_of(folder: Path) -> dict[str, str]:
    """The tables of merges in the folder's card, by the part of the model that they are of."""
    path = folder / CARD_NAME
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return {part: table.strip() for part, table in re.findall(rf"^{_MERGE}(.+?)\n(.*?)(?=^## )", text, re.M | re.S)}


def may_write_card(folder: Path) -> bool:
    """Whether there is no card yet, or one that an earlier export wrote."""
    path = folder / CARD_NAME
    return not path.exists() or _MARK in path.read_text(encoding="utf-8", errors="replace")

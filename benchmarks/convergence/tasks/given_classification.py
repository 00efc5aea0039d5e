"""GLUE and data of its form with any encoder that Transformers can put a classifier on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.convergence.settings import Sizes
from benchmarks.convergence.tasks import given_sources as sources
from benchmarks.convergence.tasks.classification import Classification
from benchmarks.convergence.tasks.kinds import Batch

COLUMNS = (
    ("sentence1", "sentence2"), ("question1", "question2"), ("question", "sentence"), ("premise", "hypothesis"),
    ("sentence",), ("text",),
)  # fmt: skip


class GivenClassification(Classification):
    """Batches are {"input_ids", "attention_mask" [examples, tokens], "labels" [examples]}."""

    comes_trained = True

    def __init__(self, model: str, data: str, dtype: torch.dtype) -> None:
        from transformers import AutoTokenizer

        parts = [list(part) for part in sources.datasets_of(data)]
        found = list(parts[0][0])
        columns = next((c for c in COLUMNS if set(c) <= set(found)), None)
        if columns is None or "label" not in found:
            raise sources.refuse_columns(data, found, [(*c, "label") for c in COLUMNS])
        parts = [[row for row in part if row.get("label") not in (None, -1, "")] for part in parts]  # GLUE's test: -1
        for name, part in zip(("labelled train", "labelled held-out"), parts, strict=True):
            sources.refuse_empty(part, name, data)
        labels = sorted({row["label"] for row in parts[0]})
        if any(isinstance(label, float) and not label.is_integer() for label in labels):
            raise ValueError(f"data {data!r} must have classes as labels, got numbers such as {labels[0]}")
        if len(labels) < 2:
            raise ValueError(f"data {data!r} must have at least two labels to train on, got {labels}")
        unseen = sorted({str(row["label"]) for row in parts[1]} - set(map(str, labels)))
        if unseen:
            raise ValueError(f"data {data!r} holds out labels that must be among those to train on: {unseen}")
        places = {str(label): i for i, label in enumerate(labels)}
        self._train, self._held_out = (
            [([str(row[c]) for c in columns], places[str(row["label"])]) for row in part] for part in parts
        )
        self.title, self.classes = f"{model} on {data}", len(labels)
        self._model, self._dtype = model, dtype
        with sources.reading("model", model):
            self._tokenizer: Any = AutoTokenizer.from_pretrained(model)
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token

    def base(self, sizes: Sizes) -> nn.Module:
        """The pre-trained encoder under a classifier with random weights; sets ``targets`` and ``trained_whole``."""
        from transformers import AutoModelForSequenceClassification

        torch.manual_seed(0)
        with sources.reading("model", self._model):
            model: Any = AutoModelForSequenceClassification.from_pretrained(
                self._model, num_labels=self.classes, dtype=self._dtype, ignore_mismatched_sizes=True
            )
        model.config.pad_token_id = self._tokenizer.pad_token_id
        whole = [name for name, child in model.named_children() if name != model.base_model_prefix]
        self.trained_whole = tuple(name for name in whole if any(True for _ in getattr(model, name).parameters()))
        self.targets = sources.linears_of_layers(getattr(model, model.base_model_prefix))
        encoder: nn.Module = model
        return encoder

    def pretrain(self, model: nn.Module, sizes: Sizes) -> None:
        """Nothing: the model comes trained."""

    def prepared(self, model: nn.Module) -> nn.Module:
        return model

    def train(self, sizes: Sizes, count: int, examples: int, seed: int) -> list[Batch]:
        rows = sources.drawn(len(self._train), count, examples, torch.Generator().manual_seed(seed))
        return [self._encoded([self._train[i] for i in row], sizes.sequence) for row in rows]

    def held_out(self, sizes: Sizes, examples: int) -> Batch:
        return self._encoded(sources.shuffled(self._held_out)[:examples], sizes.sequence)

    def _encoded(self, rows: list[tuple[list[str], int]], most: int) -> Batch:
        texts = [list(column) for column in zip(*(texts for texts, _ in rows), strict=True)]
        most = min(most, self._tokenizer.model_max_length)
        found = self._tokenizer(*texts, truncation=True, max_length=most, padding=True, return_tensors="pt")
        labels = torch.tensor([label for _, label in rows])
        return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"], "labels": labels}

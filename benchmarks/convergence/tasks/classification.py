"""Classification: a RoBERTa over bytes, pre-trained here; GLUE and data of its form with any encoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.convergence.settings import Sizes
from benchmarks.convergence.tasks import sources
from benchmarks.convergence.tasks.kinds import Batch, Task, evaluating, pieces_by_length, training_steps
from reslora_kernels.cli.demo import fine_tuning

START, PAD, MASK, SEPARATOR = range(256, 260)  # tokens beside the bytes
MASKED = 0.2  # of the tokens of a masked batch
CAUSAL = 0.8  # of pre-training has three causal batches between masked ones; the rest has none


class Classification(Task):
    """Batches are {"input_ids", "attention_mask" [examples, tokens], "labels" [examples]}."""

    kind = "encoder"
    unit = "nats"
    metrics = ("accuracy", "f1")
    trained_whole = ("classifier",)
    targets: tuple[str, ...] = ("query", "key", "value", "output.dense", "intermediate.dense")

    def __init__(self, title: str, classes: int, source: Callable[[], sources.Split]) -> None:
        self.title, self.classes, self._source = title, classes, source

    def base(self, sizes: Sizes) -> nn.Module:
        from transformers import RobertaForMaskedLM

        torch.manual_seed(0)
        model = RobertaForMaskedLM(_config(sizes))
        positions = model.roberta.embeddings.position_embeddings.weight
        with torch.no_grad():
            positions.copy_(2 * model.config.initializer_range * _sinusoids(*positions.shape))
        return model

    def pretrain(self, model: nn.Module, sizes: Sizes) -> None:
        """On the help topics and the standard library's source, half of each batch from either.

        With masked batches alone, a model learns for thousands of steps no more than how frequent each byte is. Causal
        batches, which tell it something of every byte, teach it to look at a byte's neighbours (as in UniLM,
        arXiv 1905.03197), and so do sinusoids as the first position embeddings.
        """
        half = sizes.batch // 2
        drawn = [
            fine_tuning.random_batches(corpus.train, sizes.pretraining_steps, half, sizes.sequence, seed)
            for seed, corpus in enumerate((fine_tuning.prose(), fine_tuning.python_source()))
        ]
        generator = torch.Generator().manual_seed(0)
        batches = [
            _causal(rows) if step < CAUSAL * sizes.pretraining_steps and step % 4 < 3 else _masked(rows, generator)
            for step, rows in enumerate(torch.cat(drawn, dim=1))
        ]
        optimizer = torch.optim.AdamW(model.parameters(), sizes.pretraining_rate, betas=(0.9, 0.95), weight_decay=0.1)
        for _ in training_steps(model, optimizer, batches, max(1, sizes.pretraining_steps // 10), _pretraining_loss):
            pass

    def prepared(self, model: nn.Module) -> nn.Module:
        """The encoder with a classifier on its first token."""
        from transformers import RobertaConfig, RobertaForSequenceClassification

        config: Any = model.config
        torch.manual_seed(0)
        whole = RobertaForSequenceClassification(
            RobertaConfig(**config.to_dict() | {"id2label": dict(enumerate(range(self.classes)))})
        )
        whole.roberta.load_state_dict(model.roberta.state_dict())
        return whole

    def train(self, sizes: Sizes, count: int, examples: int, seed: int) -> list[Batch]:
        known = self._source().train
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(len(known), (count, examples), generator=generator)
        return [_encoded([known[i] for i in row], sizes.sequence) for row in drawn.tolist()]

    def held_out(self, sizes: Sizes, examples: int) -> Batch:
        return _encoded(self._source().held_out[:examples], sizes.sequence)

    def inputs(self, batch: Batch) -> dict[str, Any]:
        return {name: value for name, value in batch.items() if name != "labels"}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(model(**self.inputs(batch)).logits.float(), batch["labels"])

    def figures(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        """The loss, accuracy, and F1 averaged over the classes."""
        with evaluating(model):
            return _figures(model(**self.inputs(batch)).logits, batch["labels"], self.metrics)


def _figures(logits: Tensor, labels: Tensor, names: tuple[str, ...]) -> dict[str, float]:
    """Logits [examples, classes]; "f1" is the mean of the classes', "f1_positive" that of class 1, as GLUE's."""
    from sklearn.metrics import f1_score, matthews_corrcoef

    found, meant = logits.argmax(-1).cpu().numpy(), labels.cpu().numpy()
    measures = {
        "accuracy": lambda: (found == meant).mean(),
        "f1": lambda: f1_score(meant, found, average="macro"),
        "f1_positive": lambda: f1_score(meant, found, zero_division=0),
        "matthews": lambda: matthews_corrcoef(meant, found),
    }
    loss = float(nn.functional.cross_entropy(logits.float(), labels))
    return {"loss": loss} | {name: float(measures[name]()) for name in names}


def _config(sizes: Sizes) -> Any:
    from transformers import RobertaConfig

    return RobertaConfig(
        vocab_size=SEPARATOR + 1,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        max_position_embeddings=PAD + 1 + 1 + sizes.sequence,  # RoBERTa counts positions from the padding token's id
        type_vocab_size=1,
        initializer_range=sizes.hidden_size**-0.5,  # RoBERTa's 0.02 is for widths of about a thousand
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        bos_token_id=START,
        pad_token_id=PAD,
        eos_token_id=None,
    )


def _sinusoids(positions: int, size: int) -> Tensor:
    """[positions, size], as in "Attention Is All You Need", with the cosines behind the sines."""
    angles = torch.arange(positions)[:, None] * torch.exp(torch.arange(0, size, 2) * (-math.log(10_000) / size))
    return torch.cat((angles.sin(), angles.cos()), dim=1)


def _masked(rows: Tensor, generator: torch.Generator) -> Batch:
    """Texts [B, bytes] behind the start token, which is never hidden."""
    tokens = nn.functional.pad(rows, (1, 0), value=START)
    hidden = torch.rand(tokens.shape, generator=generator) < MASKED
    hidden[:, 0] = False
    return {"input_ids": tokens.masked_fill(hidden, MASK), "labels": tokens.masked_fill(~hidden, -100)}


def _causal(rows: Tensor) -> Batch:
    """Texts [B, bytes] of which each position sees those up to its own, and tells the next."""
    tokens = nn.functional.pad(rows, (1, 0), value=START)[:, :-1]
    size = tokens.shape[1]
    unseen = torch.full((size, size), -math.inf).triu(1)
    return {"input_ids": tokens, "labels": rows, "attention_mask": unseen.expand(len(rows), 1, size, size)}


def _pretraining_loss(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask")).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


def _encoded(examples: Sequence[sources.Labelled], most: int) -> Batch:
    """The first ``most`` bytes of each; of two sentences as many of each, with a separator between them."""
    ids = torch.full((len(examples), 1 + most), PAD)
    for row, (text, _) in enumerate(examples):
        first, *second = (sentence.encode() for sentence in text.split("\n"))
        content = [START, *first[:most]]
        for sentence in second:
            content = [START, *first[: most // 2], SEPARATOR, *sentence[: most - most // 2 - 1]]
        ids[row, : len(content)] = torch.tensor(content)
    labels = torch.tensor([label for _, label in examples])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels}


package_of_docstring = Classification("Which package a docstring is from", len(sources.PACKAGES), sources.docstrings)
code_or_prose = Classification("Whether a line is code or prose", 2, sources.lines)
sentence_order = Classification("Whether two sentences stand in their order", 2, sources.sentence_pairs)


COLUMNS = (
    ("sentence1", "sentence2"), ("question1", "question2"), ("question", "sentence"), ("premise", "hypothesis"),
    ("sentence",), ("text",),
)  # fmt: skip


class GivenClassification(Classification):
    """Batches are what the tokenizer gives of [examples, tokens], and "labels" [examples]."""

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
        self.title, self.classes = sources.title_of(model, data), len(labels)
        self.metrics = ("accuracy", "f1_positive" if len(labels) == 2 else "f1", "matthews")
        self._model, self._dtype = model, dtype
        self._provenance = sources.provenance(model, data, dtype)
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
        return dict(found) | {"labels": torch.tensor([label for _, label in rows])}

    def figures(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        """The loss, accuracy, F1 and Matthews' correlation."""
        logits, labels = [], []
        with evaluating(model):
            for piece in pieces_by_length(batch):
                logits.append(model(**self.inputs(piece)).logits)
                labels.append(piece["labels"])
        return _figures(torch.cat(logits), torch.cat(labels), self.metrics)

    def description(self) -> dict[str, Any]:
        return super().description() | self._provenance

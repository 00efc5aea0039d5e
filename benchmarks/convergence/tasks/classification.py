"""Classification with a RoBERTa over bytes, pre-trained by masked and causal language modelling on prose and source."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.convergence.settings import Sizes
from benchmarks.convergence.steps import training_steps
from benchmarks.convergence.tasks import texts
from benchmarks.convergence.tasks.kinds import Batch, Task, evaluating
from reslora_kernels.cli.demo import data

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

    def __init__(self, title: str, classes: int, source: Callable[[], texts.Split]) -> None:
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
            data.random_batches(corpus.train, sizes.pretraining_steps, half, sizes.sequence, seed)
            for seed, corpus in enumerate((data.prose(), data.python_source()))
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
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(model(**self.inputs(batch)).logits.float(), batch["labels"])

    def figures(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        """The loss, accuracy, and F1 averaged over the classes."""
        from sklearn.metrics import f1_score

        with evaluating(model):
            logits = model(**self.inputs(batch)).logits.float()
        labels, found = batch["labels"].cpu(), logits.argmax(-1).cpu()
        return {
            "loss": float(nn.functional.cross_entropy(logits, batch["labels"])),
            "accuracy": float((found == labels).float().mean()),
            "f1": float(f1_score(labels.numpy(), found.numpy(), average="macro")),
        }


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


def _encoded(examples: Sequence[texts.Labelled], most: int) -> Batch:
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


package_of_docstring = Classification("Which package a docstring is from", len(texts.PACKAGES), texts.docstrings)
code_or_prose = Classification("Whether a line is code or prose", 2, texts.lines)
sentence_order = Classification("Whether two sentences stand in their order", 2, texts.sentence_pairs)

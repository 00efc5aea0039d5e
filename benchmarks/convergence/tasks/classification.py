"""Classification with a RoBERTa over byte pairs, pre-trained by masked-language modelling on prose and source."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.convergence.settings import Sizes
from benchmarks.convergence.tasks import texts
from benchmarks.convergence.tasks.kinds import Batch, Task, evaluating
from benchmarks.convergence.training import training_steps
from reslora_kernels.cli.demo import data

START, PAD, MASK, SEPARATOR = range(4)  # tokens before those that are learnt
VOCABULARY = 1000
MASKED = 0.15


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
        return RobertaForMaskedLM(_config(sizes))

    def pretrain(self, model: nn.Module, sizes: Sizes) -> None:
        """Masked-language modelling on the help topics and the standard library's source."""
        half = sizes.batch // 2
        parts = [
            data.random_batches(
                torch.tensor(_tokenizer().encode(text).ids), sizes.pretraining_steps, half, sizes.sequence, seed
            )
            for seed, text in enumerate(_corpora())
        ]
        generator = torch.Generator().manual_seed(0)
        batches = [_masked(tokens, generator) for tokens in torch.cat(parts, dim=1)]
        optimizer = torch.optim.AdamW(model.parameters(), sizes.pretraining_rate, betas=(0.9, 0.95), weight_decay=0.1)
        for _ in training_steps(model, optimizer, batches, max(1, sizes.pretraining_steps // 10), _masked_loss):
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
        vocab_size=VOCABULARY,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        max_position_embeddings=sizes.sequence + 1 + PAD + 1,  # RoBERTa counts positions from the padding token's id
        type_vocab_size=1,
        initializer_range=sizes.hidden_size**-0.5,  # RoBERTa's 0.02 is for widths of about a thousand
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        bos_token_id=START,
        pad_token_id=PAD,
        eos_token_id=None,
    )


def _masked(tokens: Tensor, generator: torch.Generator) -> Batch:
    """Texts [B, bytes] behind the start token, which is never hidden."""
    tokens = nn.functional.pad(tokens, (1, 0), value=START)
    hidden = torch.rand(tokens.shape, generator=generator) < MASKED
    hidden[:, 0] = False
    return {"input_ids": tokens.masked_fill(hidden, MASK), "labels": tokens.masked_fill(~hidden, -100)}


def _masked_loss(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(input_ids=batch["input_ids"]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


def _encoded(examples: Sequence[texts.Labelled], most: int) -> Batch:
    """The first ``most`` tokens of each; of two sentences the same number of tokens each."""
    ids = torch.full((len(examples), most + 1), PAD)
    for row, (text, _) in enumerate(examples):
        parts = [encoding.ids for encoding in _tokenizer().encode_batch(text.split("\n"))]
        each = most // len(parts)
        content = [token for part in parts for token in (SEPARATOR, *part)[: each + (len(parts) == 1)]][-most:]
        ids[row, : len(content) + 1] = torch.tensor([START, *content])
    labels = torch.tensor([label for _, label in examples])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels}


def _corpora() -> list[str]:
    return [bytes(corpus.train.tolist()).decode(errors="ignore") for corpus in (data.prose(), data.python_source())]


@cache
def _tokenizer() -> Any:
    """Byte pairs of the texts that the encoder is pre-trained on."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "<mask>", "</s>"]
    tokenizer.train_from_iterator(
        (line for text in _corpora() for line in text.splitlines()),
        VOCABULARY,
        special_tokens=special,
        show_progress=False,
    )
    return tokenizer


package_of_docstring = Classification("Which package a docstring is from", len(texts.PACKAGES), texts.docstrings)
code_or_prose = Classification("Whether a line is code or prose", 2, texts.lines)
sentence_order = Classification("Whether two sentences stand in their order", 2, texts.sentence_pairs)

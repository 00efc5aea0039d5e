"""Language modelling: the demo's LLaMA over bytes; questions with answers, choices or text with any causal model."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.convergence.settings import Sizes
from benchmarks.convergence.tasks import sources
from benchmarks.convergence.tasks.kinds import Batch, Task, evaluating, pieces, pieces_by_length, told
from reslora_kernels.cli.demo import fine_tuning
from reslora_kernels.cli.demo.fine_tuning import Settings

IGNORED = -100
PROBLEM_BYTES = 112
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Language(Task):
    """Next-byte prediction; batches are {"input_ids", "labels"} [sequences, bytes], labels ``IGNORED`` elsewhere."""

    kind = "decoder"
    unit = "nats per byte"
    targets: tuple[str, ...] = LINEARS

    def base(self, sizes: Sizes) -> nn.Module:
        return fine_tuning.new_model(_demo(sizes))

    def pretrain(self, model: nn.Module, sizes: Sizes) -> None:
        """On the prose of Python's help topics."""
        text = fine_tuning.prose().train
        batches = fine_tuning.random_batches(text, sizes.pretraining_steps, sizes.batch, sizes.sequence, seed=0)
        fine_tuning.pretrain(model, batches.to(next(model.parameters()).device), _demo(sizes), lambda loss: None)

    def inputs(self, batch: Batch) -> dict[str, Any]:
        return {"input_ids": batch["input_ids"], "use_cache": False}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(**self.inputs(batch)).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)


class PythonSource(Language):
    title = "Python source after English prose"

    def train(self, sizes: Sizes, count: int, examples: int, seed: int) -> list[Batch]:
        drawn = fine_tuning.random_batches(fine_tuning.python_source().train, count, examples, sizes.sequence, seed)
        return [_whole(tokens) for tokens in drawn]

    def held_out(self, sizes: Sizes, examples: int) -> Batch:
        return _whole(fine_tuning.spread_batch(fine_tuning.python_source().held_out, examples, sizes.sequence))


class Arithmetic(Language):
    """Questions and answers; the loss is the answer's."""

    title = "Arithmetic word problems"
    metrics = ("exact_match",)

    def train(self, sizes: Sizes, count: int, examples: int, seed: int) -> list[Batch]:
        generator = random.Random(seed)
        return [_problems(examples, generator) for _ in range(count)]

    def held_out(self, sizes: Sizes, examples: int) -> Batch:
        return _problems(examples, random.Random("held out"))

    def figures(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        """The loss, and the share of answers that greedy generation gets right in full.

        An answer is generated exactly if and only if each byte is the most likely one after the true ones before it.
        """
        with evaluating(model):
            logits = model(**self.inputs(batch)).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        right = ((logits.argmax(-1) == labels) | (labels == IGNORED)).all(1)
        return {"loss": float(loss), "exact_match": float(right.float().mean())}


NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Ida")
THINGS = ("apples", "books", "coins", "pens", "shells", "stamps")
TEMPLATES: tuple[tuple[str, Callable[[int, int], int]], ...] = (
    ("{a} has {x} {things} and buys {y} more. How many {things} does {a} have now?", lambda x, y: x + y),
    ("{a} has {x} {things} and gives {b} {z} of them. How many are left?", lambda x, y: x - y % x),
    ("{a} and {b} each have {y} {things}, and {a} finds {x} more. How many in all?", lambda x, y: x + 2 * y),
)


def problem(generator: random.Random) -> tuple[str, str]:
    """A word problem of one or two steps, and its answer."""
    template, solve = generator.choice(TEMPLATES)
    a, b = generator.sample(NAMES, 2)
    x, y = generator.randint(2, 9), generator.randint(1, 9)
    text = template.format(a=a, b=b, x=x, y=y, z=y % x, things=generator.choice(THINGS))
    return f"{text} A: ", f"{solve(x, y)}\n"


def _demo(sizes: Sizes) -> Settings:
    return Settings(name="convergence", **asdict(sizes))


def _whole(tokens: Tensor) -> Batch:
    return {"input_ids": tokens, "labels": tokens}


def _problems(sequences: int, generator: random.Random) -> Batch:
    tokens = torch.full((sequences, PROBLEM_BYTES), 10)
    labels = torch.full((sequences, PROBLEM_BYTES), IGNORED)
    for row in range(sequences):
        question, answer = (part.encode() for part in problem(generator))
        whole = torch.tensor(list(question + answer))
        tokens[row, : len(whole)] = whole
        labels[row, len(question) : len(whole)] = whole[len(question) :]
    return {"input_ids": tokens, "labels": labels}


Row = dict[str, Any]


class Example(NamedTuple):
    """The loss is the completion's; ``choices`` has the completion among others, at ``answer``."""

    prompt: str
    completion: str
    choices: tuple[str, ...] = ()
    answer: int = 0


class GivenLanguage(Language):
    """Batches are {"input_ids", "attention_mask", "labels"} [sequences, tokens], and held out, where there are choices,
    {"choice_ids", "choice_labels"} [sequences, choices, tokens] and {"answer"} [sequences].
    """

    unit = "nats per token of the answer"
    comes_trained = True

    def __init__(self, model: str, data: str, dtype: torch.dtype) -> None:
        from transformers import AutoTokenizer

        parts = [list(part) for part in sources.datasets_of(data)]
        found = list(parts[0][0])
        columns = next((c for c in FORMS if set(c) <= set(found)), None)
        if columns is None:
            raise sources.refuse_columns(data, found, list(FORMS))
        read, metric = FORMS[columns]
        parts = [[row for row in part if row.get(columns[-1]) not in (None, "")] for part in parts]
        for name, part in zip(("answered train", "answered held-out"), parts, strict=True):
            sources.refuse_empty(part, name, data)
        try:
            self._train, self._held_out = ([read(row) for row in part] for part in parts)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(
                f"data {data!r} has a row that {{{', '.join(columns)}}} does not fit: {error!r}"
            ) from error
        self.title, self.metrics = sources.title_of(model, data), (metric,) if metric else ()
        self._model, self._dtype = model, dtype
        self._provenance = sources.provenance(model, data, dtype)
        with sources.reading("model", model):
            self._tokenizer: Any = AutoTokenizer.from_pretrained(model)
        if not self._tokenizer.is_fast or self._tokenizer.eos_token_id is None:
            raise ValueError(f"model {model!r} must have a fast tokenizer with an end-of-sequence token")
        pad = self._tokenizer.pad_token_id
        self._pad = self._tokenizer.eos_token_id if pad is None else pad

    def base(self, sizes: Sizes) -> nn.Module:
        """The pre-trained model; sets ``targets``: the linear layers in numbered layers."""
        from transformers import AutoModelForCausalLM

        with sources.reading("model", self._model):
            model: nn.Module = AutoModelForCausalLM.from_pretrained(self._model, dtype=self._dtype)
        self.targets = sources.linears_of_layers(model)
        self._keeps = "logits_to_keep" in signature(model.forward).parameters
        return model

    def pretrain(self, model: nn.Module, sizes: Sizes) -> None:
        """Nothing: the model comes trained."""

    def train(self, sizes: Sizes, count: int, examples: int, seed: int) -> list[Batch]:
        rows = sources.drawn(len(self._train), count, examples, torch.Generator().manual_seed(seed))
        return [self._encoded([self._train[i][:2] for i in row], sizes.sequence) for row in rows]

    def held_out(self, sizes: Sizes, examples: int) -> Batch:
        chosen = sources.shuffled(self._held_out)[:examples]
        batch = self._encoded([example[:2] for example in chosen], sizes.sequence)
        if not chosen[0].choices:
            return batch
        most = max(len(example.choices) for example in chosen)
        flat = [(e.prompt, c) for e in chosen for c in (*e.choices, *[""] * (most - len(e.choices)))]
        choices = self._encoded(flat, sizes.sequence)
        for row, (_, choice) in enumerate(flat):
            if not choice:  # a question with fewer choices than others: never taken
                choices["labels"][row] = IGNORED
        batch |= {f"choice_{to}": choices[name].view(len(chosen), most, -1) for name, to in _CHOICE_NAMES}
        return batch | {"answer": torch.tensor([example.answer for example in chosen])}

    def description(self) -> dict[str, Any]:
        return super().description() | self._provenance

    def inputs(self, batch: Batch) -> dict[str, Any]:
        return super().inputs(batch) | {"attention_mask": batch["attention_mask"]}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        losses, counts = self._losses(model, batch["input_ids"], batch["labels"])
        return losses.sum() / counts.sum()

    def figures(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        """The loss, and of choices how often the likeliest per token is the right one."""
        total, tokens, right = 0.0, 0, []
        with evaluating(model):
            for piece in pieces_by_length(batch):
                losses, counts = self._losses(model, piece["input_ids"], piece["labels"])
                total, tokens = total + float(losses.sum()), tokens + int(counts.sum())
                if "answer" not in batch:
                    continue
                of_choices = [
                    self._losses(model, ids, labels)
                    for ids, labels in zip(piece["choice_ids"].unbind(1), piece["choice_labels"].unbind(1), strict=True)
                ]
                nats = torch.stack([losses / counts for losses, counts in of_choices], 1)  # 0 / 0 where there is none
                right.append(nats.nan_to_num(torch.inf).argmin(1) == piece["answer"])
        found = {"loss": total / tokens}
        return found | ({"accuracy": float(torch.cat(right).float().mean())} if right else {})

    def final_figures(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        """How many final answers greedy generation gets right; see ``final_answer``."""
        if "exact_match" not in self.metrics:
            return {}
        right = []
        with evaluating(model):
            for piece in told(list(pieces(batch)), "generating, part"):
                said = self._generated(model, piece)
                meant = [
                    self._tokenizer.decode(ids[labels != IGNORED], skip_special_tokens=True)
                    for ids, labels in zip(piece["input_ids"], piece["labels"], strict=True)
                ]
                right += [final_answer(a) == final_answer(b) for a, b in zip(said, meant, strict=True)]
        return {"exact_match": sum(right) / len(right)}

    def _generated(self, model: Any, batch: Batch) -> list[str]:
        """As many tokens after each prompt as the longest answer has, and a quarter more."""
        answers = batch["labels"] != IGNORED
        starts, length = answers.int().argmax(1).tolist(), int(answers.sum(1).max())
        ids = torch.full((len(starts), max(starts)), self._pad, device=answers.device)
        mask = torch.zeros_like(ids)
        for row, start in enumerate(starts):
            ids[row, max(starts) - start :] = batch["input_ids"][row, :start]
            mask[row, max(starts) - start :] = 1
        written = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=length + length // 4, do_sample=False, num_beams=1,
            use_cache=True, pad_token_id=self._pad, eos_token_id=self._tokenizer.eos_token_id,
        )  # fmt: skip
        said: list[str] = self._tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
        return said

    def _losses(self, model: nn.Module, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Summed over the labels of each row, and how many they are; no other position's logits are worked out."""
        at = (labels[:, 1:] != IGNORED).any(0).nonzero()[:, 0]
        keep = {"logits_to_keep": at} if self._keeps else {}
        logits, labels = model(input_ids=ids, use_cache=False, **keep).logits, labels[:, 1 + at]
        logits = logits.float() if self._keeps else logits[:, at].float()
        nats = nn.functional.cross_entropy(logits.mT, labels, ignore_index=IGNORED, reduction="none")
        return nats.sum(1), (labels != IGNORED).sum(1)

    def _encoded(self, texts: Sequence[tuple[str, str]], most: int) -> Batch:
        rows = [self._tokens(*pair, min(most, self._tokenizer.model_max_length)) for pair in texts]
        shape = (len(rows), max(len(ids) for ids, _ in rows))
        ids, labels = torch.full(shape, self._pad), torch.full(shape, IGNORED)
        mask = torch.zeros(shape, dtype=torch.long)
        for row, (tokens, start) in enumerate(rows):
            ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
            labels[row, start : len(tokens)] = torch.tensor(tokens[start:])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def _tokens(self, prompt: str, completion: str, most: int) -> tuple[list[int], int]:
        """Both as at most ``most`` tokens, and where the completion starts; a long prompt loses its beginning."""
        found = self._tokenizer(prompt + completion, return_offsets_mapping=True)
        pairs = list(zip(found["input_ids"], found["offset_mapping"], strict=True))
        if pairs and pairs[-1][0] == self._tokenizer.eos_token_id:
            pairs.pop()
        ids = [token for token, _ in pairs]
        start = next((i for i, (_, (_, end)) in enumerate(pairs) if end > len(prompt)), len(ids))
        ids.append(self._tokenizer.eos_token_id)
        first = int(ids[0] == self._tokenizer.bos_token_id)
        cut = min(max(0, len(ids) - most), max(0, start - first))
        return (ids[:first] + ids[first + cut :])[:most], start - cut


_CHOICE_NAMES = (("input_ids", "ids"), ("labels", "labels"))


def final_answer(text: str) -> str | float:
    """What follows the last "####", else everything: as a number where it is one ("$1,200." is 1200.0)."""
    text = text.rpartition("####")[2].strip()
    try:
        return float(re.sub(r"[$,\s]", "", text).rstrip("."))
    except ValueError:
        return text


def _number(value: Any) -> str:
    """8.0 and "8.0" as "8"."""
    number = float(value)
    return str(int(number)) if number.is_integer() else str(number)


def _mathqa(row: Row) -> Example:
    letters = re.findall(r"\b([a-e]) ?\)", row["options"])
    prompt = f"Question: {row['Problem']}\nOptions: {row['options']}\nAnswer:"
    choices = tuple(f" {letter}" for letter in letters)
    return Example(prompt, f" {row['correct']}", choices, letters.index(row["correct"]))


def _hellaswag(row: Row) -> Example:
    choices, answer = tuple(f" {ending}" for ending in row["endings"]), int(row["label"])
    return Example(row["ctx"], choices[answer], choices, answer)


# columns, the last that of the answer: how a row is read, and what is measured of it beside the loss
FORMS: dict[tuple[str, ...], tuple[Callable[[Row], Example], str]] = {
    ("question", "answer"): (
        lambda row: Example(f"Question: {row['question']}\nAnswer:", f" {row['answer']}"), "exact_match"
    ),
    ("Body", "Question", "Answer"): (
        lambda row: Example(f"Question: {row['Body']} {row['Question']}\nAnswer:", f" {_number(row['Answer'])}"),
        "exact_match",
    ),
    ("Problem", "options", "correct"): (_mathqa, "accuracy"),
    ("ctx", "endings", "label"): (_hellaswag, "accuracy"),
    ("prompt", "completion"): (lambda row: Example(str(row["prompt"]), str(row["completion"])), "exact_match"),
    ("text",): (lambda row: Example("", str(row["text"])), ""),
}  # fmt: skip

"""From examples to token ids and labels: the loss is on completions and assistant turns only (label -100 elsewhere)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reslora_kernels.cli.examples import Chat, Completion, Example, Text

IGNORED = -100
DEFAULT_MAX_LENGTH = 1024

# For tokenizers without a chat template: a heading per turn, and the end-of-text token after what the assistant says.
PLAIN_CHAT_TEMPLATE = (
    "{{ bos_token if bos_token else '' }}"
    "{% for message in messages %}"
    "### {{ message['role'] | capitalize }}:\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token if eos_token else '' }}{% endif %}{{ '\n\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)

Span = tuple[int, int]


@dataclass(frozen=True)
class Row:
    """One training sequence: input_ids [T] and labels [T], int32, T at most max_length."""

    input_ids: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Encoded:
    """Rows by the example they came from, and the examples of which no trained token was left after cutting."""

    groups: tuple[tuple[Row, ...], ...]
    dropped: int

    @property
    def rows(self) -> list[Row]:
        return [row for group in self.groups for row in group]


def encode(examples: Sequence[Example], tokenizer: Any, max_length: int, vocabulary: int | None) -> Encoded:
    """Tokenize. Texts are split into pieces of ``max_length`` tokens; chats and completions are cut off there.

    Args:
        vocabulary: the model's number of tokens, where it is known.

    Raises:
        ValueError: an example that the chat template refuses, a token the model does not have, or nothing to learn.
    """
    if not getattr(tokenizer, "is_fast", False) and not all(isinstance(example, Text) for example in examples):
        raise ValueError(
            "the tokenizer gives no character offsets (it is not a fast one), which chats and prompts need"
        )
    groups = []
    for example in examples:
        rows = tuple(row for row in _rows(example, tokenizer, max_length) if bool((row.labels != IGNORED)[1:].any()))
        if rows:
            groups.append(rows)
    if not groups:
        raise ValueError(
            f"no example has a token to learn within --max-length {max_length}; raise it or shorten the prompts"
        )
    highest = max(int(row.input_ids.max()) for rows in groups for row in rows)
    if vocabulary is not None and highest >= vocabulary:
        raise ValueError(
            f"the tokenizer gives token {highest}, but the model has only {vocabulary}: they do not belong together"
        )
    return Encoded(tuple(groups), len(examples) - len(groups))


def max_length_for(asked: int | None, config: Any) -> int:
    """--max-length, or what fits the model.

    Raises:
        ValueError: it is more than the model has positions.
    """
    text_config = config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 2:
        return asked or DEFAULT_MAX_LENGTH
    if asked is not None and asked > positions:
        raise ValueError(f"--max-length must be at most {positions}, the positions of the model, got {asked}")
    return asked or min(DEFAULT_MAX_LENGTH, positions)


def collate(rows: Sequence[Row], pad: int) -> dict[str, Tensor]:
    """A batch [B, T] of input_ids, attention_mask and labels, padded on the right."""
    length = max(len(row.input_ids) for row in rows)
    ids = torch.full((len(rows), length), pad, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        size = len(row.input_ids)
        ids[i, :size], labels[i, :size], mask[i, :size] = row.input_ids, row.labels, 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def pad_token(tokenizer: Any) -> int:
    """Any token will do, since it is masked: the padding token, else the end of text, else 0."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(token) for token in known if token is not None), 0)


def _rows(example: Example, tokenizer: Any, max_length: int) -> Iterator[Row]:
    if isinstance(example, Text):
        ids = _with_end(list(tokenizer(example.text, verbose=False)["input_ids"]), tokenizer)
        for start in range(0, len(ids), max_length):
            piece = torch.tensor(ids[start : start + max_length], dtype=torch.int32)
            yield Row(piece, piece)
    elif isinstance(example, Completion):
        text = example.prompt + example.completion
        ids, labels = _labelled(tokenizer, text, [(len(example.prompt), len(text))], special=True)
        ended = _with_end(ids, tokenizer)
        yield _cut(ended, labels + ended[len(ids) :], max_length)
    else:
        for text, spans in _turns(example, tokenizer):
            yield _cut(*_labelled(tokenizer, text, spans, special=False), max_length)


def _cut(ids: list[int], labels: list[int], max_length: int) -> Row:
    first = slice(max_length)
    return Row(torch.tensor(ids[first], dtype=torch.int32), torch.tensor(labels[first], dtype=torch.int32))


def _with_end(ids: list[int], tokenizer: Any) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or (ids and ids[-1] == end) else [*ids, end]


def _labelled(tokenizer: Any, text: str, spans: Sequence[Span], *, special: bool) -> tuple[list[int], list[int]]:
    """Ids, and the same ids as labels where a token lies in one of the spans of ``text``, if only in part."""
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    ids = list(encoded["input_ids"])
    labels = [
        token if any(first < stop and last > start for start, stop in spans) else IGNORED
        for token, (first, last) in zip(ids, encoded["offset_mapping"], strict=True)
    ]
    return ids, labels


def _turns(example: Chat, tokenizer: Any) -> Iterator[tuple[str, list[Span]]]:
    """The conversation as text, with the spans of the assistant's turns.

    A template that renders a turn differently once others follow it (some drop earlier reasoning) gives one text per
    assistant turn, each as the model sees it when that turn is generated.
    """
    messages = example.messages
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    rendered = [_turn(messages, i, tokenizer, example.where) for i in turns]
    full = rendered[-1][0]
    if all(full.startswith(text) for text, _ in rendered):
        yield full, [span for _, span in rendered]
    else:
        for text, span in rendered:
            yield text, [span]


def _turn(messages: Sequence[Mapping[str, str]], i: int, tokenizer: Any, where: str) -> tuple[str, Span]:
    """The conversation up to assistant turn i, and the part of it that the model would generate."""
    text = _render(messages[: i + 1], tokenizer, where, prompt=False)
    before = _render(messages[:i], tokenizer, where, prompt=False) if i else ""
    asked = _render(messages[:i], tokenizer, where, prompt=True) if i else ""
    differing = (j for j, (a, b) in enumerate(zip(asked, text, strict=False)) if a != b)
    start = next(differing, min(len(asked), len(text)))
    if start < len(before):
        raise ValueError(
            f"{where}: the chat template changes what came before an assistant turn, so the turn cannot be told apart"
        )
    return text, (start, len(text))


def _render(messages: Sequence[Mapping[str, str]], tokenizer: Any, where: str, *, prompt: bool) -> str:
    from jinja2 import TemplateError

    template = tokenizer.chat_template or PLAIN_CHAT_TEMPLATE
    try:
        text: str = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=template,
            tokenize=False,
            add_generation_prompt=prompt,
        )
    except TemplateError as error:
        raise ValueError(f"{where}: the tokenizer's chat template refuses it: {error}") from None
    return text

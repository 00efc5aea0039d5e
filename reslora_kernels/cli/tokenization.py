"""From examples to token ids and labels: the loss is on completions and assistant turns only (label -100 elsewhere)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
    positions = getattr(text_config, "max_position_embeddings", getattr(text_config, "max_seq_len", None))
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
            yield _cut(*_stopping(*_labelled(tokenizer, text, spans, special=False), tokenizer), max_length)


def _cut(ids: list[int], labels: list[int], max_length: int) -> Row:
    first = slice(max_length)
    return Row(torch.tensor(ids[first], dtype=torch.int32), torch.tensor(labels[first], dtype=torch.int32))


def _with_end(ids: list[int], tokenizer: Any) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or (ids and ids[-1] == end) else [*ids, end]


def _labelled(tokenizer: Any, text: str, spans: Sequence[Span], *, special: bool) -> tuple[list[int], list[int]]:
    """Ids, and the same ids as labels where a token lies in one of the spans of ``text``, if only in part.

    A token without text is judged by what it is. One that the tokenizer adds is not learnt, but for the end token after
    all the text; any other (a space, of which some tokenizers keep no span) goes with the text after it, or before it.
    """
    encoded = tokenizer(
        text, add_special_tokens=special, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False
    )
    ids, offsets, marks = list(encoded["input_ids"]), encoded["offset_mapping"], encoded["special_tokens_mask"]
    learnt = {
        i: any(first < stop and last > start for start, stop in spans)
        for i, (first, last) in enumerate(offsets)
        if first < last
    }
    final = max(learnt, default=0)
    for i, token in enumerate(ids):
        if i not in learnt and marks[i]:
            learnt[i] = i > final and token == tokenizer.eos_token_id and learnt.get(final, False)
        elif i not in learnt:
            learnt[i] = learnt.get(min((j for j in learnt if j > i and not marks[j]), default=final), False)
    return ids, [token if learnt[i] else IGNORED for i, token in enumerate(ids)]


def _stopping(ids: list[int], labels: list[int], tokenizer: Any) -> tuple[list[int], list[int]]:
    """What ends each turn is learnt with it, also where the template leaves that to the next message's heading.

    After a last turn that nothing ends comes the end token.
    """
    marks = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    labels, stopped = list(labels), True
    for i, token in enumerate(ids):
        if labels[i] != IGNORED:
            stopped = token in marks or (stopped and not tokenizer.decode([token]).strip())
        elif not stopped and token in marks:
            labels[i], stopped = token, True
        else:
            stopped = True
    end = tokenizer.eos_token_id
    return (ids, labels) if stopped or end is None else ([*ids, end], [*labels, end])


def _turns(example: Chat, tokenizer: Any) -> Iterator[tuple[str, list[Span]]]:
    """The conversation as text, with the spans of the assistant's turns that are learnt.

    A template that renders a turn differently once others follow it (some drop earlier reasoning) gives one text per
    assistant turn, each as the model sees it when that turn is generated.
    """
    _check_all_is_shown(example, tokenizer)
    rendered = [_turn(example, i, tokenizer) for i in example.learnt]
    full = rendered[-1][0]
    if all(full.startswith(text) for text, _ in rendered):
        yield full, [span for _, span in rendered]
    else:
        for text, span in rendered:
            yield text, [span]


def _turn(example: Chat, i: int, tokenizer: Any) -> tuple[str, Span]:
    """The conversation up to assistant turn i, and the part of it that the model would generate."""
    messages = example.messages
    text = _render(example, messages[: i + 1], tokenizer, prompt=False)
    before = _render(example, messages[:i], tokenizer, prompt=False) if i else ""
    asked = _render(example, messages[:i], tokenizer, prompt=True) if i else ""
    differing = (j for j, (a, b) in enumerate(zip(asked, text, strict=False)) if a != b)
    start = next(differing, min(len(asked), len(text)))
    if start < len(before):
        raise ValueError(
            f"{example.where}: the chat template changes what came before an assistant turn, so the turn cannot be "
            "told apart"
        )
    return text, (start, len(text))


def _check_all_is_shown(example: Chat, tokenizer: Any) -> None:
    """Refuse what the chat template leaves out, which the model would be trained without.

    What only links a tool's answer to its call may be left out.
    """
    messages = example.messages
    if example.tools and _shown(example, messages, tokenizer) == _shown(
        replace(example, tools=()), messages, tokenizer
    ):
        raise ValueError(f"{example.where}: the tokenizer's chat template does not show 'tools' to the model")
    for i, message in enumerate(messages):
        links = ("name", "tool_call_id") if message["role"] == "tool" else ()
        for key in sorted(message.keys() - {"role", "content", "weight", *links}):
            so_far = messages[: i + 1]
            without = (*messages[:i], {name: value for name, value in message.items() if name != key})
            if _shown(example, so_far, tokenizer) == _shown(example, without, tokenizer):
                raise ValueError(
                    f"{example.where}: the tokenizer's chat template does not show {key!r} of messages[{i}] to the "
                    "model"
                )


def _shown(example: Chat, messages: Sequence[Mapping[str, Any]], tokenizer: Any) -> str:
    return _render(example, messages, tokenizer, prompt=False)


def _render(example: Chat, messages: Sequence[Mapping[str, Any]], tokenizer: Any, *, prompt: bool) -> str:
    from jinja2 import TemplateError

    for form in (_parsed, _as_written):
        shown = [_for_template(message, form) for message in messages]
        try:
            text: str = tokenizer.apply_chat_template(
                shown,
                tools=list(example.tools) or None,
                chat_template=None if tokenizer.chat_template else PLAIN_CHAT_TEMPLATE,  # it may have one for tools
                tokenize=False,
                add_generation_prompt=prompt,
                **example.template,
            )
        except TypeError as error:  # a template that joins the arguments to its text wants them as text
            fault: Exception = error
        except TemplateError as error:
            raise ValueError(f"{example.where}: the tokenizer's chat template refuses it: {error}") from None
        else:
            if not any(repr(arguments) in text for arguments in _objects(shown)):
                return text
            fault = ValueError("it writes the arguments of calls as Python does")
    raise ValueError(f"{example.where}: the tokenizer's chat template refuses it: {fault}")


def _objects(messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The arguments of calls that are objects, and not empty."""
    functions = [call.get("function") for message in messages for call in message.get("tool_calls", ())]
    arguments = [function.get("arguments") for function in functions if isinstance(function, Mapping)]
    return [value for value in arguments if isinstance(value, Mapping) and value]


def _for_template(message: Mapping[str, Any], form: Callable[[Any], Any]) -> dict[str, Any]:
    """The message as a template reads it, the arguments of its calls in the given form."""
    shown = {key: value for key, value in message.items() if key != "weight"}
    if "tool_calls" in shown:
        shown["tool_calls"] = [_with_arguments(call, form) for call in shown["tool_calls"]]
    return shown


def _with_arguments(call: Mapping[str, Any], form: Callable[[Any], Any]) -> Mapping[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or "arguments" not in function:
        return call
    return {**call, "function": {**function, "arguments": form(function["arguments"])}}


def _parsed(arguments: Any) -> Any:
    """As an object, which most templates print as JSON themselves."""
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except json.JSONDecodeError:
        return arguments  # text that is no JSON is what the model wrote


def _as_written(arguments: Any) -> Any:
    """As JSON text, as OpenAI has them."""
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)

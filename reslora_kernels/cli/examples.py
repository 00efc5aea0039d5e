"""Training examples from JSON Lines, text files and datasets, each checked and with the place it came from.

A record takes one of three forms; keys beside these are ignored:

- chat: ``{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}``
- completion: ``{"prompt": "...", "completion": "..."}``
- text: ``{"text": "..."}``; a file that is not JSON Lines is one such record
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reslora_kernels.cli.loading import require

JSON_LINES = (".jsonl", ".json", ".ndjson")
ROLES = ("system", "developer", "user", "assistant", "tool")
FORMS = '{"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}'


@dataclass(frozen=True)
class Chat:
    """A conversation with at least one assistant message."""

    messages: tuple[Mapping[str, str], ...]
    where: str


@dataclass(frozen=True)
class Completion:
    prompt: str
    completion: str
    where: str


@dataclass(frozen=True)
class Text:
    text: str
    where: str


Example = Chat | Completion | Text


def read_examples(option: str, source: str, split: str = "train") -> list[Example]:
    """Every example of a JSON Lines file, a text file, a dataset saved with ``save_to_disk``, or a dataset's id.

    Raises:
        OSError: the file does not exist or cannot be read.
        ValueError: a record is malformed (the message says where), or there is none.
    """
    path = Path(source).expanduser()
    if path.is_file():
        jsonl = path.suffix.lower() in JSON_LINES
        examples = list(_json_lines(path) if jsonl else _text_file(path))
    elif path.is_dir():
        examples = list(_dataset(option, path, split))
    elif path.suffix or source.startswith((".", "/", "~")) or source.count("/") > 1 or not source:
        raise FileNotFoundError(f"{option} {source!r} does not exist")
    else:
        examples = list(_dataset(option, source, split))
    if not examples or all(isinstance(example, Text) and not example.text.strip() for example in examples):
        raise ValueError(f"{option} {source!r} holds no examples: it is empty")
    return examples


def parse_record(record: Any, where: str) -> Example:
    """One record as an example.

    Raises:
        ValueError: it has none of the three forms.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: a record must be an object such as {FORMS}, got {type(record).__name__}")
    if "messages" in record:
        return Chat(_messages(record["messages"], where), where)
    if "prompt" in record and "completion" in record:
        example = Completion(_text(record, "prompt", where), _text(record, "completion", where), where)
        if not example.completion:
            raise ValueError(f"{where}: completion is empty, so there is nothing to learn")
        return example
    if "text" in record:
        return Text(_text(record, "text", where), where)
    raise ValueError(f"{where}: a record must be {FORMS}; this one has the keys {sorted(map(str, record)) or 'none'}")


def _messages(messages: Any, where: str) -> tuple[Mapping[str, str], ...]:
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"{where}: messages must be a list of at least one message, got {messages!r}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ValueError(f'{where}: messages[{i}] must be {{"role": ..., "content": ...}}, got {message!r}')
        if message["role"] not in ROLES:
            raise ValueError(f"{where}: messages[{i}] must have a role of {', '.join(ROLES)}, got {message['role']!r}")
        if not isinstance(message["content"], str):
            raise ValueError(f"{where}: messages[{i}] must have a str as content, got {message['content']!r}")
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError(f"{where}: messages hold no assistant message, so there is nothing to learn")
    return tuple({"role": message["role"], "content": message["content"]} for message in messages)


def _text(record: Mapping[str, Any], key: str, where: str) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key} must be a str, got {value!r}")
    return value


def _json_lines(path: Path) -> Iterator[Example]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path.name} line {number}"
            text = _decoded(line, where).strip()
            if not text:
                continue
            try:
                record = json.loads(text)
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{where}: not valid JSON ({error}); JSON Lines has one object per line") from None
            yield parse_record(record, where)


def _text_file(path: Path) -> Iterator[Example]:
    yield Text(_decoded(path.read_bytes(), path.name), path.name)


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text (byte {error.start} is 0x{content[error.start]:02x})") from None


def _dataset(option: str, source: str | Path, split: str) -> Iterator[Example]:
    """A split of a dataset: saved on disk, or by its id on the Hugging Face Hub."""
    require("datasets")
    import datasets

    saved = isinstance(source, Path) and any((source / n).is_file() for n in ("state.json", "dataset_dict.json"))
    if saved:
        loaded: Any = datasets.load_from_disk(str(source))
    else:
        loaded = datasets.load_dataset(str(source))
    if isinstance(loaded, Mapping):
        if split not in loaded:
            raise ValueError(f"{option} {str(source)!r} has no split {split!r}; it has {', '.join(map(str, loaded))}")
        loaded = loaded[split]
    rows: Iterable[Any] = loaded
    for number, record in enumerate(rows):
        yield parse_record(record, f"{source} row {number}")

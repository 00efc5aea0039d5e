"""Training examples from JSON Lines, text files and datasets, each checked and with the place it came from.

A record takes one of three forms, which are TRL's and OpenAI's too:

- chat: ``{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}``, or the same in
  two lists, ``{"prompt": [...], "completion": [...]}``, of which the second is learnt. ``tools`` and
  ``chat_template_kwargs`` beside them, and whatever a message holds (``tool_calls``, ``reasoning_content``, ``name``),
  go to the chat template; a message with ``"weight": 0`` is not learnt
- completion: ``{"prompt": "...", "completion": "..."}``
- text: ``{"text": "..."}``; a file that is not JSON Lines is one such record

Other keys of a record are notes about it and are ignored, but for those that would change what the model sees.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reslora_kernels.cli.options import require

JSON_LINES = (".jsonl", ".json", ".ndjson", ".jsonlines", ".jl")
TEXTS = ("", ".txt", ".text", ".md")
TABLES = (".csv", ".tsv", ".parquet", ".arrow", ".xlsx", ".gz", ".bz2", ".xz", ".zst", ".zip")  # no names of datasets
ROLES = ("system", "developer", "user", "assistant", "tool")
NOT_TEXT = ("functions", "function_call", "documents", "image", "images", "video", "videos", "audio", "audios")
FORMS = '{"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}'


@dataclass(frozen=True)
class Chat:
    """A conversation with an assistant message to learn.

    Attributes:
        tools: what the assistant could call, for the chat template.
        template: more variables for it (``{"enable_thinking": False}``).
        first: the message from which on turns are learnt.
    """

    messages: tuple[Mapping[str, Any], ...]
    where: str
    tools: tuple[Any, ...] = ()
    template: Mapping[str, Any] = field(default_factory=dict)
    first: int = 0

    @property
    def learnt(self) -> list[int]:
        """The messages to learn, by index."""
        return [i for i, m in enumerate(self.messages) if m["role"] == "assistant" and i >= self.first and _weight(m)]


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
    """Every example of a JSON Lines file, a text file, a pipe with either, a folder of data files, or a dataset.

    A dataset is a folder that ``save_to_disk`` wrote, or an id on the Hugging Face Hub.

    Raises:
        OSError: the file does not exist or cannot be read.
        ValueError: a record is malformed (the message says where), or there is none.
    """
    path = Path(source).expanduser()
    if path.is_file():
        examples = list(_json_lines(path) if path.suffix.lower() in JSON_LINES else _text_file(option, path))
    elif path.is_dir():
        examples = list(_dataset(option, path, split))
    elif path.exists():
        examples = list(_pipe(option, path))
    elif _names_a_path(source, path.suffix.lower()):
        raise FileNotFoundError(f"{option} {source!r} does not exist")
    else:
        examples = list(_dataset(option, source, split))
    if not examples or all(isinstance(example, Text) and not example.text.strip() for example in examples):
        raise ValueError(f"{option} {source!r} holds no examples: it is empty")
    return examples


def _names_a_path(source: str, suffix: str) -> bool:
    """Whether what does not exist was meant to be a path; else it is the id of a dataset, "owner/name.1" too."""
    if suffix and ("/" not in source or suffix in (*JSON_LINES, *TEXTS, *TABLES)):
        return True
    return not source or source.startswith((".", "/", "~")) or source.count("/") > 1


def parse_record(record: Any, where: str) -> Example:
    """One record as an example.

    Raises:
        ValueError: it has none of the three forms.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: a record must be an object such as {FORMS}, got {type(record).__name__}")
    _refuse_surrogates(record, where)
    record = {key: value for key, value in record.items() if value is not None}  # columns of a table, for other rows
    if "messages" in record:
        return _chat(record, _messages(record["messages"], "messages", where), 0, where)
    if "prompt" in record and "completion" in record:
        if isinstance(record["prompt"], (list, tuple)) and isinstance(record["completion"], (list, tuple)):
            prompt = _messages(record["prompt"], "prompt", where)
            return _chat(record, prompt + _messages(record["completion"], "completion", where), len(prompt), where)
        example = Completion(_text(record, "prompt", where), _text(record, "completion", where), where)
        if not example.completion:
            raise ValueError(f"{where}: completion is empty, so there is nothing to learn")
        return example
    if "text" in record:
        return Text(_text(record, "text", where), where)
    raise ValueError(f"{where}: a record must be {FORMS}; this one has the keys {sorted(map(str, record)) or 'none'}")


def _chat(record: Mapping[str, Any], messages: tuple[Mapping[str, Any], ...], first: int, where: str) -> Chat:
    for key in NOT_TEXT:
        if record.get(key):
            raise ValueError(f"{where}: {key!r} cannot be given to the model, which would learn without it")
    template = record.get("chat_template_kwargs") or {}
    if not isinstance(template, Mapping):
        raise ValueError(f"{where}: chat_template_kwargs must be an object, got {template!r}")
    example = Chat(messages, where, _tools(record.get("tools"), where), template, first)
    if not example.learnt:
        raise ValueError(f"{where}: messages hold no assistant message to learn")
    return example


def _tools(tools: Any, where: str) -> tuple[Any, ...]:
    """The tools, which TRL's datasets hold as JSON text."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: tools are not valid JSON ({error})") from None
    if tools is not None and not (isinstance(tools, (list, tuple)) and all(isinstance(t, Mapping) for t in tools)):
        raise ValueError(f"{where}: tools must be a list of objects, got {tools!r}")
    return tuple(tools or ())


def _messages(messages: Any, key: str, where: str) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"{where}: {key} must be a list of at least one message, got {messages!r}")
    return tuple(_message(message, f"{where}: {key}[{i}]") for i, message in enumerate(messages))


def _message(message: Any, where: str) -> Mapping[str, Any]:
    """The message without what it leaves empty (columns of a dataset), its text as one str."""
    if not isinstance(message, Mapping) or "role" not in message:
        raise ValueError(f'{where} must be {{"role": ..., "content": ...}}, got {message!r}')
    if message["role"] not in ROLES:
        raise ValueError(f"{where} must have a role of {', '.join(ROLES)}, got {message['role']!r}")
    kept = {key: value for key, value in message.items() if value is not None and value != []}
    content = _content(kept.get("content"))
    instead = set(kept) - {"role", "content", "weight", "name"}
    if not isinstance(content, str) and not (content is None and message["role"] == "assistant" and instead):
        raise ValueError(f"{where} must have a str as content, got {message.get('content')!r}")
    calls = kept.get("tool_calls", [])
    if not isinstance(calls, (list, tuple)) or not all(isinstance(call, Mapping) for call in calls):
        raise ValueError(f"{where} must have a list of objects as tool_calls, got {calls!r}")
    weight = kept.get("weight")
    if weight is not None and (isinstance(weight, bool) or weight not in ((0, 1) if _answers(message) else (0,))):
        raise ValueError(f"{where} must have a weight of 0 or 1, and 1 only on the assistant's, got {weight!r}")
    return {**kept, "content": content or ""}


def _content(content: Any) -> Any:
    """The text of a list of parts, where all are text; anything else as it is."""
    if isinstance(content, (list, tuple)) and all(
        isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    ):
        return "".join(part["text"] for part in content)
    return content


def _answers(message: Mapping[str, Any]) -> bool:
    return bool(message["role"] == "assistant")


def _weight(message: Mapping[str, Any]) -> bool:
    """Whether the loss is on the message, as OpenAI's format says it."""
    return bool(message.get("weight", 1))


def _refuse_surrogates(value: Any, where: str) -> None:
    """Half of a character, which JSON can hold and no tokenizer takes."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where}: no Unicode text: half a character ({value[error.start]!a}) at position {error.start}"
            ) from None
    elif isinstance(value, Mapping):
        for part in (*value.keys(), *value.values()):
            _refuse_surrogates(part, where)
    elif isinstance(value, (list, tuple)):
        for part in value:
            _refuse_surrogates(part, where)


def _text(record: Mapping[str, Any], key: str, where: str) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key} must be a str, got {value!r}")
    return value


def _json_lines(path: Path) -> Iterator[Example]:
    with open(path, "rb") as file:
        yield from _records(file, path.name)


def _records(lines: Iterable[bytes], name: str) -> Iterator[Example]:
    for number, line in enumerate(lines, 1):
        where = f"{name} line {number}"
        text = _decoded(line, where).strip()
        if not text:
            continue
        try:
            record = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{where}: not valid JSON ({error}); JSON Lines has one object per line") from None
        yield parse_record(record, where)


def _pipe(option: str, path: Path) -> Iterator[Example]:
    """What another program writes, which has no name to tell by: JSON Lines, if the first line is an object."""
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    if _holds(_decoded(next((line for line in lines if line.strip()), b""), path.name), dict):
        yield from _records(lines, path.name)
    else:
        yield _whole(option, path, _decoded(content, path.name))


def _text_file(option: str, path: Path) -> Iterator[Example]:
    if path.suffix.lower() not in TEXTS:
        raise ValueError(
            f"{option} {str(path)!r}: a file must be JSON Lines ({', '.join(JSON_LINES)}) or plain text "
            f"({', '.join(TEXTS[1:])}, or no suffix): rename it, or convert it with datasets (save_to_disk)"
        )
    text = _decoded(path.read_bytes(), path.name)
    if _holds(text.lstrip().partition("\n")[0], dict):
        raise ValueError(f"{option} {str(path)!r} looks like JSON Lines: name it {path.with_suffix('.jsonl').name!r}")
    yield _whole(option, path, text)


def _whole(option: str, path: Path, text: str) -> Text:
    if _holds(text, dict | list):
        raise ValueError(f"{option} {str(path)!r} is JSON: write its records as JSON Lines, one object per line")
    return Text(text, path.name)


def _holds(text: str, kinds: Any) -> bool:
    """Whether the text is JSON of one of ``kinds``."""
    try:
        return isinstance(json.loads(text), kinds) if text.lstrip()[:1] in ("{", "[") else False
    except (ValueError, RecursionError):
        return False


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text (byte {error.start} is 0x{content[error.start]:02x})") from None


def _dataset(option: str, source: str | Path, split: str) -> Iterator[Example]:
    """A split of a dataset: saved on disk, or by its id on the Hugging Face Hub."""
    require("datasets")
    import datasets

    where = source
    if isinstance(source, Path):
        source = source.resolve()  # by a bare name ("json") datasets means a builder for every file here
    elif source in getattr(datasets.packaged_modules, "_PACKAGED_DATASETS_MODULES", ()):
        raise FileNotFoundError(f"{option} {source!r} does not exist")
    try:
        if isinstance(source, Path) and any((source / n).is_file() for n in ("state.json", "dataset_dict.json")):
            loaded: Any = datasets.load_from_disk(str(source))
        else:
            loaded = datasets.load_dataset(str(source))
    except datasets.exceptions.DatasetsError as error:
        raise ValueError(f"{option} {str(where)!r} cannot be read: {error.__cause__ or error}") from error
    if isinstance(loaded, Mapping):
        if split not in loaded:
            raise ValueError(f"{option} {str(where)!r} has no split {split!r}; it has {', '.join(map(str, loaded))}")
        loaded = loaded[split]
    elif split not in ("train", str(loaded.split)):
        raise ValueError(f"{option} {str(where)!r} is one dataset without splits, so that it has no split {split!r}")
    rows: Iterable[Any] = loaded
    for number, record in enumerate(rows):
        yield parse_record(_without_nulls(record), f"{where} row {number}")


def _without_nulls(value: Any) -> Any:
    """The value without the nulls by which a table gives all its objects the same keys."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value

"""Where data comes from: labelled text of CPython's own, and models and data sets by path or hub id."""

from __future__ import annotations

import ast
import csv
import hashlib
import io
import random
import re
import sysconfig
import tokenize
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
HELD_OUT_NAMES = ("validation", "validation_matched", "valid", "val", "dev", "test")  # the first that there is
PART = 10  # a data set in one piece holds out one row in so many
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?")
T = TypeVar("T")


@contextmanager
def reading(argument: str, value: str) -> Iterator[None]:
    """Whatever is wrong with a path or hub id becomes a ``ValueError`` that names the argument."""
    looks_like_a_file = Path(value).suffix in FORMATS
    if not Path(value).exists() and (looks_like_a_file or not _HUB_ID.fullmatch(value)):
        raise ValueError(f"{argument} must be a path that exists or a hub id, got {value!r}")
    try:
        yield
    except (OSError, ValueError) as error:
        if str(error).startswith(argument):  # said so already
            raise
        raise ValueError(f"{argument} {value!r} cannot be read: {error}") from error


def datasets_of(data: str, *, images: bool = False) -> tuple[Any, Any]:
    """The ``datasets.Dataset`` to train on and the one held out, which holds no row of the other.

    A data set without a held-out part gives away the tenth of its rows with the lowest digests.

    Raises:
        ValueError: ``data`` cannot be read, or a part has no rows.
    """
    from datasets import Image

    with reading("data", data):
        parts = _local(Path(data), images) if Path(data).exists() else _hub(data)
    held_out = next((parts[name] for name in HELD_OUT_NAMES if name in parts), None)
    train = parts.get("train", next(iter(parts.values())) if len(parts) == 1 else None)
    if train is None:
        raise ValueError(f"data {data!r} must have a part named train, got {', '.join(parts)}")
    if held_out is None or held_out is train:
        texts = [name for name, feature in train.features.items() if not isinstance(feature, Image)]
        rows = train.select_columns(texts).to_list() if texts else []
        order = sorted(range(len(rows)), key=lambda i: hashlib.sha256(repr(sorted(rows[i].items())).encode()).digest())
        cut = max(1, len(order) // PART)
        train, held_out = train.select(sorted(order[cut:])), train.select(sorted(order[:cut]))
    for name, part in (("train", train), ("held-out", held_out)):
        refuse_empty(part, name, data)
    return train, held_out


def name_of(path_or_id: str) -> str:
    """A path's last part without its ending, a hub id as it is: no result tells where somebody keeps his files."""
    path = Path(path_or_id)
    return path.resolve().stem if path.exists() else path_or_id


def title_of(model: str, data: str) -> str:
    return f"{name_of(model)} on {name_of(data)}"


@cache
def provenance(model: str, data: str, dtype: torch.dtype) -> dict[str, Any]:
    """What a result is of: weights and tables by digest where they are files, by id where they are not."""
    return {
        "model": _digest(model, (".safetensors", ".bin")),
        "data": _digest(data),
        "dtype": str(dtype).removeprefix("torch."),
    }


def _digest(path_or_id: str, suffixes: tuple[str, ...] = ()) -> str:
    path = Path(path_or_id)
    if not path.exists():
        return path_or_id
    tables = sorted(file for file in path.glob("*") if file.suffix in FORMATS)  # what else is there may change
    files = tables if tables and not suffixes else sorted(path.rglob("*")) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        if file.is_file() and (not suffixes or file.suffix in suffixes):
            digest.update(file.name.encode())
            with file.open("rb") as content:
                while chunk := content.read(1 << 20):
                    digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


def refuse_empty(part: Collection[Any], name: str, data: str) -> None:
    """Raises ``ValueError`` where a part has no rows."""
    if not len(part):
        raise ValueError(f"data {data!r} must have at least one row to train on and one held out: no {name} rows")


def refuse_columns(data: str, found: Sequence[str], known: Sequence[Sequence[str]]) -> ValueError:
    """The error for columns that are not understood."""
    listed = "; ".join("{" + ", ".join(columns) + "}" for columns in known)
    return ValueError(f"data {data!r} must have the columns of one of {listed}; got {{{', '.join(found)}}}")


def _local(path: Path, images: bool) -> dict[str, Any]:
    """Parts by name; those of a folder are its files or, of images, its folders named after them."""
    from datasets import load_dataset

    if images:
        if not path.is_dir():
            raise ValueError(f"data must be a folder of images with metadata.jsonl, got the file {str(path)!r}")
        return dict(load_dataset("imagefolder", data_dir=str(path)))
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [file for file in files if file.suffix in FORMATS]
    if not files:
        raise ValueError(f"data {str(path)!r} must be or hold files that end in {', '.join(FORMATS)}: there are none")
    if len(files) == 1:
        return {"train": _table(files)}
    parts: dict[str, Any] = {}
    for name in ("train", *HELD_OUT_NAMES):
        found = [file for file in files if file.stem == name] or [file for file in files if file.stem.startswith(name)]
        if found and (name == "train" or len(parts) == 1):
            parts[name] = _table(found)
    if "train" not in parts:
        raise ValueError(f"data {str(path)!r} must have a file named train.*, got {', '.join(f.name for f in files)}")
    return parts


def _table(files: list[Path]) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    names, suffix = [str(file) for file in files], files[0].suffix
    if not any(file.stat().st_size for file in files):
        raise ValueError(f"data {names[0]!r} must have rows: it is empty")
    more = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if suffix == ".tsv" else {}
    try:
        return load_dataset(FORMATS[suffix], data_files=names, split="train", **more)
    except DatasetGenerationError as error:
        raise ValueError(f"data {names[0]!r} must be a table of rows: {error.__cause__ or error}") from error


def _hub(data: str) -> dict[str, Any]:
    from datasets import get_dataset_config_names, load_dataset

    name, _, config = data.partition(":")
    known = [] if config else get_dataset_config_names(name)
    if len(known) > 1:
        config = next((usual for usual in ("main", "default") if usual in known), "")
        if not config:
            raise ValueError(f"data {data!r} must name a configuration, as {name}:{known[0]}: {', '.join(known)}")
    return dict(load_dataset(name, config or None))


def shuffled(rows: Sequence[T]) -> list[T]:
    """In a random order that is always the same: files are often sorted by label."""
    return random.Random(0).sample(list(rows), len(rows))


def drawn(rows: int, count: int, examples: int, generator: torch.Generator) -> list[list[int]]:
    """``count`` lists of ``examples`` row numbers."""
    found: list[list[int]] = torch.randint(rows, (count, examples), generator=generator).tolist()
    return found


def linears_of_layers(model: nn.Module) -> tuple[str, ...]:
    """The linear layers inside numbered layers, by what follows the number: "self_attn.q_proj"; no output head.

    Raises:
        ValueError: there are none.
    """
    found = set()
    for name, module in model.named_modules():
        parts = name.split(".")
        numbers = [i for i, part in enumerate(parts[:-1]) if part.isdecimal()]
        if isinstance(module, nn.Linear) and numbers:
            found.add(".".join(parts[numbers[-1] + 1 :]))
    if not found:
        raise ValueError(f"model must have torch.nn.Linear in numbered layers, a {type(model).__name__} has none")
    return tuple(sorted(found))


PACKAGES = ("asyncio", "email", "idlelib", "importlib", "logging", "tkinter")
HELD_OUT = 5  # one text in so many, chosen by its digest
_CODE = (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)


class Labelled(NamedTuple):
    text: str
    label: int


class Split(NamedTuple):
    """Neither part holds a text of the other, or a pair of sentences; each is in a fixed random order."""

    train: tuple[Labelled, ...]
    held_out: tuple[Labelled, ...]


@cache
def docstrings() -> Split:
    """Docstrings of the standard library; the label is the place of their package in ``PACKAGES``."""
    found: dict[str, int] = {}
    for label, package in enumerate(PACKAGES):
        for path in _modules(package):
            found |= {text: label for text in _docstrings(path) if found.get(text, label) == label}
    return _split(found.items())


@cache
def lines() -> Split:
    """Lines of the standard library's code (label 0) and of the help topics' prose (label 1), without indentation."""
    code = {line for path in sorted(_library().glob("*.py")) for line in _code_lines(path)}
    prose = {line.strip() for line in _prose().splitlines() if not line.startswith("    ") and len(line.split()) > 4}
    count = min(len(code), len(prose))
    return _split(
        (line, label)
        for label, lines in enumerate((code, prose))
        for line in random.Random(0).sample(sorted(lines), count)
    )


@cache
def sentence_pairs() -> Split:
    """The first two sentences of a paragraph of the help topics or of a docstring of the standard library.

    As they stand (label 1) or the other way round (label 0).
    """
    paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", _prose())]
    paragraphs += [text for path in _modules() for text in _docstrings(path)]
    coin = random.Random(0)
    pairs: dict[str, int] = {}
    for paragraph in dict.fromkeys(paragraphs):
        first, second, *_ = *re.split(r"(?<=[.?!])\s+", paragraph), "", ""
        if min(len(first), len(second)) > 15 and first[0].isupper() and second[0].isupper():
            right = coin.randrange(2)
            pairs[f"{first}\n{second}" if right else f"{second}\n{first}"] = right
    return _split(pairs.items())


def _split(texts: Iterable[tuple[str, int]]) -> Split:
    parts: tuple[list[Labelled], list[Labelled]] = ([], [])
    for text, label in sorted(texts):
        digest = hashlib.sha256("".join(sorted(text.split("\n"))).encode()).digest()  # a pair's order does not count
        parts[digest[0] % HELD_OUT == 0].append(Labelled(text, label))
    for part in parts:
        random.Random(0).shuffle(part)
    return Split(*map(tuple, parts))


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _modules(package: str = "") -> list[Path]:
    """The source files of the standard library, or of one package, but for tests and what is installed beside it."""
    paths = sorted((_library() / package).rglob("*.py"))
    return [p for p in paths if not re.search("test|site-packages|dist-packages", str(p.relative_to(_library())))]


def _prose() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _docstrings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)):
            text = " ".join((ast.get_docstring(node) or "").split())
            if len(text) > 20:
                yield text


def _code_lines(path: Path) -> Iterator[str]:
    source = path.read_text(encoding="utf-8")
    rows: dict[int, int] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in _CODE and token.start[0] == token.end[0]:
            rows[token.start[0]] = rows.get(token.start[0], 0) + 1
    text = source.splitlines()
    return (text[row - 1].strip() for row, tokens in rows.items() if tokens > 3 and len(text[row - 1].strip()) > 20)

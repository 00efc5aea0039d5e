"""Labelled text that comes with CPython, split once and for all into a part to train on and a part held out."""

from __future__ import annotations

import ast
import hashlib
import io
import random
import re
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

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

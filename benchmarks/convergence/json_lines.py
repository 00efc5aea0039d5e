"""A file with one JSON object a line, to which processes append at the same time and which a crash leaves readable.

Who appends holds the file's lock: a piece of an object behind the last line feed is of a process that died writing it.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any, BinaryIO


def append(value: dict[str, Any], path: Path) -> None:
    """Add a line, which is on the disk when this returns; the piece that a crash left is cut off."""
    line = json.dumps(value).encode() + b"\n"
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _end_the_last_line(file)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def _end_the_last_line(file: BinaryIO) -> None:
    file.seek(0)
    content = file.read()
    end = content.rfind(b"\n") + 1
    if _is_a_piece(content[end:]):
        file.truncate(end)
    elif content[end:]:
        file.write(b"\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Every object, none if there is no file; not the piece that a crash left.

    Raises:
        ValueError: a line is no JSON object.
    """
    if not path.exists():
        return []
    *lines, last = path.read_bytes().split(b"\n")
    lines += [last] if last and not _is_a_piece(last) else []
    return [_parsed(line, f"{path}, line {i}") for i, line in enumerate(lines, 1)]


def _is_a_piece(last: bytes) -> bool:
    """Whether what stands behind the last line feed lacks more than another."""
    try:
        json.loads(last or b"{}")
    except ValueError:
        return True
    return False


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} must be a JSON object: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a JSON object, got {value!r}")
    return value

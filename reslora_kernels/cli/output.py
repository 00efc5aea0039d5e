"""Folders that commands write: refused early when they cannot be, and put in place whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_writable(option: str, folder: Path) -> None:
    """Raise an OSError unless ``folder`` is a folder, or can be made one, that this user may write to."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{option} {str(folder)!r} is a file, not a folder")
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{option} {str(folder)!r} cannot be made: {str(existing)!r} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(
            f"{option} {str(folder)!r} cannot be written: no permission to write in {str(existing)!r}"
        )


def check_replaceable(folder: Path, overwrite: bool, marker: str, sources: tuple[str | Path, ...]) -> None:
    """Refuse an output folder ``--out`` whose replacement would lose something.

    Args:
        marker: the file that a folder written by an earlier run of the command holds.
        sources: what the command reads.

    Raises:
        OSError: it is not writable, or holds files and either ``overwrite`` is off or ``marker`` is not among them.
        ValueError: it is, or holds, one of ``sources``.
    """
    check_writable("--out", folder)
    for source in sources:
        inside = Path(source).resolve()
        if folder.resolve() in (inside, *inside.parents):
            raise ValueError(f"--out {str(folder)!r} would replace {str(source)!r}, which is read; give another folder")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(f"--out {str(folder)!r} is not empty; give another folder, or --overwrite to replace it")
    if not (folder / marker).is_file():
        raise FileExistsError(
            f"--out {str(folder)!r} is not replaced: it holds no {marker}, so another program's files are in it"
        )


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder next to ``folder`` to write to, which takes its place at the end. After an error it is as before."""
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.with_name(f".{folder.name}.{os.getpid()}.new")
    previous = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    staging.mkdir()
    try:
        yield staging
        _apply_umask(staging)
        if folder.exists():
            os.replace(folder, previous)
        os.replace(staging, folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        if previous.exists() and not folder.exists():
            os.replace(previous, folder)
        raise
    if previous.exists():
        shutil.rmtree(previous)


def _apply_umask(folder: Path) -> None:
    """Give files the modes of any new file: some libraries write weights that only their owner can read."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)

"""Folders that commands write: refused early when they cannot be, and put in place whole or not at all.

A link means the folder that it leads to. A mount point, or a folder with no place beside it, is filled in place.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

# What Transformers and PEFT write into a model's or an adapter's folder, tokenizer, processor and remote code included.
_OF_MODELS = re.compile(
    r"[\w.-]+\.(json|safetensors|bin|model|txt|jinja|tiktoken|spm|bpe|codes|tokenizer|vocab)|README\.md"
    r"|(additional_)?chat_templates|\w*tokenizer|\.reslora-.*"
)


def _is_of_a_model(entry: Path) -> bool:
    if entry.suffix == ".py":  # code that comes with the model, which its files name
        described = [entry.with_name(name) for name in ("config.json", "tokenizer_config.json", "adapter_config.json")]
        return any(b'"auto_map"' in path.read_bytes() for path in described if path.is_file())
    return _OF_MODELS.fullmatch(entry.name) is not None


def check_writable(option: str, folder: Path) -> None:
    """Raise an OSError unless ``folder`` is a folder, or can be made one, that this user may write to.

    It is tried out with a file in it, or where it is missing in a folder of the same names inside a temporary one:
    another run that starts now may need some of the same folders.
    """
    where = f"{option} {str(folder)!r}"
    try:
        folder = folder.resolve()
    except RuntimeError as error:  # what Python says before 3.13
        raise OSError(f"{where} cannot be made: links lead in a circle") from error
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{where} is a file, not a folder")
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    existing = missing[-1].parent if missing else folder
    if not existing.is_dir():
        raise NotADirectoryError(f"{where} cannot be made: {str(existing)!r} is a file")
    try:
        with contextlib.ExitStack() as tried:
            if missing:
                scratch = tried.enter_context(tempfile.TemporaryDirectory(prefix=".reslora-", dir=existing))
                Path(scratch, folder.relative_to(existing)).mkdir(parents=True)
            else:
                tried.enter_context(tempfile.TemporaryFile(dir=folder))
    except OSError as error:
        raise OSError(error.errno, f"{where} cannot be written in {str(existing)!r}: {error.strerror}") from error


def check_replaceable(folder: Path, overwrite: bool, marker: str, sources: Sequence[str | Path]) -> None:
    """Refuse an output folder ``--out`` whose replacement would lose something.

    Args:
        marker: the file that a folder written by an earlier run of the command holds.
        sources: what the command reads.

    Raises:
        OSError: it is not writable, or holds files and either ``overwrite`` is off or they are not all of a model or an
            adapter, ``marker`` among them.
        ValueError: it is, or holds, one of ``sources``.
    """
    check_writable("--out", folder)
    check_apart(folder, sources)
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(f"--out {str(folder)!r} is not empty; give another folder, or --overwrite to replace it")
    others = sorted(entry.name for entry in folder.iterdir() if not _is_of_a_model(entry))
    if others or not (folder / marker).is_file():
        why = f"it holds {', '.join(map(repr, others[:3]))}" if others else f"it holds no {marker}"
        raise FileExistsError(f"--out {str(folder)!r} is not replaced: {why}, so another program's files are in it")


def check_apart(folder: Path, sources: Sequence[str | Path]) -> None:
    """Raise a ValueError if the folder ``--out`` is, or holds, one of ``sources``, which are read."""
    for source in sources:
        inside = Path(source).expanduser().resolve()
        if inside.exists() and folder.resolve() in (inside, *inside.parents):
            raise ValueError(f"--out {str(folder)!r} would replace {str(source)!r}, which is read; give another folder")


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write to, which takes the place of ``folder`` at the end. After an error that is as before.

    Raises:
        OSError: what was written could not be put in place. It is kept, and the message says where.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = _staging(folder)
    try:
        yield staging
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    try:
        _apply_umask(staging)
        previous = None if staging.parent == folder else _exchange(staging, folder)
        if staging.exists():
            _fill(staging, folder)
    except OSError as error:
        raise OSError(
            error.errno,
            f"the result is finished and in {str(staging)!r}; it could not be put in {str(folder)!r}: {error.strerror}",
        ) from error
    if previous is not None:
        shutil.rmtree(previous)


def _staging(folder: Path) -> Path:
    """A new folder on the same disk: beside ``folder``, or in it if it is a mount point or has no place beside it.

    Or if this process is in it, and would be left in a folder that is no longer there.
    """
    try:
        place = folder if os.path.ismount(folder) or _is_here(folder) else folder.parent
        return Path(tempfile.mkdtemp(prefix=".reslora-", suffix=".new", dir=place))
    except OSError:
        if not folder.is_dir():
            raise
        return Path(tempfile.mkdtemp(prefix=".reslora-", suffix=".new", dir=folder))


def _is_here(folder: Path) -> bool:
    """Whether this process works in ``folder``."""
    try:
        return folder in (Path.cwd(), *Path.cwd().parents)
    except FileNotFoundError:  # its own is gone
        return False


def _exchange(staging: Path, folder: Path) -> Path | None:
    """Put ``staging`` in the place of ``folder`` by renames. Returns where that is now, if there was one.

    Nothing is done if the system does not let ``folder`` be renamed.
    """
    previous = staging.with_suffix(".old")
    if folder.exists():
        try:
            os.replace(folder, previous)
        except OSError:  # a mount below it, a lower layer of an overlay, another user's folder: it is filled in place
            return None
    try:
        os.replace(staging, folder)
    except OSError:
        if previous.exists():
            os.replace(previous, folder)
        raise
    return previous if previous.exists() else None


def _fill(staging: Path, folder: Path) -> None:
    """Move what is in ``staging`` into ``folder``, and then remove what else was there and ``staging``."""
    before = {entry.name for entry in folder.iterdir()} - {staging.name}
    new = {entry.name for entry in staging.iterdir()}
    for name in sorted(new):
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            shutil.rmtree(folder / name)
        os.replace(staging / name, folder / name)
    for name in before - new:
        _remove(folder / name)
    staging.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _apply_umask(folder: Path) -> None:
    """Give files and folders the modes of any new one: some libraries write weights that only their owner can read."""
    umask = os.umask(0)
    os.umask(umask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)

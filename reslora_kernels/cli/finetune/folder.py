"""The folder of a run: its record, its checkpoints, and the earlier run that it is to replace."""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

from reslora_kernels.files.adapter_format import CONFIG_NAME, WEIGHTS_NAME, write_durably

RECORD_NAME = "finetune.json"
OUTPUTS = ("adapter", "merged", "peft", RECORD_NAME)
_ASIDE = ".earlier-run"
_OF_ANY_LENGTH = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau")  # learning rates
_LEFTOVERS = re.compile(rf"\.reslora-.*|\.{re.escape(RECORD_NAME)}\.\d+\.tmp")  # of a run that was killed as it wrote


def last_checkpoint(output_dir: Path) -> Path:
    """The newest checkpoint that was written to its end; a killed run may leave an incomplete one after it.

    Raises:
        FileNotFoundError: there is none. It says what the newest lacks.
    """
    found = sorted(_checkpoints(output_dir), key=lambda folder: int(folder.name.rpartition("-")[2]), reverse=True)
    lacking = {folder: _lacks(folder) for folder in found}
    for folder, missing in lacking.items():
        if missing is None:
            return folder
    why = f": {found[0].name} has no whole {lacking[found[0]]}" if found else ""
    if (output_dir / _ASIDE).exists():
        why += f"; the run that this one was to replace is in {_ASIDE!r} there: move it back, or --overwrite once more"
    raise FileNotFoundError(f"--resume: {str(output_dir)!r} holds no complete checkpoint{why}")


def _checkpoints(output_dir: Path) -> list[Path]:
    return [f for f in output_dir.glob("checkpoint-*") if f.is_dir() and re.fullmatch(r"checkpoint-\d+", f.name)]


def _lacks(folder: Path) -> str | None:
    """A file without which a run does not go on exactly; None if all are there and whole.

    That the Trainer writes last is among them. DeepSpeed and FSDP keep the optimizer in files of their own.
    """
    state = folder / "trainer_state.json"
    try:
        sound = state.is_file() and isinstance(json.loads(state.read_bytes()), dict)
    except ValueError:
        sound = False
    if not sound:
        return state.name
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            return name
    theirs = (
        any(folder.glob("global_step*")) or any(folder.glob("optimizer_[0-9]*")) or (folder / "optimizer.bin").exists()
    )
    for name in () if theirs else ("optimizer.pt", "scheduler.pt"):
        if not zipfile.is_zipfile(folder / name):  # what torch.save writes; cut off, it is none
            return name
    return None if any(folder.glob("rng_state*.pth")) else "rng_state.pth"


def is_earlier_run(output_dir: Path) -> bool:
    """Whether the folder holds nothing but what ``reslora finetune`` writes."""
    known = {folder.name for folder in _checkpoints(output_dir)} | {*OUTPUTS, _ASIDE}
    return all(entry.name in known or _LEFTOVERS.fullmatch(entry.name) for entry in output_dir.iterdir())


def set_aside(output_dir: Path) -> None:
    """Put what an earlier run left where ``bring_back`` finds it, until ``drop`` removes it.

    What a run had set aside that was killed before its first step stays there, and what it left itself is removed.
    """
    aside = output_dir / _ASIDE
    for entry in list(output_dir.iterdir()) if output_dir.exists() else []:
        if entry == aside:
            continue
        if (aside / entry.name).exists() or _LEFTOVERS.fullmatch(entry.name):
            _remove(entry)
        else:
            aside.mkdir(exist_ok=True)
            os.replace(entry, aside / entry.name)


def bring_back(output_dir: Path) -> None:
    """The inverse of ``set_aside``, for a run that has got through no step."""
    aside = output_dir / _ASIDE
    if aside.exists():
        (output_dir / RECORD_NAME).unlink(missing_ok=True)
        for entry in list(aside.iterdir()):
            os.replace(entry, output_dir / entry.name)
        aside.rmdir()


def drop(output_dir: Path) -> None:
    """Remove what was set aside; a part of it is never brought back."""
    if (output_dir / _ASIDE).exists():
        going = output_dir / f".reslora-{os.getpid()}.old"
        os.replace(output_dir / _ASIDE, going)
        shutil.rmtree(going)


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink()


def check_same_run(output_dir: Path, settings: dict[str, Any]) -> None:
    """Refuse to resume a run with other settings than it was started with, since the result would be neither's.

    Raises:
        OSError, ValueError: the folder has no record of a run, or one with other settings.
    """
    path = output_dir / RECORD_NAME
    if not path.is_file():
        raise FileNotFoundError(f"--resume: {str(output_dir)!r} holds no {RECORD_NAME}: no run was started there")
    try:
        started = json.loads(path.read_bytes())["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--resume: {path} is damaged: {error!r}") from None
    now = json.loads(json.dumps(settings))
    keys = started.keys() | now.keys()
    if now["lr_scheduler_type"] in _OF_ANY_LENGTH and (now["warmup_steps"] == 0 or now["warmup_steps"] >= 1):
        keys -= {"max_steps", "num_train_epochs"}
    changed = [
        f"{key} was {started.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(keys)
        if started.get(key) != now.get(key)
    ]
    if changed:
        raise ValueError(f"--resume needs the settings that the run was started with: {'; '.join(changed)}")


def write_record(output_dir: Path, record: dict[str, Any]) -> None:
    """Replace the run's record in one step."""
    output_dir.mkdir(parents=True, exist_ok=True)
    temporary = output_dir / f".{RECORD_NAME}.{os.getpid()}.tmp"
    write_durably(temporary, (json.dumps(record, indent=2) + "\n").encode())
    os.replace(temporary, output_dir / RECORD_NAME)

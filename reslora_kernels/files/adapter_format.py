"""The two files of a saved adapter: JSON and safetensors, written so that a crash loses nothing, read with suspicion.

A folder holds ``reslora_model.safetensors`` and ``reslora_config.json``; the config holds the weights' SHA-256, so the
two cannot be mixed up. Saving over an older adapter commits with one rename, that of the config: until it happens the
old pair is in place, and from then on the new weights are found under their final or their temporary name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._version import __version__
from ..adapt.linking import ChainPlan
from ..config import ResLoRAConfig
from ..layers.adapter import ADAPTER_PARAMETERS
from ..layers.wrappers import without_wrappers

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]  # there is none on Windows

CONFIG_NAME = "reslora_config.json"
WEIGHTS_NAME = "reslora_model.safetensors"
_PENDING_NAME = "reslora_model.pending.safetensors"
_FORMAT_VERSION = 1
_DTYPES = ("F64", "F32", "F16", "BF16")
_IN_EVERY_CONFIG = ("r", "lora_alpha", "target_modules", "shortcut", "pre_num")  # without: their defaults, silently


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter read from disk and checked for itself, not yet against a model."""

    config: ResLoRAConfig
    chains: list[ChainPlan] | None
    chains_from: str | None  # "structure" or "given"; None in files of versions that read them off a run
    same_input: list[list[str]]
    trained: list[str]
    frozen: list[str]
    tensors: dict[str, Tensor]

    @property
    def beside(self) -> list[str]:
        """The parameters that are no adapters: those that trained, and those that the base checkpoint lacks."""
        return self.trained + self.frozen

    @property
    def layers(self) -> set[str]:
        return {key.rpartition(".")[0] for key in self.tensors.keys() - set(self.beside)}

    def unwrapped(self) -> SavedAdapter:
        """Without the prefix that DDP puts before every name."""
        plain = {name: name.removeprefix("module.") for name in (*self.tensors, *self.beside, *self.layers)}
        return SavedAdapter(
            self.config,
            self.chains
            and [plan._replace(names=[name.removeprefix("module.") for name in plan.names]) for plan in self.chains],
            self.chains_from,
            [[name.removeprefix("module.") for name in names] for names in self.same_input],
            [plain[name] for name in self.trained],
            [plain[name] for name in self.frozen],
            _renamed({plain[key]: tensor for key, tensor in self.tensors.items()}, len(self.tensors)),
        )


def serialized(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """The content of a safetensors file. Tensors that share memory are written one by one."""
    from safetensors.torch import save

    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return save(apart, metadata={"format": "pt", **(metadata or {})})


def encoded(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[bytes, bytes]:
    """The contents of the config and of the weights; ``config`` lacks only what describes the files."""
    weights = serialized(tensors)
    about = {
        "format": "reslora",
        "format_version": _FORMAT_VERSION,
        "reslora_version": __version__,
        **config,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    return (json.dumps(about, indent=2) + "\n").encode(), weights


def write(folder: Path, config: bytes, weights: bytes) -> None:
    """Write both files, which belong together. A crash leaves the old pair or the new one."""
    with one_at_a_time(folder):
        _finish_killed_save(folder)
        _write(folder, config, weights)


def _write(folder: Path, config: bytes, weights: bytes) -> None:
    pending, temporary = folder / _PENDING_NAME, folder / f".{CONFIG_NAME}.tmp"
    try:
        write_durably(pending, weights)
        write_durably(temporary, config)
        sync_folder(folder)
    except OSError:  # a full disk: what is half-written would keep it full
        pending.unlink(missing_ok=True)
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, folder / CONFIG_NAME)  # the commit
    os.replace(pending, folder / WEIGHTS_NAME)
    sync_folder(folder)


def _finish_killed_save(folder: Path) -> None:
    """Weights that a save killed after its commit left under their temporary name get their final one."""
    pending, config = folder / _PENDING_NAME, folder / CONFIG_NAME
    if not (pending.exists() and config.exists()):
        return
    if hashlib.sha256(pending.read_bytes()).hexdigest().encode() in config.read_bytes():
        os.replace(pending, folder / WEIGHTS_NAME)
        sync_folder(folder)


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """The folder, made if need be, for this writer alone: all processes of a run may be told to save to it."""
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks for folders: NFS
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the folder's renames are on the disk (where the system can do that for folders)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def checked_folder(path: str | os.PathLike[str]) -> Path:
    """``path`` as a Path; TypeError if it is none, NotADirectoryError if it is a file."""
    if not isinstance(path, (str, os.PathLike)) or isinstance(path, bytes):
        raise TypeError(f"path must be a str or os.PathLike, got {type(path).__name__}")
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"path must be a folder, got the file {str(folder)!r}")
    return folder


def read(folder: Path) -> SavedAdapter:
    config = _config_file(folder).read_bytes()
    return parsed(config, _find_weights(folder, _parsed_config(config)[1]))


def parsed(config: bytes, weights: bytes) -> SavedAdapter:
    """The adapter of two files' contents; ValueError if they are no sound adapter."""
    about, _ = _parsed_config(config)
    tensors = parsed_tensors(weights, WEIGHTS_NAME)
    tensors = _renamed({without_wrappers(key): tensor for key, tensor in tensors.items()}, len(tensors))
    for key in tensors:
        if key not in about.beside and key.rpartition(".")[2] not in ADAPTER_PARAMETERS:
            allowed = ", ".join(f".{name}" for name in ADAPTER_PARAMETERS)
            raise ValueError(f"{WEIGHTS_NAME}: unexpected tensor {key!r}; adapters end in {allowed}")
    return replace(about, tensors=tensors)


def _config_file(folder: Path) -> Path:
    if not os.path.lexists(folder / CONFIG_NAME):
        whole = any(folder.glob("model*.safetensors")) or any(folder.glob("diffusion_pytorch_model*.safetensors"))
        hint = (
            ". It holds a whole model: if that was saved with adapters in it, load_state_dict of a model that is "
            "adapted alike takes its weights"
        )
        missing = f"path {str(folder)!r} holds no {CONFIG_NAME}: it is not a ResLoRA adapter"
        raise FileNotFoundError(missing + (hint if whole else ""))
    return regular(folder / CONFIG_NAME)


def _parsed_config(content: bytes) -> tuple[SavedAdapter, str]:
    """What the config says of the adapter, without its tensors, and the SHA-256 of the file that holds those."""
    where = CONFIG_NAME
    values = parsed_json(content, f"{where} is not valid JSON")
    if not isinstance(values, dict) or values.get("format") != "reslora":
        raise ValueError(f"{where} is not the config of a ResLoRA adapter (its \"format\" must be 'reslora')")
    if values.get("format_version") != _FORMAT_VERSION:
        raise ValueError(f"{where}: format_version must be {_FORMAT_VERSION}, got {values.get('format_version')!r}")
    expected = {
        "format", "format_version", "reslora_version", "config", "chains", "chains_from", "same_input",
        "trained_parameters", "frozen_parameters", "base_model_name_or_path", "weights_sha256",
    }  # fmt: skip
    for later, empty in (("same_input", []), ("chains_from", None), ("frozen_parameters", [])):
        values.setdefault(later, empty)  # files of earlier versions lack these
    if values.keys() != expected:
        raise ValueError(f"{where} must have exactly the keys {sorted(expected)}, got {sorted(values)}")
    if not isinstance(values["config"], dict):
        raise ValueError(f"{where}: config must be an object, got {values['config']!r}")
    if lacking := [name for name in _IN_EVERY_CONFIG if name not in values["config"]]:
        raise ValueError(f"{where}: config lacks {', '.join(lacking)}: it is not as save_adapter wrote it")
    try:
        config = ResLoRAConfig.from_dict(values["config"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None
    for key in ("trained_parameters", "frozen_parameters"):
        if not _is_names(values[key]):
            raise ValueError(f"{where}: {key} must be a list of names, got {values[key]!r}")
    trained, frozen = (
        [without_wrappers(name) for name in values[f"{kind}_parameters"]] for kind in ("trained", "frozen")
    )
    chains = values["chains"]
    if values["chains_from"] not in (None, "structure", "given"):
        raise ValueError(f"{where}: chains_from must be 'structure' or 'given', got {values['chains_from']!r}")
    if chains is not None:
        if not isinstance(chains, list) or not all(_is_chain(chain) for chain in chains):
            raise ValueError(
                f'{where}: chains must be a list of {{"name": str, "layers": [names], "experts": bool}}, got {chains!r}'
            )
        chains = [
            ChainPlan(chain["name"], [without_wrappers(name) for name in chain["layers"]], chain.get("experts", False))
            for chain in chains
        ]
    same_input = values["same_input"]
    if not isinstance(same_input, list) or not all(_is_names(names) for names in same_input):
        raise ValueError(f"{where}: same_input must be a list of lists of names, got {same_input!r}")
    same_input = [[without_wrappers(name) for name in names] for names in same_input]
    if not isinstance(values["weights_sha256"], str):
        raise ValueError(f"{where}: weights_sha256 must be a hexadecimal str, got {values['weights_sha256']!r}")
    about = SavedAdapter(config, chains, values["chains_from"], same_input, trained, frozen, {})
    return about, values["weights_sha256"]


def _find_weights(folder: Path, sha256: str) -> bytes:
    """The weights that the config belongs to: under their final name, or where a killed save left them."""
    for name in (WEIGHTS_NAME, _PENDING_NAME):
        if os.path.lexists(folder / name):
            content = regular(folder / name).read_bytes()
            if hashlib.sha256(content).hexdigest() == sha256:
                return content
    if not (folder / WEIGHTS_NAME).exists():
        raise FileNotFoundError(f"path {str(folder)!r} holds {CONFIG_NAME} but no {WEIGHTS_NAME}")
    raise ValueError(f"{WEIGHTS_NAME} does not have the SHA-256 that {CONFIG_NAME} states: it is damaged or another's")


def regular(path: Path) -> Path:
    """``path`` if it is a file, or a link to one as in the Hub's cache; ValueError for a device, a pipe or a folder."""
    if not path.is_file():
        raise ValueError(f"{path.name} must be a regular file or a link to one, not a folder, a pipe or a device")
    return path


def parsed_json(content: bytes, complaint: str) -> Any:
    """The value that JSON text stands for; ValueError, with ``complaint`` first, if it is none or names a key twice."""
    try:
        return json.loads(content, object_pairs_hook=_unique_keys)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{complaint}: {error}") from None


def parsed_tensors(weights: bytes, file: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file; ValueError, which names ``file``, if it is damaged or one is not finite."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    _check_header(weights, file)
    try:
        tensors: dict[str, Tensor] = load(weights)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{file}: tensor {key!r} holds NaN or Inf")
    return tensors


def _check_header(weights: bytes, file: str) -> None:
    """Refuse a header that names a tensor twice or a dtype no adapter has; the rest is the library's to check."""
    length = int.from_bytes(weights[:8], "little")
    header = parsed_json(weights[8 : 8 + length], f"{file} is damaged: its header is not valid JSON")
    if not isinstance(header, dict):
        raise ValueError(f"{file} is damaged: its header must be an object, got {header!r:.80}")
    for key, about in header.items():
        dtype = about.get("dtype") if isinstance(about, dict) else None
        if key.endswith(".num_batches_tracked") and dtype == "I64":
            continue
        if key != "__metadata__" and dtype not in _DTYPES:
            raise ValueError(f"{file}: tensor {key!r} must be one of {', '.join(_DTYPES)}, got {dtype!r}")


def _renamed(tensors: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    if len(tensors) != count:
        raise ValueError(f"{WEIGHTS_NAME}: two tensors differ in name by a wrapper's prefix only")
    return tensors


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return values


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _is_chain(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and {"name", "layers"} <= value.keys() <= {"name", "layers", "experts"}
        and isinstance(value["name"], str)
        and _is_names(value["layers"])
        and bool(value["layers"])
        and isinstance(value.get("experts", False), bool)
    )

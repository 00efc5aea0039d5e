"""save_adapter and load_adapter: trained adapters on disk, as JSON and safetensors only.

A folder holds ``reslora_model.safetensors`` and ``reslora_config.json``; the config holds the weights' SHA-256, so the
two cannot be mixed up. Saving over an older adapter commits with one rename, that of the config: until it happens the
old pair is in place, and from then on the new weights are found under their final or their temporary name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._version import __version__
from .config import ResLoRAConfig
from .linear import ADAPTER_PARAMETERS, ResLoRALinear
from .model import Record, adapt, adapted_layers, build_chains, dry_run_chains, record_of, root_of
from .sharding import fill, gathered, is_sharded, one_writer, refuse_flat, reshard
from .targets import find_targets

CONFIG_NAME = "reslora_config.json"
WEIGHTS_NAME = "reslora_model.safetensors"
_PENDING_NAME = "reslora_model.pending.safetensors"
_FORMAT_VERSION = 1
_DTYPES = ("F64", "F32", "F16", "BF16")
_MUST_AGREE = (
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "has_start", "shortcut", "pre_num",
)  # fmt: skip

Chains = list[tuple[str, list[str]]]


@dataclass(frozen=True)
class _Saved:
    """An adapter read from disk and checked for itself, not yet against a model."""

    config: ResLoRAConfig
    chains: Chains | None
    trained: list[str]
    tensors: dict[str, Tensor]

    @property
    def layers(self) -> set[str]:
        return {key.rpartition(".")[0] for key in self.tensors.keys() - set(self.trained)}

    def unwrapped(self) -> _Saved:
        """Without the prefix that DDP puts before every name."""
        plain = {name: name.removeprefix("module.") for name in (*self.tensors, *self.trained, *self.layers)}
        return _Saved(
            self.config,
            self.chains and [(title, [name.removeprefix("module.") for name in names]) for title, names in self.chains],
            [plain[name] for name in self.trained],
            _renamed({plain[key]: tensor for key, tensor in self.tensors.items()}, len(self.tensors)),
        )


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Save the adapters, and every other trained parameter of the model, to the folder ``path``.

    The folder is made if need be; other files in it are left alone. A crash at any moment leaves the previous adapter
    or the new one, whole. File modes follow the umask. With a model sharded over processes all of them call this: the
    adapters are gathered, the first process writes them under their usual names, and all return when it has.

    Returns:
        the folder.

    Raises:
        TypeError, ValueError: ``model`` is not adapted, or its parameters are on the meta device.
        NotADirectoryError: ``path`` is a file.
        RuntimeError: the process that writes failed.
    """
    layers = adapted_layers(model)
    refuse_flat(model)
    reshard(model)
    others = _other_trained(model)
    tensors = _own_parameters(layers) | others
    if any(tensor.is_meta for tensor in tensors.values()):
        raise ValueError("model has parameters on the meta device: there are no values to save")
    whole, mesh = gathered(tensors)
    with one_writer(mesh) as writes:
        if writes:
            _write(model, checked_folder(path), whole, sorted(others))
    return Path(path)


def _write(model: nn.Module, folder: Path, tensors: dict[str, Tensor], others: list[str]) -> None:
    from safetensors.torch import save

    record = record_of(model)
    weights = save(tensors, metadata={"format": "pt"})
    names = {id(layer): name for name, layer in adapted_layers(model).items()}
    config = {
        "format": "reslora",
        "format_version": _FORMAT_VERSION,
        "reslora_version": __version__,
        "config": record.config.to_dict(),
        "chains": [
            {"name": chain.name, "layers": [names[id(layer)] for layer in chain.layers]} for chain in record.chains
        ]
        or None,
        "trained_parameters": others,
        "base_model_name_or_path": getattr(getattr(root_of(model), "config", None), "_name_or_path", None) or None,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    _finish_killed_save(folder)
    write_durably(folder / _PENDING_NAME, weights)
    temporary = folder / f".{CONFIG_NAME}.tmp"
    write_durably(temporary, (json.dumps(config, indent=2) + "\n").encode())
    sync_folder(folder)
    os.replace(temporary, folder / CONFIG_NAME)  # the commit
    os.replace(folder / _PENDING_NAME, folder / WEIGHTS_NAME)
    sync_folder(folder)


def load_adapter(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load what ``save_adapter`` wrote: adapt a plain model as it was adapted then, or fill the adapters it has.

    Everything is checked before the model is touched: file types, the hash, keys, shapes, dtypes and values. Every
    process of a sharded model must call this.

    Returns:
        ``model``.

    Raises:
        FileNotFoundError: the folder holds no adapter.
        ValueError: the files are damaged, or do not fit the model; the message says where. The model is unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    saved = _read(checked_folder(path))
    adapted = any(isinstance(module, ResLoRALinear) for module in model.modules())
    refuse_flat(model)
    if not adapted and is_sharded(model):
        raise ValueError("model is sharded over processes: load the adapter first, then call shard_reslora")
    if adapted:
        model_root = root_of(model)
        record, layers = record_of(model), dict[str, nn.Linear](adapted_layers(model))
    else:
        model_root = model
        targets = find_targets(model, saved.config)
        record, layers = Record(saved.config, targets.unmatched), dict(targets.matched)
    if not saved.layers & layers.keys():
        saved = saved.unwrapped()
    if adapted:
        _check_agreement(record, saved, {id(layer): name for name, layer in layers.items()})
    _check_fit(saved, model_root, layers)
    if not adapted:
        chains = saved.chains
        if chains is None:
            chains = dry_run_chains(model, layers, None, record)
        else:
            record.order = "adapter file"
        adapt(model, layers, record, chains, autocast_adapter_dtype=True, init_values=False)
    elif saved.chains is not None and not record.chains:
        build_chains(model_root, saved.chains)
        record.order = "adapter file"
    reshard(model)
    parameters = _parameters(model)
    with torch.no_grad():
        for key, tensor in saved.tensors.items():
            fill(parameters[key], tensor)
            if key in saved.trained:
                parameters[key].requires_grad_(True)
    return model


def _finish_killed_save(folder: Path) -> None:
    """Weights that a save killed after its commit left under their temporary name get their final one."""
    pending, config = folder / _PENDING_NAME, folder / CONFIG_NAME
    if not (pending.exists() and config.exists()):
        return
    if hashlib.sha256(pending.read_bytes()).hexdigest().encode() in config.read_bytes():
        os.replace(pending, folder / WEIGHTS_NAME)
        sync_folder(folder)


def read_config(path: str | os.PathLike[str]) -> ResLoRAConfig:
    """The configuration of a saved adapter; errors as for ``load_adapter``. Reads no weights."""
    return _read_config(_config_file(checked_folder(path)))[0]


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


def _compiled(key: str) -> str:
    """A parameter's name without the prefix of torch.compile."""
    return key.replace("_orig_mod.", "")


def _own_parameters(layers: Mapping[str, ResLoRALinear]) -> dict[str, Tensor]:
    return {
        f"{name}.{own}": value for name, layer in layers.items() for own, value in layer.adapter_parameters().items()
    }


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter of the adapted root, by plain name."""
    return {name.replace("_orig_mod.", ""): parameter for name, parameter in root_of(model).named_parameters()}


def _other_trained(model: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters that are not adapters: biases, a head that the user unfroze."""
    own = {id(parameter) for parameter in _own_parameters(adapted_layers(model)).values()}
    return {name: p for name, p in _parameters(model).items() if p.requires_grad and id(p) not in own}


def checked_folder(path: str | os.PathLike[str]) -> Path:
    """``path`` as a Path; TypeError if it is none, NotADirectoryError if it is a file."""
    if not isinstance(path, (str, os.PathLike)) or isinstance(path, bytes):
        raise TypeError(f"path must be a str or os.PathLike, got {type(path).__name__}")
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"path must be a folder, got the file {str(folder)!r}")
    return folder


def _read(folder: Path) -> _Saved:
    from safetensors import SafetensorError
    from safetensors.torch import load

    config, chains, trained, sha256 = _read_config(_config_file(folder))
    weights = _find_weights(folder, sha256)
    _check_header(weights)
    try:
        tensors = load(weights)
    except SafetensorError as error:
        raise ValueError(f"{WEIGHTS_NAME} is damaged: {error}") from None
    tensors = _renamed({_compiled(key): tensor for key, tensor in tensors.items()}, len(tensors))
    for key, tensor in tensors.items():
        if key not in trained and key.rpartition(".")[2] not in ADAPTER_PARAMETERS:
            allowed = ", ".join(f".{name}" for name in ADAPTER_PARAMETERS)
            raise ValueError(f"{WEIGHTS_NAME}: unexpected tensor {key!r}; adapters end in {allowed}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{WEIGHTS_NAME}: tensor {key!r} holds NaN or Inf")
    return _Saved(config, chains, trained, tensors)


def _config_file(folder: Path) -> Path:
    if not (folder / CONFIG_NAME).exists():
        raise FileNotFoundError(f"path {str(folder)!r} holds no {CONFIG_NAME}: it is not a ResLoRA adapter")
    return _regular(folder / CONFIG_NAME)


def _read_config(path: Path) -> tuple[ResLoRAConfig, Chains | None, list[str], str]:
    where = path.name
    try:
        values = json.loads(path.read_bytes(), object_pairs_hook=_unique)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(values, dict) or values.get("format") != "reslora":
        raise ValueError(f"{where} is not the config of a ResLoRA adapter (its \"format\" must be 'reslora')")
    if values.get("format_version") != _FORMAT_VERSION:
        raise ValueError(f"{where}: format_version must be {_FORMAT_VERSION}, got {values.get('format_version')!r}")
    expected = {
        "format", "format_version", "reslora_version", "config", "chains", "trained_parameters",
        "base_model_name_or_path", "weights_sha256",
    }  # fmt: skip
    if values.keys() != expected:
        raise ValueError(f"{where} must have exactly the keys {sorted(expected)}, got {sorted(values)}")
    if not isinstance(values["config"], dict):
        raise ValueError(f"{where}: config must be an object, got {values['config']!r}")
    try:
        config = ResLoRAConfig.from_dict(values["config"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None
    trained, chains = values["trained_parameters"], values["chains"]
    if not _is_names(trained):
        raise ValueError(f"{where}: trained_parameters must be a list of names, got {trained!r}")
    if chains is not None:
        if not isinstance(chains, list) or not all(
            isinstance(chain, dict)
            and chain.keys() == {"name", "layers"}
            and isinstance(chain["name"], str)
            and _is_names(chain["layers"])
            and chain["layers"]
            for chain in chains
        ):
            raise ValueError(f'{where}: chains must be a list of {{"name": str, "layers": [names]}}, got {chains!r}')
        chains = [(chain["name"], [_compiled(name) for name in chain["layers"]]) for chain in chains]
    if not isinstance(values["weights_sha256"], str):
        raise ValueError(f"{where}: weights_sha256 must be a hexadecimal str, got {values['weights_sha256']!r}")
    return config, chains, [_compiled(name) for name in trained], values["weights_sha256"]


def _find_weights(folder: Path, sha256: str) -> bytes:
    """The weights that the config belongs to: under their final name, or where a killed save left them."""
    for name in (WEIGHTS_NAME, _PENDING_NAME):
        if (folder / name).exists():
            content = _regular(folder / name).read_bytes()
            if hashlib.sha256(content).hexdigest() == sha256:
                return content
    if not (folder / WEIGHTS_NAME).exists():
        raise FileNotFoundError(f"path {str(folder)!r} holds {CONFIG_NAME} but no {WEIGHTS_NAME}")
    raise ValueError(f"{WEIGHTS_NAME} does not have the SHA-256 that {CONFIG_NAME} states: it is damaged or another's")


def _regular(path: Path) -> Path:
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{path.name} must be a regular file, not a link or a device")
    return path


def _check_header(weights: bytes) -> None:
    """Refuse a header that names a tensor twice or a dtype no adapter has; the rest is the library's to check."""
    length = int.from_bytes(weights[:8], "little")
    try:
        header = json.loads(weights[8 : 8 + length], object_pairs_hook=_unique)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{WEIGHTS_NAME} is damaged: its header is not valid JSON: {error}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{WEIGHTS_NAME} is damaged: its header must be an object, got {header!r:.80}")
    for key, about in header.items():
        dtype = about.get("dtype") if isinstance(about, dict) else None
        if key != "__metadata__" and dtype not in _DTYPES:
            raise ValueError(f"{WEIGHTS_NAME}: tensor {key!r} must be one of {', '.join(_DTYPES)}, got {dtype!r}")


def _renamed(tensors: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    if len(tensors) != count:
        raise ValueError(f"{WEIGHTS_NAME}: two tensors differ in name by a wrapper's prefix only")
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return values


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _check_agreement(record: Record, saved: _Saved, names: Mapping[int, str]) -> None:
    """An adapted model takes an adapter only if both were made the same way."""
    if record.merged is not None:
        raise ValueError("model is merged; call unmerge_reslora(model) before loading another adapter")
    for name in _MUST_AGREE:
        own, other = getattr(record.config, name), getattr(saved.config, name)
        if own != other:
            raise ValueError(f"the model's adapters have {name}={own!r}, the saved ones {name}={other!r}")
    if record.chains and saved.chains is not None:
        own_chains = sorted([names[id(layer)] for layer in chain.layers] for chain in record.chains)
        if own_chains != sorted(layers for _, layers in saved.chains):
            raise ValueError("the saved adapter links other layers, or in another order, than the model does")


def _check_fit(saved: _Saved, root: nn.Module, layers: Mapping[str, nn.Linear]) -> None:
    """Refuse an adapter that is not this model's: same layers, sizes, chains that cover each layer once."""
    missing, unexpected = sorted(layers.keys() - saved.layers), sorted(saved.layers - layers.keys())
    if missing or unexpected:
        raise ValueError(
            f"the adapter does not fit the model: layers missing {missing[:5]}, unexpected {unexpected[:5]}"
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in layers.items():
        if layer.weight.is_meta:
            raise ValueError(f"model has no values yet: weight of {name!r} is on the meta device")
        r = saved.config.for_module(name).r
        for kind in ("lora", "start") if saved.config.has_start else ("lora",):
            shapes[f"{name}.{kind}_A"], shapes[f"{name}.{kind}_B"] = (r, layer.in_features), (layer.out_features, r)
    parameters = {_compiled(name): parameter for name, parameter in root.named_parameters()}
    for name in saved.trained:
        if name not in parameters or name in shapes:
            raise ValueError(f"the adapter does not fit the model: there is no parameter {name!r}")
        shapes[name] = tuple(parameters[name].shape)
    if shapes.keys() != saved.tensors.keys():
        absent, extra = sorted(shapes.keys() - saved.tensors.keys()), sorted(saved.tensors.keys() - shapes.keys())
        raise ValueError(f"{WEIGHTS_NAME}: tensors missing {absent[:5]}, unexpected {extra[:5]}")
    for key, tensor in saved.tensors.items():
        if tuple(tensor.shape) != shapes[key]:
            raise ValueError(f"{WEIGHTS_NAME}: tensor {key!r} must be {list(shapes[key])}, got {list(tensor.shape)}")
    if saved.chains is not None:
        linked = [name for _, names in saved.chains for name in names]
        if sorted(linked) != sorted(layers):
            raise ValueError(f"{CONFIG_NAME}: chains must hold each adapted layer exactly once")
        for title, names in saved.chains:
            sizes = {tuple(saved.tensors[f"{name}.lora_{kind}"].shape for kind in "AB") for name in names}
            if len(sizes) != 1:
                raise ValueError(f"{CONFIG_NAME}: chain {title!r} links layers of different sizes {sorted(sizes)}")

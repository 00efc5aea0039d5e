"""Models and tokenizers of Transformers, and adapters, from what a command line names."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reslora_kernels.adapt.apply import apply_reslora
from reslora_kernels.cli.options import check_choice, torch_device
from reslora_kernels.config import ResLoRAConfig
from reslora_kernels.files.adapter_format import CONFIG_NAME, read_config
from reslora_kernels.files.save_load import load_adapter

DTYPES = ("auto", "float32", "float16", "bfloat16")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


def require(*libraries: str) -> None:
    """Raise an ImportError that names the libraries which are missing and the command that installs them."""
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise ImportError(f'{" and ".join(missing)} {verb} not installed; run: pip install "reslora_kernels[hf]"')


def local_folder(option: str, source: str) -> Path | None:
    """The folder that ``source`` means; None for the id of a repository on the Hugging Face Hub.

    Raises:
        OSError: it is a file, or looks like a path but does not exist.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise NotADirectoryError(
            f"{option} {source!r} is a file; give the model's folder or its id on the Hugging Face Hub"
        )
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source or not source:
        raise FileNotFoundError(f"{option} {source!r} does not exist")
    return None


def load_model_config(option: str, source: str, trust_remote_code: bool = False) -> Any:
    """The model's Transformers configuration, which needs no weights.

    Raises:
        OSError, ValueError: there is none, or it is not one of Transformers.
    """
    require("transformers")
    from transformers import AutoConfig

    folder = local_folder(option, source)
    if folder is not None and not (folder / "config.json").is_file():
        hint = "; it is an adapter: give the base model" if (folder / CONFIG_NAME).is_file() else ""
        raise FileNotFoundError(f"{option} {source!r} holds no config.json: it is not a Transformers model{hint}")
    try:
        return AutoConfig.from_pretrained(folder or source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"{option} {source!r}: {error}") from error


def model_class(config: Any) -> Any:
    """The class that the configuration's ``architectures`` names, if it is Transformers' own; else causal LM."""
    import transformers

    for name in getattr(config, "architectures", None) or ():
        known = getattr(transformers, name, None)
        if isinstance(known, type) and issubclass(known, transformers.PreTrainedModel):
            return known
    return transformers.AutoModelForCausalLM


def load_model(
    option: str, source: str, config: Any, cls: Any, *, dtype: str, device: str, trust_remote_code: bool
) -> Any:
    """The model with its weights, in evaluation mode, on ``device``; quantised ones are loaded there, not moved."""
    remote: dict[str, Any] = {"trust_remote_code": trust_remote_code} if "AutoModel" in cls.__name__ else {}
    target = torch_device(device)
    quantized = getattr(config, "quantization_config", None) is not None
    where = {"device_map": {"": target}} if quantized else {}
    model = cls.from_pretrained(
        local_folder(option, source) or source, config=config, dtype=torch_dtype(dtype), **remote, **where
    )
    return (model if quantized else model.to(target)).eval()


def model_without_weights(config: Any, cls: Any, trust_remote_code: bool) -> nn.Module:
    """The model on torch's meta device, which costs no memory at any size."""
    options = {"dtype": getattr(config, "dtype", None) or torch.float32, "attn_implementation": "eager"}
    with torch.device("meta"):  # eager attention, because the others look at the values of the mask
        if "AutoModel" in cls.__name__:
            model: nn.Module = cls.from_config(config, trust_remote_code=trust_remote_code, **options)
        else:
            model = cls._from_config(config, **options)
    return model


def adapted_without_weights(config: Any, adapter: ResLoRAConfig, trust_remote_code: bool) -> nn.Module:
    """``model_without_weights`` with ``adapter`` applied."""
    return apply_reslora(model_without_weights(config, model_class(config), trust_remote_code), adapter)


def load_tokenizer(option: str, source: str, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer.

    Raises:
        OSError, ValueError: there is none.
    """
    from transformers import AutoTokenizer

    folder = local_folder(option, source)
    if folder is not None and not has_tokenizer(folder):
        raise FileNotFoundError(
            f"{option} {source!r} holds no tokenizer (such as tokenizer.json); save one there with "
            "tokenizer.save_pretrained, or name a model that has one with --tokenizer"
        )
    return AutoTokenizer.from_pretrained(folder or source, trust_remote_code=trust_remote_code)


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def read_adapter_config(source: str) -> ResLoRAConfig:
    """The configuration of a saved adapter, before any model is loaded.

    Raises:
        OSError, ValueError: the folder holds no adapter, or a damaged one.
    """
    path = Path(source).expanduser() / CONFIG_NAME
    if not path.parent.is_dir():
        raise FileNotFoundError(f"adapter {source!r} does not exist or is not a folder")
    if not path.is_file():
        hint = " (it is a PEFT adapter)" if path.with_name("adapter_config.json").is_file() else ""
        raise FileNotFoundError(f"adapter {source!r} holds no {CONFIG_NAME}: it is not a ResLoRA adapter{hint}")
    return read_config(path.parent)


def load_adapted(adapter: str, base: str, *, dtype: str, device: str, trust_remote_code: bool) -> Any:
    """The base model with the adapter loaded, in evaluation mode."""
    config = load_model_config("--base", base, trust_remote_code)
    model = load_model(
        "--base", base, config, model_class(config), dtype=dtype, device=device, trust_remote_code=trust_remote_code
    )
    return load_adapter(model, Path(adapter).expanduser())


def torch_dtype(name: str) -> Any:
    check_choice("--torch-dtype", name, DTYPES)
    return name if name == "auto" else getattr(torch, name)


def tokenizer_source(adapter: str, base: str) -> tuple[str, str] | None:
    """The tokenizer's place: with the adapter, as ``reslora finetune`` leaves it, else with the base model, or None."""
    if has_tokenizer(Path(adapter).expanduser()):
        return "adapter", str(Path(adapter).expanduser().absolute())
    folder = local_folder("--base", base)
    return ("--base", base) if folder is None or has_tokenizer(folder) else None


def save_merged(model: Any, tokenizer: Any, folder: Path) -> None:
    """A merged model as Transformers saves it, without the adapters, and its tokenizer if it has one."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)

"""What several commands share: options, the configuration they describe, the models and adapters that they name."""

from __future__ import annotations

import importlib.util
import re
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer
from torch import nn

from reslora_kernels.adapt.apply import apply_reslora
from reslora_kernels.adapt.targets import find_targets
from reslora_kernels.backends import select
from reslora_kernels.config import ALL_LINEAR, MergeMethod, ResLoRAConfig
from reslora_kernels.files.adapter_format import CONFIG_NAME, SavedAdapter, read
from reslora_kernels.files.save_load import check_fit, load_adapter, settled_chains

DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(ResLoRAConfig)}

Rank = Annotated[int, typer.Option("--r", help="Rank of every adapter.")]
LoraAlpha = Annotated[float, typer.Option("--lora-alpha", help="The low-rank term is multiplied by lora_alpha / r.")]
TargetModules = Annotated[
    str,
    typer.Option(
        "--target-modules", help='Names or name endings, comma-separated; a regular expression; "all-linear".'
    ),
]
ExcludeModules = Annotated[
    str | None, typer.Option("--exclude-modules", help="What to leave out: names, or a regular expression.")
]
LayersToTransform = Annotated[
    str | None, typer.Option("--layers-to-transform", help="Only these layer numbers, comma-separated.")
]
Shortcut = Annotated[str, typer.Option("--shortcut", help="none (LoRA), input, block or middle.")]
PreNum = Annotated[int, typer.Option("--pre-num", help="Earlier blocks that block and middle use; -1 for all.")]
Gates = Annotated[
    str, typer.Option("--gates", help="Learned factors of the shortcut's terms: none, scalar, or rank for r of each.")
]
Backend = Annotated[str, typer.Option("--backend", help="auto, torch, triton or cuda.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python code that comes with the model.")
]
DType = Annotated[
    str, typer.Option("--torch-dtype", help="Of the base weights: auto (as stored), float32, float16 or bfloat16.")
]
Device = Annotated[str, typer.Option("--device", help="auto (a GPU if there is one), cpu or cuda.")]
Data = Annotated[
    str | None,
    typer.Option("--data", help="Calibration data: JSON Lines, a text file, a saved dataset or the id of one."),
]
Split = Annotated[str, typer.Option("--split", help="Which split of a dataset to read.")]
CalibrationExamples = Annotated[
    int, typer.Option("--calibration-examples", min=1, help="How many examples of it to use.")
]
MaxLength = Annotated[
    int | None,
    typer.Option("--max-length", min=2, help="Tokens per example. Not given: 1024, or what the model allows."),
]
Sequential = Annotated[
    bool, typer.Option("--sequential", help="Fit each layer on the model whose earlier layers are merged already.")
]
JointSteps = Annotated[
    int,
    typer.Option("--joint-steps", min=0, help="Steps of a joint fit of all layers to the output; 128 is good."),
]
ExtraRank = Annotated[
    int,
    typer.Option("--extra-rank", min=0, help="Rows that the joint fit adds to A, columns to B; r is good."),
]
Method = Annotated[
    str | None, typer.Option("--method", help="input, weights or least_squares. Not given: the adapter's own.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run left in the output folder.")]


def out_option(about: str, *others: str) -> Any:
    """``--out``, where "~" means the home folder also if no shell has replaced it."""
    return typer.Option("--out", *others, parser=_new_path, metavar="PATH", help=about)


def _new_path(value: str) -> Path:
    return Path(value).expanduser()


def make_config(
    *,
    target_modules: str,
    exclude_modules: str | None = None,
    layers_to_transform: str | None = None,
    **others: Any,
) -> ResLoRAConfig:
    """The configuration that the options describe.

    Raises:
        ValueError: a value that is not allowed.
        RuntimeError: the backend cannot run on this machine.
    """
    config = ResLoRAConfig(
        target_modules=parse_names(target_modules),
        exclude_modules=None if exclude_modules is None else parse_names(exclude_modules),
        layers_to_transform=None if layers_to_transform is None else parse_indices(layers_to_transform),
        **others,
    )
    select.check(config.backend)
    return config


def parse_names(value: str) -> str | tuple[str, ...]:
    """Names separated by commas as a tuple; "all-linear", or anything with a regular expression's signs, as it is."""
    if value == ALL_LINEAR or not re.fullmatch(r"[\w.\-, ]+", value):
        return value
    return tuple(name for name in (part.strip() for part in value.split(",")) if name)


def parse_indices(value: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise ValueError(f"--layers-to-transform must be numbers separated by commas, got {value!r}") from None


def parse_method(option: str, value: str | None) -> MergeMethod | None:
    """A merge method; None stands for the adapter's own.

    Raises:
        ValueError: there is no such method.
    """
    methods = dict(zip(get_args(MergeMethod), get_args(MergeMethod), strict=True))
    if value is not None and value not in methods:
        raise ValueError(f"{option} must be one of {', '.join(methods)}, got {value!r}")
    return None if value is None else methods[value]


def check_choice(option: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise a ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{option} must be one of {', '.join(allowed)}, got {value!r}")


def torch_device(name: str, option: str = "--device") -> torch.device:
    """The device that ``auto`` (a GPU if there is one), ``cpu`` or ``cuda`` means.

    Raises:
        ValueError: the name is none of them, or means a GPU that torch cannot use.
    """
    check_choice(option, name, ("auto", "cpu", "cuda"))
    gpu = torch.cuda.is_available()
    if name == "cuda" and not gpu:
        raise ValueError(f"{option} cuda: torch cannot use a GPU here (see: reslora doctor)")
    return torch.device("cuda" if gpu and name != "cpu" else "cpu")


DTYPES = ("auto", "float32", "float16", "bfloat16")
PROCESSOR_FILES = (  # of images, sound and films
    "processor_config.json",
    "preprocessor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
)
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


def adapted_without_weights(config: Any, adapter: ResLoRAConfig | SavedAdapter, trust_remote_code: bool) -> nn.Module:
    """``model_without_weights``, adapted as ``adapter`` says, or as a saved one is.

    Raises:
        ValueError: the saved adapter is not this model's.
    """
    if isinstance(adapter, ResLoRAConfig):
        return apply_reslora(model_without_weights(config, model_class(config), trust_remote_code), adapter)
    model = model_without_weights(config, class_for(adapter, config, trust_remote_code), trust_remote_code)
    layers = find_targets(model, adapter.config).matched
    check_fit(adapter, model, layers)
    plans = settled_chains(adapter, model, layers)
    return apply_reslora(
        model, adapter.config, chains=[plan.names for plan in plans] if plans is adapter.chains else None
    )


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


def read_adapter(source: str) -> SavedAdapter:
    """A saved adapter, before any model is loaded.

    Raises:
        OSError, ValueError: the folder holds no adapter, or a damaged one.
    """
    path = Path(source).expanduser() / CONFIG_NAME
    if not path.parent.is_dir():
        raise FileNotFoundError(f"adapter {source!r} does not exist or is not a folder")
    if not path.is_file():
        raise FileNotFoundError(f"adapter {source!r} holds no {CONFIG_NAME}: {_what_else(path.parent)}")
    return read(path.parent)


def _what_else(folder: Path) -> str:
    about = folder / "adapter_config.json"
    if not about.is_file():
        return "it is not a ResLoRA adapter"
    if b'"RESLORA"' in about.read_bytes():
        return f"PEFT saved it; reslora_kernels.peft.to_native({str(folder)!r}, out) writes it as one of ours"
    return "it is a PEFT adapter, not a ResLoRA one (load_peft_adapter starts from it)"


def class_for(saved: SavedAdapter, config: Any, trust_remote_code: bool) -> Any:
    """The class of base model whose layers an adapter has: the checkpoint's own, or the causal one of ``finetune``.

    The checkpoint's own where neither has them.
    """
    import transformers

    own, causal = model_class(config), transformers.AutoModelForCausalLM
    if own in (causal, transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)):
        return own
    for cls in (own, causal):
        try:
            found = find_targets(model_without_weights(config, cls, trust_remote_code), saved.config).matched.keys()
        except (ValueError, RuntimeError):  # there is no causal model of it, nothing to adapt, or not without weights
            continue
        if found == saved.layers:
            return cls
    return own


def load_adapted(
    option: str, source: str, config: Any, adapter: str, saved: SavedAdapter, *, dtype: str, device: str,
    trust_remote_code: bool,
) -> Any:  # fmt: skip
    """The base model ``source`` with ``adapter``, of which ``saved`` was read, in evaluation mode."""
    cls = class_for(saved, config, trust_remote_code)
    model = load_model(option, source, config, cls, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
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
    """A merged model as Transformers saves it, without the adapters; its tokenizer, if any; its base's processor."""
    from transformers.utils.hub import cached_file

    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    base: str = getattr(model.config, "_name_or_path", None) or ""
    for name in PROCESSOR_FILES if base else ():
        found = cached_file(
            base, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
        if found is not None and not (folder / name).exists():
            shutil.copyfile(found, folder / name)

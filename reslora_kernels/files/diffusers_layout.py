"""The file that diffusers' ``pipe.load_lora_weights`` takes: the LoRA matrices of one or more parts of a pipeline."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from .adapter_format import parsed_tensors, regular, serialized
from .beside import Beside

LORA_NAME = "pytorch_lora_weights.safetensors"
_COMPONENTS = {r".*UNet.*": "unet", r".*Transformer\d*D?Model": "transformer", "CLIPTextModel": "text_encoder"}


def component_of(root: nn.Module, component: str | None) -> str:
    """What the pipeline calls the model; ValueError where its class does not say it and ``component`` is None."""
    if component is not None:
        if not isinstance(component, str) or not component.isidentifier():
            raise ValueError(f"component must be the name of a part of the pipeline, such as 'unet', got {component!r}")
        return component
    name = type(root).__name__
    for pattern, part in _COMPONENTS.items():
        if re.fullmatch(pattern, name):
            return part
    raise ValueError(
        f"component must say which part of its pipeline the {name} is ('text_encoder_2', say): its class does not"
    )


def refuse_beside(others: Beside) -> None:
    """ValueError if there is more to save than LoRA matrices, which are all that the file can hold."""
    for name in (*others.trained, *others.frozen):
        raise ValueError(
            f"layout='diffusers' holds LoRA matrices only, and the model has other parameters to save: {name!r}; "
            "freeze it, or use layout='peft'"
        )


def content(folder: Path, component: str, tensors: Mapping[str, Tensor]) -> bytes:
    """The file with the tensors of this part of the pipeline; those of others that are in ``folder`` stay."""
    path = folder / LORA_NAME
    others = parsed_tensors(regular(path).read_bytes(), LORA_NAME) if path.exists() else {}
    kept = {key: tensor for key, tensor in others.items() if not key.startswith(f"{component}.")}
    return serialized(kept | {f"{component}.{key}": tensor for key, tensor in tensors.items()})

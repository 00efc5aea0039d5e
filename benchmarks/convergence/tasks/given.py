"""A task over a pre-trained model and a data set that the caller names: the paper's own experiments."""

from __future__ import annotations

import torch

from benchmarks.convergence.tasks.given_classification import GivenClassification
from benchmarks.convergence.tasks.given_images import GivenImages
from benchmarks.convergence.tasks.given_language import GivenLanguage
from benchmarks.convergence.tasks.kinds import Task

KINDS: dict[str, type[GivenLanguage] | type[GivenClassification] | type[GivenImages]] = {
    "decoder": GivenLanguage,
    "encoder": GivenClassification,
    "unet": GivenImages,
}


def given_task(kind: str, model: str, data: str, *, dtype: torch.dtype = torch.float32) -> Task:
    """The task of fine-tuning ``model`` on ``data``. Its ``targets`` are known once ``base`` has been called.

    Args:
        kind: "decoder" (a causal language model), "encoder" (a sequence classifier) or "unet" (Stable Diffusion).
        model: a folder that ``save_pretrained`` wrote, or an id on the hub.
        data: a file, a folder, or an id on the hub with the configuration after a colon ("nyu-mll/glue:sst2"); the
            columns that each kind understands are in the README beside this package.
        dtype: of the base model's weights.

    Raises:
        ValueError: an unknown kind, a path that does not exist, a model or data that cannot be read, columns that are
            not understood, a part without rows, or fewer than two labels.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    return KINDS[kind](model, data, dtype)

"""What the methods learn: three kinds of task, each with a base model, batches, a loss and figures on held-out data."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch

from benchmarks.convergence.settings import Given
from benchmarks.convergence.tasks.classification import (
    GivenClassification,
    code_or_prose,
    package_of_docstring,
    sentence_order,
)
from benchmarks.convergence.tasks.images import Digits, GivenImages, inverted, slanted
from benchmarks.convergence.tasks.kinds import Task
from benchmarks.convergence.tasks.language import Arithmetic, GivenLanguage, PythonSource

TASKS: dict[str, Task] = {
    "python": PythonSource(),
    "arithmetic": Arithmetic(),
    "package": package_of_docstring,
    "code": code_or_prose,
    "order": sentence_order,
    "inverted": Digits("Digits drawn in inverted colours", inverted),
    "slanted": Digits("Digits drawn slanted", slanted),
}
KINDS: dict[str, type[GivenLanguage] | type[GivenClassification] | type[GivenImages]] = {
    "decoder": GivenLanguage,
    "encoder": GivenClassification,
    "unet": GivenImages,
}
DTYPES = ("float32", "bfloat16", "float16")


@cache
def tasks_of(given: Given | None) -> Mapping[str, Task]:
    """The tasks above, or the one of a given model and data; the same objects every time.

    Raises:
        ValueError: as ``given_task`` says.
    """
    if given is None:
        return TASKS
    if given.dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {given.dtype!r}")
    task = given_task(given.kind, given.model, given.data, dtype=getattr(torch, given.dtype))
    task.r = given.r
    return {given.task: task}


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

"""What the methods learn: three kinds of task, each with a base model, batches, a loss and figures on held-out data."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from benchmarks.convergence.settings import Given
from benchmarks.convergence.tasks.classification import code_or_prose, package_of_docstring, sentence_order
from benchmarks.convergence.tasks.images import Digits, inverted, slanted
from benchmarks.convergence.tasks.kinds import Task
from benchmarks.convergence.tasks.language import Arithmetic, PythonSource

TASKS: dict[str, Task] = {
    "python": PythonSource(),
    "arithmetic": Arithmetic(),
    "package": package_of_docstring,
    "code": code_or_prose,
    "order": sentence_order,
    "inverted": Digits("Digits drawn in inverted colours", inverted),
    "slanted": Digits("Digits drawn slanted", slanted),
}


@cache
def tasks_of(given: Given | None) -> Mapping[str, Task]:
    """The tasks above, or the one of a given model and data; the same objects every time.

    Raises:
        ValueError: as ``given_task`` says.
    """
    if given is None:
        return TASKS
    import torch

    from benchmarks.convergence.tasks.given import given_task

    dtypes = ("float32", "bfloat16", "float16")
    if given.dtype not in dtypes:
        raise ValueError(f"--dtype must be one of {', '.join(dtypes)}, got {given.dtype!r}")
    return {given.task: given_task(given.kind, given.model, given.data, dtype=getattr(torch, given.dtype))}

"""What the methods learn: three kinds of task, each with a base model, batches, a loss and figures on held-out data."""

from __future__ import annotations

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

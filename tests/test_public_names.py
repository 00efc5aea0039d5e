"""No public name is lost and no signature changes unseen: both are compared with the committed list.

After a change on purpose: ``python -m tests.test_public_names > tests/public_names.json``.
"""

from __future__ import annotations

import inspect
import json
from importlib import import_module
from pathlib import Path

MODULES = ("reslora_kernels", "reslora_kernels.ops", "reslora_kernels.reference", "reslora_kernels.training")
LISTED = Path(__file__).with_name("public_names.json")


def public_names() -> dict[str, dict[str, str]]:
    """Module -> name -> signature, of the functions and classes that a module defines or lists as its own."""
    found: dict[str, dict[str, str]] = {}
    for module in map(import_module, MODULES):
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        names = getattr(module, "__all__", [name for name in own if not name.startswith("_")])
        found[module.__name__] = {name: signature(getattr(module, name)) for name in sorted(names)}
    return found


def signature(value: object) -> str:
    if not callable(value):
        return type(value).__name__
    if getattr(value, "_is_protocol", False):
        return "Protocol"
    parameters = inspect.signature(value).parameters.values()
    return str([str(parameter.replace(annotation=inspect.Parameter.empty)) for parameter in parameters])


def test_public_names_are_those_that_are_listed() -> None:
    assert public_names() == json.loads(LISTED.read_text())


if __name__ == "__main__":
    print(json.dumps(public_names(), indent=1))

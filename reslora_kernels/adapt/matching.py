"""PEFT's rule for names: which modules, or parameters, a list of endings or a regular expression means."""

from __future__ import annotations

import re
from collections.abc import Sequence


def matches(name: str, wanted: str | Sequence[str]) -> bool:
    """Whether a module is meant: by its whole name or the ending of it; a str is a regular expression for the whole."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == ending or name.endswith("." + ending) for ending in wanted)

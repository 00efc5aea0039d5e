"""The command ``reslora``.

Convention for a command: a module ``cli/<name>.py`` (or package ``cli/<name>/``) with one plain function of the same
name, whose parameters carry typer annotations and whose docstring is the help text; ``app.COMMANDS`` lists it,
``app.HOMES`` the module of one that shares another's. A command with verbs of its own has a typer ``application``.

- The module is imported only when its command runs, so it imports what it needs at the top, optional extras excepted.
- A failure that a user can mend is a ValueError, TypeError, OSError, RuntimeError or ImportError. It becomes one line
  on stderr and exit status 2; ``reslora --debug COMMAND`` shows the traceback instead.
- A result that is negative (a check that failed) is printed, then ``raise typer.Exit(1)``.
- Tests call ``main(["doctor", "--json"])`` and look at the status it returns.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (``sys.argv`` by default). Returns the exit status: 0, 1 (negative result), 2 (error)."""
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        fix = f"pip install {' '.join(missing)}"
        print(f"reslora: error: {' and '.join(missing)} {verb} not installed; run: {fix}", file=sys.stderr)
        return 2
    from reslora_kernels.cli import app

    return app.run(sys.argv[1:] if arguments is None else list(arguments))

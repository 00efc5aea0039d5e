"""The quick tests and those of torch.compile, on the oldest versions that are claimed and on the newest that pip finds.

`make test-versions` runs it, each session in an environment of its own; ARGS="--session newest-3.12" picks one. A
session of a Python that this machine lacks is left out. What was run so far stands in docs/limits.md.
"""

from __future__ import annotations

import nox

nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = False

PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]


@nox.session(python=PYTHONS[:1])
def oldest(session: nox.Session) -> None:
    check(session, "--constraint", "constraints-oldest.txt")


@nox.session(python=PYTHONS)
def newest(session: nox.Session) -> None:
    check(session)


def check(session: nox.Session, *constraint: str) -> None:
    """Arguments after ``--`` go to pytest, in place of the two runs."""
    session.install(*constraint, "--editable", ".[dev]", env={"RESLORA_CUDA": "0"})
    session.run("python", "-m", "pip", "freeze", "--exclude-editable")
    constraints = constraint[-1] if constraint else ""
    runs = [session.posargs] if session.posargs else [["-m", "not slow"], ["-m", "slow", "tests/test_compile.py"]]
    for arguments in runs:
        session.run("python", "-m", "pytest", *arguments, env={"CONSTRAINTS": constraints})

"""Whether a command line that the documentation shows is real: it is parsed by what it would run, and not run."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from reslora_kernels.cli.app import application, load_command

ROOT = Path(__file__).parents[1]


def commands(block: str) -> list[list[str]]:
    """The words of each command of a shell block; variables set in front of it and comments are left off."""
    lines = re.sub(r"\\\n", " ", block).splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    return [_without_variables(words) for words in split if words]


def _without_variables(words: list[str]) -> list[str]:
    first = next(i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word))
    return words[first:]


def check(words: list[str]) -> None:
    """AssertionError, or the error of the command's own parser, unless the command and its options exist."""
    program, *arguments = words
    name = Path(program).name
    assert name in PROGRAMS, f"no rule to check {program!r}; give it one"
    PROGRAMS[name](arguments)


def _make(arguments: list[str]) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {word for word in arguments if "=" not in word} <= targets


def _pip(arguments: list[str]) -> None:
    if sys.version_info < (3, 11):
        pytest.skip("reads TOML with Python 3.11's tomllib")
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    command, *what = arguments
    assert command == "install"
    for word in what:
        found = re.fullmatch(r"(?:\.|reslora_kernels|trl)(?:\[(.+)\])?", word)
        assert found and set((found[1] or "hf").split(",")) <= set(extras), word


def _reslora(arguments: list[str]) -> None:
    group: Any = typer.main.get_command(application)
    if arguments[0].startswith("-"):
        group.make_context("reslora", arguments, resilient_parsing=True)
        return
    name, *rest = arguments
    assert name in group.commands
    command = load_command(name)
    context = command.make_context(name, rest, resilient_parsing=hasattr(command, "commands"))
    if hasattr(command, "commands"):  # `bench` and its verbs
        verb, *rest = [*context._protected_args, *context.args, ""]
        if verb:
            command.commands[verb].make_context(verb, rest[:-1])


def _python(arguments: list[str]) -> None:
    if arguments[0] != "-m":
        assert (ROOT / arguments[0]).is_file()
        return
    _, module, *rest = arguments
    if module == "reslora_kernels":
        _reslora(rest)
        return
    assert importlib.util.find_spec(module)
    if module == "benchmarks.convergence":
        from benchmarks.convergence.__main__ import app

        group: Any = typer.main.get_command(app)
        group.commands[rest[0]].make_context(rest[0], rest[1:])


def _torchrun(arguments: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    parsed = get_args_parser().parse_args(arguments)
    _python([*(["-m"] if parsed.module else []), parsed.training_script, *parsed.training_script_args])


def _accelerate(arguments: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    assert arguments[0] == "launch"
    assert (ROOT / launch_command_parser().parse_args(arguments[1:]).training_script).is_file()


PROGRAMS: dict[str, Callable[[list[str]], None]] = {
    "make": _make,
    "pip": _pip,
    "reslora": _reslora,
    "python": _python,
    "python3": _python,
    "torchrun": _torchrun,
    "accelerate": _accelerate,
}

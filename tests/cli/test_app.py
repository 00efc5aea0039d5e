"""The command line around the commands: help without importing them, errors as one line, exit statuses."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import typer

import reslora_kernels
from reslora_kernels.cli import app, main


def install(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    """Make ``function`` stand in for every command."""
    single = typer.Typer(add_completion=False)
    single.command()(function)
    monkeypatch.setattr(app, "load_command", lambda name: typer.main.get_command(single))


def test_help_lists_every_command_and_imports_none() -> None:
    code = (
        "import sys; from reslora_kernels.cli import main; status = main(['--help'])\n"
        "loaded = [name for name in sys.modules if name.startswith('reslora_kernels.cli.')]\n"
        "heavy = {'transformers', 'peft', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "print('LOADED', status, sorted(loaded), sorted(heavy))"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "LOADED 0 ['reslora_kernels.cli.app'] []" in finished.stdout, finished.stdout + finished.stderr
    assert all(name in finished.stdout for name in app.COMMANDS)


def test_module_runs_as_the_command() -> None:
    command = [sys.executable, "-m", "reslora_kernels", "--version"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (finished.returncode, finished.stdout) == (0, f"reslora_kernels {reslora_kernels.__version__}\n")


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "Usage: reslora" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(app.COMMANDS))
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert f"reslora {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verfy"], "No such command 'verfy'. Did you mean 'verify'?"),
        (["--loud"], "No such option: --loud"),
        (["verify", "--loud"], "No such option: --loud"),
        (["verify", "golden"], "Got unexpected extra argument"),
    ],
)
def test_unusable_command_line_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    written = capsys.readouterr()
    assert written.err.startswith(f"reslora: error: {message}")
    assert written.err.count("\n") == 1
    assert written.out == ""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("r must be from 1 to 256,\n  got 0"), "r must be from 1 to 256, got 0"),
        (
            FileNotFoundError(2, "No such file or directory", "adapter"),
            "[Errno 2] No such file or directory: 'adapter'",
        ),
        (ModuleNotFoundError("transformers is missing"), "transformers is missing"),
        (TypeError(), "TypeError"),
    ],
    ids=["several lines", "file", "library", "no message"],
)
def test_expected_error_is_one_line_or_a_traceback(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing() -> None:
        raise error

    install(monkeypatch, failing)
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == f"reslora: error: {line}\n"
    with pytest.raises(type(error)):
        main(["--debug", "doctor"])


def test_fault_of_our_own_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty() -> None:
        raise KeyError("chain")

    install(monkeypatch, faulty)
    with pytest.raises(KeyError, match="chain"):
        main(["doctor"])


def test_status_of_a_command_is_the_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    def negative() -> None:
        raise typer.Exit(1)

    install(monkeypatch, negative)
    assert main(["doctor"]) == 1
    install(monkeypatch, lambda: None)
    assert main(["doctor"]) == 0


def test_interrupt_and_abort(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    def aborted() -> None:
        raise typer.Abort

    install(monkeypatch, interrupted)
    assert main(["doctor"]) == 130
    install(monkeypatch, aborted)
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == "reslora: error: aborted\n"

"""The command line around the commands: help without importing them, errors as one line, output folders."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors
import typer

import reslora_kernels
from reslora_kernels.cli import app, main
from reslora_kernels.cli.output import check_apart, check_replaceable, check_writable, whole_folder

from .. import processes


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
    finished = processes.run([sys.executable, "-c", code])
    assert "LOADED 0 ['reslora_kernels.cli.app'] []" in finished.stdout, finished.stdout + finished.stderr
    assert all(name in finished.stdout for name in app.COMMANDS)


@pytest.mark.slow
def test_module_runs_as_the_command() -> None:
    command = [sys.executable, "-m", "reslora_kernels", "--version"]
    finished = processes.run(command)
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


def write(out: Path, text: str = "new") -> None:
    with whole_folder(out) as folder:
        (folder / "result").write_text(text)
        (folder / "part").mkdir()
        (folder / "part" / "more").write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


RESULT = {"result": "new", "part/more": "new"}


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    folder = tmp_path / "disk" / "out"
    (folder / "part").mkdir(parents=True)
    (folder / "result").write_text("old")
    (folder / "part" / "stale").write_text("old")
    (folder / "stale").write_text("old")
    return folder


def only(folder: Path, *names: str) -> bool:
    return sorted(path.name for path in folder.iterdir()) == sorted(names)


def test_replaces_a_folder_whole(earlier: Path) -> None:
    write(earlier)
    assert content(earlier) == RESULT
    assert only(earlier.parent, "out")


def test_link_leads_to_the_folder_and_stays(earlier: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(earlier)
    check_writable("--out", tmp_path / "link")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert content(earlier) == RESULT
    assert only(earlier.parent, "out") and only(tmp_path, "disk", "link")


def test_link_to_nothing_yet(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "later" / "out")
    check_writable("--out", tmp_path / "link")
    assert only(tmp_path, "link")
    write(tmp_path / "link")
    assert content(tmp_path / "later" / "out") == RESULT


def test_source_behind_a_link_is_not_replaced(earlier: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(earlier)
    with pytest.raises(ValueError, match="which is read"):
        check_replaceable(tmp_path / "link", True, "result", (earlier,))


def test_folder_that_cannot_be_renamed_is_filled(earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.replace

    def busy(source: Any, target: Any) -> None:
        if Path(source) == earlier:
            raise OSError(16, "Device or resource busy")
        real(source, target)

    monkeypatch.setattr(os, "replace", busy)
    write(earlier)
    assert content(earlier) == RESULT
    assert only(earlier, "result", "part") and only(earlier.parent, "out")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="mounts a disk in a namespace of its own")
def test_mount_point(earlier: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from reslora_kernels.cli.output import check_writable, whole_folder\n"
        "out = Path(sys.argv[1]); (out / 'stale').write_text('old'); check_writable('--out', out)\n"
        "with whole_folder(out) as folder: (folder / 'result').write_text('new')\n"
        "print(sorted(path.name for path in out.iterdir()))"
    )
    command = f'mount -t tmpfs none {earlier} && {sys.executable} -c "$CODE" {earlier}'
    environment = os.environ | {"CODE": code, "PYTHONPATH": str(Path(reslora_kernels.__file__).parents[1])}
    shell = ["unshare", "-rm", "sh", "-c"]
    if subprocess.run([*shell, f"mount -t tmpfs none {earlier}"], capture_output=True, check=False).returncode:
        pytest.skip("may not mount here")
    finished = subprocess.run([*shell, command], env=environment, capture_output=True, text=True, check=False)
    assert finished.stdout == "['result']\n", finished.stderr
    assert only(earlier.parent, "out")


def test_error_of_the_work_leaves_everything_as_it_was(earlier: Path) -> None:
    before = content(earlier)
    with pytest.raises(KeyError), whole_folder(earlier) as folder:
        (folder / "result").write_text("half")
        raise KeyError
    assert content(earlier) == before
    assert only(earlier.parent, "out")


def test_finished_result_that_cannot_be_placed_is_kept(earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, real = content(earlier), os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target) == earlier and Path(source).suffix == ".new":
            raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"the result is finished and in '(.*)'; it could not") as caught:
        write(earlier)
    kept = Path(str(caught.value).split("'")[1])
    assert content(kept) == RESULT
    assert content(earlier) == before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda at: (at / "out").write_text(""), "is a file, not a folder"),
        (lambda at: (at / "out").symlink_to("out"), "circle|cannot be"),
        (lambda at: (at / "out").symlink_to("/proc/nothing/here"), "cannot be written in '/proc'"),
    ],
    ids=["file", "circle of links", "where nobody may write"],
)
def test_what_would_fail_is_refused_early(make: Any, message: str, tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(OSError, match=message):
        check_writable("--out", tmp_path / "out")


def test_runs_that_start_together_do_not_meet_in_a_folder_that_both_need(tmp_path: Path) -> None:
    """Each saw the other's folders appear and go: "File exists", or no folder to write to."""
    start = threading.Barrier(4)

    def check(name: str) -> None:
        start.wait()
        for _ in range(200):
            check_writable("--out", tmp_path / "runs" / "of" / name)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(check, ["one", "one", "two", "two"]))
    assert only(tmp_path)


def test_home_is_meant_by_a_tilde_that_no_shell_has_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").write_text("")
    assert main(["bench", "--out=~/run"]) == 2
    assert f"--out '{tmp_path / 'run'}' is a file" in capsys.readouterr().err


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """safetensors has an error of its own for it."""

    def full() -> None:
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    install(monkeypatch, full)
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == "reslora: error: I/O error: No space left on device (os error 28)\n"


def test_an_id_is_no_folder_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_apart(Path("."), ["gpt2"])
    (tmp_path / "gpt2").mkdir()
    with pytest.raises(ValueError, match="would replace 'gpt2', which is read"):
        check_apart(Path("."), ["gpt2"])


def test_results_replace_results_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert main(["bench", "--out", str(tmp_path / "config.json")]) == 2
    assert "is no result of an earlier run" in capsys.readouterr().err
    (tmp_path / "table.csv").write_text("a,b")
    assert main(["bench", "--out", str(tmp_path / "table.json")]) == 2
    assert "would replace 'table.csv' beside it" in capsys.readouterr().err


def test_name_that_is_too_long_is_refused_early(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"cannot be written.*too long"):
        check_writable("--out", tmp_path / "new" / ("x" * 300))
    assert only(tmp_path)


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out", *(tmp_path / "out").rglob("*"))}
    assert modes == {"out": 0o750, "part": 0o750, "result": 0o640, "more": 0o640}

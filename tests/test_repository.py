"""Constraints, what is installed, pre-commit, the Makefile and CI agree on versions and commands."""

from __future__ import annotations

import os
import re
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import yaml

import reslora_kernels

from . import processes

ROOT = Path(__file__).parents[1]
TARGETS = ["demo", "test", "test-fast", "test-versions", "bench", "bench-layers", "gpu-check", "tune", "readme-tables"]
TARGETS += ["convergence", "bench-host", "lint", "format", "typecheck", "docs", "clean"]

if sys.version_info >= (3, 11):
    import tomllib
else:
    pytest.skip("reads TOML with Python 3.11's tomllib", allow_module_level=True)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(file: str = "constraints.txt") -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonical(name): pinned for name, pinned in pairs}


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def requirements() -> list[str]:
    return [*PROJECT["dependencies"], *(name for names in EXTRAS.values() for name in names)]


def name_of(requirement: str) -> str:
    return canonical(re.split(r"[\[<>=!~; ]", requirement)[0])


def direct_dependencies() -> set[str]:
    return {name_of(requirement) for requirement in requirements()} - {canonical(PROJECT["name"])}


def test_every_direct_dependency_is_pinned() -> None:
    assert direct_dependencies() <= set(pins())


@pytest.mark.parametrize("name", sorted(direct_dependencies()))
def test_installed_version_is_the_pinned_one(name: str) -> None:
    constraints = os.environ.get("CONSTRAINTS", "constraints.txt")
    pinned = pins(constraints) if constraints else {}
    if name not in pinned:
        pytest.skip(f"{name} is not pinned here")
    try:
        installed = version(name)
    except PackageNotFoundError:
        pytest.skip(f"{name} is not installed here")
    assert installed.partition("+")[0] == pinned[name]


def test_oldest_versions_are_older_and_of_direct_dependencies() -> None:
    newest = pins()
    for name, oldest in pins("constraints-oldest.txt").items():
        assert name in direct_dependencies()
        assert [int(part) for part in oldest.split(".")] < [int(part) for part in newest[name].split(".")]


def test_minimums_are_the_oldest_versions_that_are_tested() -> None:
    oldest = pins("constraints-oldest.txt")
    minimums = {name_of(wanted): wanted.split(">=")[1] for wanted in requirements() if name_of(wanted) in oldest}
    assert minimums == oldest
    for wanted in (*PROJECT["dependencies"], *EXTRAS["hf"], *EXTRAS["diffusion"], *EXTRAS["quantized"]):
        assert name_of(wanted) in oldest


def test_table_of_versions_names_the_oldest() -> None:
    table = (ROOT / "docs/limits.md").read_text()
    for name, oldest in pins("constraints-oldest.txt").items():
        assert re.search(rf"\| {name} \| {re.escape(oldest)} \|", table), name


def test_pins_hold_on_any_machine() -> None:
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", pinned) for pinned in pins().values())


def test_pre_commit_runs_the_pinned_tools() -> None:
    """Hooks that run .venv's tools have CI's versions; a hook with a revision of its own could drift."""
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = [hook for repository in repositories for hook in repository["hooks"]]
    assert {repository["repo"] for repository in repositories} == {"local"}
    assert {hook["language"] for hook in hooks} == {"system"}
    tools = {hook["entry"].split()[0] for hook in hooks}
    assert tools == {".venv/bin/ruff", ".venv/bin/mypy"}
    assert {Path(tool).name for tool in tools} <= set(pins())


def test_workflow_and_ci_script_run_the_make_targets() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert {"run": ".ci/run"} in jobs["full"]["steps"]
    assert ".ci/run quick" in [step.get("run") for step in jobs["quick"]["steps"]]
    script = (ROOT / ".ci/run").read_text()
    assert all(f"make {target}" in script for target in ("lint", "typecheck", "docs", "test", "test-fast"))


def test_workflow_runs_every_python_that_is_claimed() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    rows = jobs["quick"]["strategy"]["matrix"]["include"]
    own = [step["with"]["python-version"] for step in jobs["full"]["steps"] if "setup-python" in step.get("uses", "")]
    claimed = [match[1] for line in PROJECT["classifiers"] if (match := re.search(r":: (3\.\d+)$", line))]
    assert sorted([*own, *(row["python"] for row in rows)]) == sorted(claimed)
    assert f">={min(claimed, key=lambda v: int(v[2:]))}" == PROJECT["requires-python"]
    assert {row["constraints"] for row in rows} == {"constraints.txt", "constraints-oldest.txt"}
    assert all((ROOT / row["constraints"]).is_file() for row in rows)


def test_scheduled_workflow_runs_every_session_of_nox() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    rows = jobs["versions"]["strategy"]["matrix"]["include"]
    pythons = re.findall(r'"(3\.\d+)"', (ROOT / "noxfile.py").read_text())
    expected = [f"oldest-{pythons[0]}", *(f"newest-{python}" for python in pythons)]
    assert [f"{row['session']}-{row['python']}" for row in rows] == expected


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_ci_script_refuses_another_part() -> None:
    finished = processes.run(["bash", ".ci/run", "some"], cwd=ROOT)
    assert (finished.returncode, finished.stdout) == (2, "usage: .ci/run [full|quick], got 'some'\n")


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", TARGETS)
def test_make_target_exists(target: str) -> None:
    finished = processes.run(["make", "--dry-run", target], cwd=ROOT)
    assert finished.returncode == 0, finished.stderr


def test_version_stands_in_one_place() -> None:
    assert "version" in PROJECT["dynamic"]
    assert version("reslora_kernels") == reslora_kernels.__version__
    assert f"## [{version('reslora_kernels')}]" in (ROOT / "CHANGELOG.md").read_text()


ONE_TICK = 0.005  # of processor time, or more: what a process beside many others may get in a second


@pytest.mark.parametrize(
    ("code", "reason"), [("time.sleep(60)", "stood still"), ("while True: pass", "of processor time")], ids=["", "spin"]
)
def test_child_that_hangs_is_ended(code: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"LOOK": 0.1, "STILL": 1.0, "WORK": ONE_TICK, "SPENT": 0.5}.items():
        monkeypatch.setattr(processes, name, seconds)
    with pytest.raises(AssertionError, match=reason):
        processes.run([sys.executable, "-c", f"import time\nprint('begun', flush=True)\n{code}"])


@pytest.mark.slow
def test_child_that_is_slow_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes three times as long as one may stand still, but a little of the processor all the while."""
    for name, seconds in {"LOOK": 0.1, "STILL": 1.0, "WORK": ONE_TICK}.items():
        monkeypatch.setattr(processes, name, seconds)
    code = (
        "import time\n"
        "for _ in range(10):\n"
        "    time.sleep(0.3)\n"
        "    end = time.process_time() + 0.06\n"
        "    while time.process_time() < end: pass\n"
        "print('done')"
    )
    assert processes.run([sys.executable, "-c", code], check=True).stdout == "done\n"


def test_rank_that_hangs_keeps_what_it_had_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"LOOK": 0.1, "STILL": 1.0, "WORK": ONE_TICK}.items():
        monkeypatch.setattr(processes, name, seconds)
    (tmp_path / "ranks.py").write_text(
        "import os, pathlib, sys, time\n"
        "path = pathlib.Path(sys.argv[1]) / f'report.{os.environ[\"RANK\"]}.json'\n"
        'path.write_text(\'{"first": {"equal": true}}\')\n'
        "time.sleep(60)"
    )
    for report in processes.run_ranks("ranks", tmp_path, PYTHONPATH=str(tmp_path)):
        assert report["first"] == {"equal": True}
        assert "stood still" in report["second"]["traceback"]

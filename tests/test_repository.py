"""Constraints, what is installed, pre-commit, the Makefile and CI agree on versions and commands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import yaml

import reslora_kernels

ROOT = Path(__file__).parents[1]
TARGETS = ["demo", "test", "test-fast", "bench", "bench-layers", "gpu-check", "tune", "readme-tables"]
TARGETS += ["convergence", "lint", "format", "typecheck", "docs", "clean"]

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


def direct_dependencies() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(name for names in project["optional-dependencies"].values() for name in names),
    ]
    names = {canonical(re.split(r"[\[<>=!~; ]", requirement)[0]) for requirement in wanted}
    return names - {canonical(project["name"])}


def test_every_direct_dependency_is_pinned() -> None:
    assert direct_dependencies() <= set(pins())


@pytest.mark.parametrize("name", sorted(direct_dependencies()))
def test_installed_version_is_the_pinned_one(name: str) -> None:
    pinned = pins(os.environ.get("CONSTRAINTS", "constraints.txt"))
    if name not in pinned:
        pytest.skip(f"{name} is not pinned in {os.environ['CONSTRAINTS']}")
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
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    claimed = [match[1] for line in project["classifiers"] if (match := re.search(r":: (3\.\d+)$", line))]
    assert sorted([*own, *(row["python"] for row in rows)]) == sorted(claimed)
    assert f">={min(claimed, key=lambda v: int(v[2:]))}" == project["requires-python"]
    assert {row["constraints"] for row in rows} == {"constraints.txt", "constraints-oldest.txt"}
    assert all((ROOT / row["constraints"]).is_file() for row in rows)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_ci_script_refuses_another_part() -> None:
    finished = subprocess.run(["bash", ".ci/run", "some"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (finished.returncode, finished.stdout) == (2, "usage: .ci/run [full|quick], got 'some'\n")


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", TARGETS)
def test_make_target_exists(target: str) -> None:
    finished = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr


def test_version_stands_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    assert version("reslora_kernels") == reslora_kernels.__version__
    assert f"## [{version('reslora_kernels')}]" in (ROOT / "CHANGELOG.md").read_text()

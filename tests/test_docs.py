"""README, docs/ and examples/: every block and script runs, every command exists, every table is the generated one.

A command line is parsed by what it would run, and not run.
"""

from __future__ import annotations

import importlib.util
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer
from torch import nn

import reslora_kernels
import reslora_kernels.training
from benchmarks import tables
from reslora_kernels.cli.app import application, load_command

from .distributed.launched import SEVERAL_PROCESSES
from .models import FAMILIES, llama

ROOT = Path(__file__).parents[1]


def commands(block: str) -> list[list[str]]:
    """The words of each command of a shell block; variables set in front of it and comments are left off."""
    lines = re.sub(r"\\\n", " ", block).splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    return [_without_variables(words) for words in split if words]


def _without_variables(words: list[str]) -> list[str]:
    first = next(i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word))
    return words[first:]


def check_command(words: list[str]) -> None:
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


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
GENERATED = tuple(ROOT / name for name in ("README.md", "docs/measured.md", "docs/howto/choose-a-shortcut.md"))
NEEDS = {"other-layers.md": ("transformers", "bitsandbytes"), "peft.md": ("bitsandbytes", "accelerate")}
WRITTEN = {
    "README.md": ["adapter/reslora_model.safetensors", "peft-adapter/adapter_model.safetensors"],
    "tutorial.md": ["adapter/reslora_model.safetensors", "peft-adapter/adapter_model.safetensors"],
}
FITTING = ("tutorial.md", "merge.md")  # a joint fit of many steps
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    return [Block(*found) for found in FENCE.findall(page.read_text())]


def python(page: Path) -> list[str]:
    """Blocks to run; an included script has a test of its own."""
    return [block.text for block in blocks(page) if block.language == "python" and not block.text.startswith("--8<--")]


def train(model: nn.Module) -> None:
    """What the pages leave to the reader: a loop."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for seed in range(2):
        optimizer.zero_grad()
        model(**FAMILIES["llama"].batch(seed)).loss.backward()
        optimizer.step()


def pages_with(language: str) -> list[Any]:
    found = [page for page in PAGES if any(block.language == language for block in blocks(page))]
    return [
        pytest.param(
            page,
            id=page.relative_to(ROOT).as_posix(),
            marks=[pytest.mark.slow] * (language == "python" and page.name in FITTING),
        )
        for page in found
    ]


@pytest.mark.parametrize("page", pages_with("python"))
def test_python(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in NEEDS.get(page.name, ("transformers", "peft")):
        pytest.importorskip(library)
    if page.name == "other-layers.md":
        pytest.importorskip("transformers", minversion="5.0", reason="its experts are linear layers before")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    llama().save_pretrained("path/or/id")
    batches = [FAMILIES["llama"].batch(seed) for seed in range(8)]
    names: dict[str, Any] = {"train": train, "batches": batches, "x": torch.randn(2, 1024)}
    for text in python(page):
        exec(compile(text, page.name, "exec"), names)
    assert all((tmp_path / file).is_file() for file in WRITTEN.get(page.name, []))


@pytest.mark.parametrize("page", pages_with("sh"))
def test_commands_exist(page: Path) -> None:
    for block in blocks(page):
        for words in commands(block.text) if block.language == "sh" else []:
            check_command(words)


@pytest.mark.parametrize(
    "line", ["make prove", "reslora merge a --base b --out c --fast", "torchrun lost.py", "curl x"]
)
def test_a_command_that_does_not_exist_is_found(line: str) -> None:
    with pytest.raises((AssertionError, SystemExit, typer.TyperException)):
        check_command(line.split())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_blocks_say_their_language(page: Path) -> None:
    """So that none escapes the tests above."""
    assert {block.language for block in blocks(page)} <= {"python", "sh", "text", "json"}
    assert page.read_text().count("```") == 2 * len(blocks(page))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_to_files_hold_in_the_repository(page: Path) -> None:
    """mkdocs checks those of the site; these are for who reads the pages where they lie."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    targets = [target for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", text) if "://" not in target]
    if not tables.RESULTS.exists():
        targets = [target for target in targets if "benchmarks/results" not in target]
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_every_public_name_has_its_place_in_the_reference() -> None:
    documented = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    public = [f"reslora_kernels.{name}" for name in reslora_kernels.__all__ if name != "__version__"]
    assert set(public) <= set(documented)
    assert {f"reslora_kernels.training.{name}" for name in ("AdapterCheckpoints", "ResLoRACallback")} <= set(documented)
    assert len(documented) == len(set(documented))


def test_the_architecture_has_every_room() -> None:
    rooms = {path.stem for path in (ROOT / "reslora_kernels").iterdir() if path.suffix in ("", ".py")}
    rooms = {room for room in rooms if not room.startswith("_")}
    for name in ("architecture.md", "architecture.svg"):
        page = (ROOT / "docs" / name).read_text()
        assert {room for room in rooms if not re.search(rf"[`>]{room}[/`<]", page)} == set(), name


@pytest.mark.slow
@pytest.mark.parametrize("page", GENERATED, ids=lambda page: page.name)
@pytest.mark.skipif(not tables.RESULTS.exists(), reason="the sdist has no results")
def test_tables_are_the_generated_ones(page: Path) -> None:
    assert tables.with_tables(page) == page.read_text(), "run `make readme-tables`"


def test_every_kind_of_table_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {kind for page in GENERATED for kind in tables.kinds_of(page.read_text())} == set(tables.TABLES)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    pages = [tmp_path / "one.md", tmp_path / "other.md"]
    marked = [f"<!-- {kind}: here -->\nold\n<!-- end -->\n" for kind in tables.TABLES]
    pages[0].write_text("".join(marked[:2]))
    pages[1].write_text("".join(marked[2:]))
    tables.write_pages(pages)
    written = "".join(page.read_text() for page in pages)
    assert written.count(tables.NOT_MEASURED) == len(marked) and "old" not in written
    with pytest.raises(SystemExit, match="have no markers for"):
        tables.write_pages(pages[:1])


EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPT_NEEDS = {
    "language_trainer": ("transformers", "accelerate"),
    "language_sft": ("trl",),
    "diffusion_unet": ("diffusers",),
    "vision_vit": ("transformers",),
}
SCRIPT_WRITTEN = {
    "language_trainer": ["adapter/reslora_model.safetensors", "checkpoints/checkpoint-20/reslora_model.safetensors"],
    "language_sft": ["peft-adapter/adapter_model.safetensors", "checkpoints/checkpoint-10/reslora_model.safetensors"],
    "diffusion_unet": ["adapter/reslora_model.safetensors", "peft-adapter/adapter_model.safetensors"],
    "vision_vit": ["adapter/reslora_model.safetensors"],
}


def test_every_script_is_run() -> None:
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    assert scripts == {"stand_ins", *SCRIPT_NEEDS, *SEVERAL_PROCESSES, "zero3_accelerate"}
    listed = (EXAMPLES / "README.md").read_text()
    assert all(f"[{name}.py]({name}.py)" in listed for name in scripts)


@pytest.mark.parametrize("name", sorted(SCRIPT_NEEDS))
@pytest.mark.slow
def test_script(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in SCRIPT_NEEDS[name]:
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert all((tmp_path / file).is_file() for file in SCRIPT_WRITTEN[name])

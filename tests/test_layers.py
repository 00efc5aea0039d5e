"""Imports go down only: reads every import of the package, also those inside functions, and names one that goes up."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "reslora_kernels"
LAYERS = {
    "_version": 0,
    "_build_info": 0,
    "config": 0,
    "reference": 0,
    "dropout": 0,
    "testing": 1,
    "kernels": 1,
    "backends": 2,
    "ops": 3,
    "shortcuts": 3,
    "initialization": 3,
    "magnitude": 3,
    "forward_state": 3,
    "quantizers": 3,
    "chain": 4,
    "linear": 4,
    "quantized_linear": 4,
    "sharding": 5,
    "targets": 5,
    "execution": 5,
    "kept": 5,
    "coverage": 5,
    "checkpointing": 5,
    "model": 5,
    "switching": 5,
    "updates": 5,
    "merging": 5,
    "sequential": 5,
    "joint": 5,
    "statistics": 5,
    "adapter_files": 5,
    "adapters": 5,
    "peft_export": 5,
    "peft_import": 5,
    "training": 5,
    "loraplus": 5,
    "rank_allocation": 5,
    "relora": 5,
    "distributed": 5,
    "": 5,  # the package itself: its public names
    "cli": 6,
    "__main__": 6,
}
SHARED_BY_KERNELS = ("choice", "device", "launch", "measured", "tiles")


class Import(NamedTuple):
    """One imported module. ``name`` is absolute; ``deferred`` when it happens inside a function."""

    name: str
    line: int
    deferred: bool


def imports(path: Path, root: Path = PACKAGE) -> Iterator[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = [root.name, *path.relative_to(root).parent.parts]
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    inside = {id(child) for function in functions for child in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [
                f"{module}.{alias.name}" if is_module(module, alias.name, root) else module for alias in node.names
            ]
        else:
            continue
        for name in names:
            yield Import(name, node.lineno, id(node) in inside)


def is_module(package: str, name: str, root: Path) -> bool:
    """Whether ``from package import name`` imports a file of ours rather than a name out of one."""
    top, *rest = package.split(".")
    folder = root.joinpath(*rest)
    return top == root.name and ((folder / f"{name}.py").is_file() or (folder / name).is_dir())


def room(name: str) -> str:
    """The entry of LAYERS for a module of the package."""
    return [*name.split("."), ""][1]


def violations(path: Path, root: Path = PACKAGE) -> Iterator[str]:
    relative = path.relative_to(root)
    here = "" if relative == Path("__init__.py") else relative.parts[0].removesuffix(".py")
    where = relative.as_posix()
    if here not in LAYERS:
        yield f"{where}: has no layer; give it one in tests/test_layers.py"
        return
    for name, line, deferred in imports(path, root):
        top = name.split(".")[0]
        if top == root.name:
            if LAYERS[room(name)] > LAYERS[here]:
                yield f"{where}:{line}: layer {LAYERS[here]} imports {name} of layer {LAYERS[room(name)]}"
            if here == "kernels" and room(name) == "kernels" and name.split(".")[2] not in SHARED_BY_KERNELS:
                yield f"{where}:{line}: a kernel imports {name}; kernels share nothing but {SHARED_BY_KERNELS}"
            if here == "testing" and LAYERS[room(name)] > 0:
                yield f"{where}:{line}: testing imports {name}; it rests on layer 0 alone"
        elif top == "triton":
            if here != "kernels" and where != "backends/triton.py":
                yield f"{where}:{line}: triton is for kernels/ and backends/triton.py"
        elif top not in sys.stdlib_module_names and top != "torch" and not deferred and LAYERS[here] < 6:
            yield f"{where}:{line}: imports {top} at the top; the package must import with torch alone"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_down(path: Path) -> None:
    assert list(violations(path)) == []


def test_reference_needs_torch_only() -> None:
    outside = {found.name for found in imports(PACKAGE / "reference.py") if found.name.split(".")[0] != "torch"}
    assert not {name for name in outside if name.split(".")[0] not in sys.stdlib_module_names}


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("ops.py", "from .linear import ResLoRALinear", "layer 3 imports"),
        ("ops.py", "def f():\n    from reslora_kernels import model", "layer 3 imports"),
        ("config.py", "from . import ops", "layer 0 imports"),
        ("config.py", "from . import ResLoRAConfig", "layer 0 imports"),
        ("backends/torch.py", "from .. import linear", "layer 2 imports"),
        ("model.py", "import reslora_kernels.cli.app", "layer 5 imports"),
        ("testing.py", "from .kernels import project", "rests on layer 0"),
        ("kernels/project.py", "from . import augmented_matmul", "share nothing but"),
        ("linear.py", "def f():\n    import triton", "triton is for"),
        ("adapters.py", "from safetensors.torch import save_file", "with torch alone"),
        ("helpers.py", "", "has no layer"),
    ],
)
def test_planted_fault_is_caught(tmp_path: Path, file: str, source: str, complaint: str) -> None:
    root = tmp_path / "reslora_kernels"
    for name in ("ops", "linear", "model", "kernels/augmented_matmul", "cli/app", file.removesuffix(".py")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / f"{name}.py").write_text("")
    (root / file).write_text(source)
    found = list(violations(root / file, root))
    assert len(found) == 1
    assert complaint in found[0]


def test_downward_imports_are_accepted(tmp_path: Path) -> None:
    root = tmp_path / "reslora_kernels"
    (root / "kernels").mkdir(parents=True)
    (root / "kernels/tiles.py").write_text("")
    (root / "config.py").write_text("")
    (root / "kernels/project.py").write_text(
        "import triton\nfrom . import tiles\nfrom .tiles import TileConfig\nfrom ..config import X"
    )
    (root / "adapters.py").write_text("import json, torch\nfrom .config import X\ndef f():\n    import safetensors")
    assert [fault for path in root.rglob("*.py") for fault in violations(path, root)] == []

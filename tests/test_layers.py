"""What an import takes: the package's own imports go down only, torch is enough, no public name is lost.

Every import is read, also those inside functions, and one that goes up is named. After a change of the public names on
purpose: ``python -m tests.test_layers > tests/public_names.json``.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest

from . import processes

PACKAGE = Path(__file__).parents[1] / "reslora_kernels"
FLOORS = (  # of the package's files and folders, ground floor first; one imports from the floors below it only
    (
        "_version",
        "_build_info",
        "checks",
        "reference",
        "dropout",
        "forward_state",
        "dtensors",
        "host",
        "quantizers",
        "tuning",
    ),
    ("config", "kernels", "side_channel"),
    ("testing", "backends"),
    ("ops",),
    ("layers",),
    ("adapt",),
    ("merge", "bench"),
    ("files",),
    ("training",),
    ("peft",),
    ("", "cli"),  # the package itself: its public names
    ("__main__",),
)
INSIDE = {  # the same for the files of a folder; one that is not here must only be free of circles
    "tuning": (("launch", "gpus"), ("tiles",), ("forms",)),
    "kernels": (
        ("device", "direct"),
        ("augmented_matmul", "project", "low_rank_grads", "outer_products", "grouped_matmul"),
    ),
    "backends": (("kinds",), ("hopper", "native", "select"), ("torch",), ("triton", "cuda"), ("stubs",)),
    "ops": (("arguments",), ("call", "registered", "grouped"), ("gradients",), ("function",)),
    "layers": (
        ("initialization", "offloading", "shortcuts", "wrappers"),
        ("chain", "several"),
        ("adapter",),
        ("standing_in",),
        ("linear", "adapted_weight"),
        ("experts",),
        (
            "checkpointing",
            "quantized_linear",
            "tensor_parallel",
            "convolution",
            "embedding",
            "multihead_attention",
        ),
        ("kinds",),
    ),
    "adapt": (
        ("record", "execution", "data_parallel"),
        ("checkpoints", "obstacles"),
        ("targets", "surroundings"),
        ("coverage", "linking", "trained_tokens"),
        ("apply",),
        ("switching",),
    ),
    "merge": (
        ("statistics",),
        ("closed_form",),
        ("sequential",),
        ("joint_fit",),
        ("merging",),
        ("combination",),
    ),
    "files": (
        ("adapter_format", "model_card", "peft_compatibility"),
        ("save_load",),
        ("peft_export",),
        ("peft_import",),
    ),
    "peft": (("config", "layer"), ("files",), ("model",)),
    "training": (("trainer", "methods", "many_gpus", "pipeline", "starts"),),
}
FREE = ("bench", "cli", "peft", "__main__")  # may import what they like; all else imports with torch alone


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


def floor(floors: tuple[tuple[str, ...], ...], room: str) -> int | None:
    return next((number for number, rooms in enumerate(floors) if room in rooms), None)


def place(name: str) -> tuple[str, str]:
    """The file or folder of the package that holds a module, and the module within it."""
    _, room, inside, *_ = [*name.split("."), "", ""]
    return room, inside


def goes_up(here: str, name: str) -> str | None:
    """What is wrong with an import of ``name`` in the module ``here``, both absolute."""
    (room, inside), (other, other_inside) = place(here), place(name)
    if room != other:
        own, its = floor(FLOORS, room), floor(FLOORS, other)
        assert own is not None and its is not None, (here, name)
        return f"floor {own} imports {name} of floor {its}" if its >= own else None
    if room not in INSIDE or not inside or not other_inside or inside == other_inside:
        return None
    own, its = floor(INSIDE[room], inside), floor(INSIDE[room], other_inside)
    if own is None or its is None:
        return f"{inside if own is None else other_inside} has no floor in {room}/; give it one in tests/test_layers.py"
    return f"{room}/ floor {own} imports {name} of floor {its}" if its >= own else None


def module_of(path: Path, root: Path = PACKAGE) -> str:
    return ".".join((root.name, *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")


def violations(path: Path, root: Path = PACKAGE) -> Iterator[str]:
    here, where = module_of(path, root), path.relative_to(root).as_posix()
    if floor(FLOORS, place(here)[0]) is None:
        yield f"{where}: has no floor; give it one in tests/test_layers.py"
        return
    for name, line, deferred in imports(path, root):
        top = name.split(".")[0]
        if top == root.name:
            if complaint := goes_up(here, name):
                yield f"{where}:{line}: {complaint}"
        elif top == "triton":
            if place(here)[0] != "kernels" and where != "backends/triton.py":
                yield f"{where}:{line}: triton is for kernels/ and backends/triton.py"
        elif top not in (*sys.stdlib_module_names, "torch") and not deferred and place(here)[0] not in FREE:
            yield f"{where}:{line}: imports {top} at the top; the package must import with torch alone"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_down(path: Path) -> None:
    assert list(violations(path)) == []


def test_reference_needs_torch_only() -> None:
    outside = {found.name for found in imports(PACKAGE / "reference.py") if found.name.split(".")[0] != "torch"}
    assert not {name for name in outside if name.split(".")[0] not in sys.stdlib_module_names}


def test_no_module_imports_itself_through_others() -> None:
    graph = {
        module_of(path): {found.name for found in imports(path) if found.name.startswith(PACKAGE.name)}
        for path in PACKAGE.rglob("*.py")
    }
    list(TopologicalSorter({name: used - {name} for name, used in graph.items()}).static_order())  # CycleError


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("ops.py", "from .layers.linear import ResLoRALinear", "floor 3 imports"),
        ("ops.py", "def f():\n    from reslora_kernels import adapt", "floor 3 imports"),
        ("config.py", "from . import ops", "floor 1 imports"),
        ("config.py", "from . import ResLoRAConfig", "floor 1 imports"),
        ("backends/torch.py", "from ..layers import linear", "floor 2 imports"),
        ("adapt/apply.py", "import reslora_kernels.cli.app", "floor 5 imports"),
        ("testing.py", "from .backends import torch", "floor 2 imports"),
        ("kernels/project.py", "from . import augmented_matmul", "kernels/ floor 1 imports"),
        ("layers/shortcuts.py", "from .linear import ResLoRALinear", "layers/ floor 0 imports"),
        ("merge/statistics.py", "def f():\n    from . import merging", "merge/ floor 0 imports"),
        ("layers/linear.py", "def f():\n    import triton", "triton is for"),
        ("backends/stubs.py", "def f():\n    from triton.runtime import driver", "triton is for"),
        ("files/save_load.py", "from safetensors.torch import save_file", "with torch alone"),
        ("helpers.py", "", "has no floor"),
        ("layers/helpers.py", "from . import linear", "helpers has no floor in layers/"),
    ],
)
def test_planted_fault_is_caught(tmp_path: Path, file: str, source: str, complaint: str) -> None:
    root = tmp_path / "reslora_kernels"
    for name in (
        "ops",
        "layers/linear",
        "merge/merging",
        "adapt/apply",
        "kernels/augmented_matmul",
        "cli/app",
        file[:-3],
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / f"{name}.py").write_text("")
    (root / file).write_text(source)
    found = list(violations(root / file, root))
    assert len(found) == 1
    assert complaint in found[0]


def test_downward_imports_are_accepted(tmp_path: Path) -> None:
    root = tmp_path / "reslora_kernels"
    (root / "kernels").mkdir(parents=True)
    (root / "files").mkdir()
    (root / "kernels/device.py").write_text("")
    (root / "config.py").write_text("from .dropout import X")
    (root / "dropout.py").write_text("")
    (root / "kernels/project.py").write_text(
        "import triton\nfrom . import device\nfrom .device import load_block\nfrom ..dropout import X"
    )
    (root / "files/save_load.py").write_text("import torch\nfrom ..config import X\ndef f():\n    import safetensors")
    assert [fault for path in root.rglob("*.py") for fault in violations(path, root)] == []


OPTIONAL = ["safetensors", "transformers", "peft", "accelerate", "datasets", "diffusers", "triton"]
OPTIONAL += ["typer", "rich", "matplotlib", "jinja2", "pandas"]
BLOCKED = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL!r}))\n"  # importing one of them now fails


CODES = {
    "every name": BLOCKED + "import reslora_kernels as r; [getattr(r, name) for name in r.__all__]",
    "no GPU": "import torch\n"
    "def refuse(*_): raise AssertionError('CUDA was queried')\n"
    "torch.cuda.is_available = torch.cuda.device_count = torch.cuda.init = torch.cuda._lazy_init = refuse\n"
    "import reslora_kernels as r; [getattr(r, name) for name in r.__all__]\n"
    "assert not torch.cuda.is_initialized()",
    "no heavy module": "import sys; before = set(sys.modules)\n"
    "import reslora_kernels as r; [getattr(r, name) for name in r.__all__]\n"
    f"print(sorted({{name.split('.')[0] for name in set(sys.modules) - before}} & set({OPTIONAL!r})))",
    "a layer trains": BLOCKED + "import torch, reslora_kernels as r\n"
    "layer = r.ResLoRALinear(4, 3, config=r.ResLoRAConfig(r=2, shortcut='none'))\n"
    "layer(torch.ones(2, 4)).sum().backward()\n"
    "assert layer.lora_B.grad is not None and layer.weight.grad is None",
    "no typer": BLOCKED + "from reslora_kernels.cli import main; sys.exit(main(['doctor']))",
}
# In a process that has imported torch, and nothing that is optional, a fork for each of the codes.
FORKS = f"""import json, os, sys, tempfile, torch
assert not set({OPTIONAL!r}) & sys.modules.keys()
answers = []
for code in json.load(sys.stdin):
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        if not (child := os.fork()):
            os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
            exec(code, {{}})
            raise SystemExit
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        answers.append([status, *(file.seek(0) or file.read() for file in (out, err))])
print(json.dumps(answers))
"""


Ran = dict[str, tuple[int, str, str]]


@pytest.fixture(scope="module")
def ran() -> Ran:
    """The exit code and both outputs of each of CODES."""
    finished = processes.run([sys.executable, "-c", FORKS], input=json.dumps([*CODES.values()]), check=True)
    return dict(zip(CODES, json.loads(finished.stdout), strict=True))


@pytest.mark.parametrize("what", ["every name", "no GPU", "a layer trains"])
def test_import_needs_torch_alone_and_touches_no_gpu(ran: Ran, what: str) -> None:
    status, _, errors = ran[what]
    assert status == 0, errors


def test_import_adds_no_heavy_module(ran: Ran) -> None:
    _, printed, errors = ran["no heavy module"]
    assert printed.strip() == "[]", errors


def test_command_without_typer_names_the_fix(ran: Ran) -> None:
    status, _, errors = ran["no typer"]
    assert status == 2
    assert errors == "reslora: error: typer and rich are not installed; run: pip install typer rich\n"


MODULES = ("reslora_kernels", "reslora_kernels.ops", "reslora_kernels.reference", "reslora_kernels.training")
LISTED = Path(__file__).with_name("public_names.json")


def public_names() -> dict[str, dict[str, str]]:
    """Module -> name -> signature, of the functions and classes that a module defines or lists as its own."""
    found: dict[str, dict[str, str]] = {}
    for module in map(import_module, MODULES):
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        names = getattr(module, "__all__", [name for name in own if not name.startswith("_")])
        found[module.__name__] = {name: signature(getattr(module, name)) for name in sorted(names)}
    return found


def signature(value: object) -> str:
    if not callable(value):
        return type(value).__name__
    if getattr(value, "_is_protocol", False):
        return "Protocol"
    parameters = inspect.signature(value).parameters.values()
    return str([str(parameter.replace(annotation=inspect.Parameter.empty)) for parameter in parameters])


def test_public_names_are_those_that_are_listed() -> None:
    assert public_names() == json.loads(LISTED.read_text())


if __name__ == "__main__":
    print(json.dumps(public_names(), indent=1))

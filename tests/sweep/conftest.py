"""The sweep runs where its marker is asked for by name, and writes its table where ``--sweep-table`` says."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import pytest

ROUNDING = 1e-5  # many of these models compute a part in float32 whatever their dtype
HEADER = """# The sweep: small models of many architectures

Written by `make sweep`, from models with random weights in float64. "adapted" counts the linear layers that
`target_modules="all-linear"` adapts, "PEFT" those that PEFT's `all-linear` does. The figures are the largest relative
differences over the four shortcuts: of all outputs and of all gradients of A and B from the equations stated in
`tests/sweep/test_sweep.py`; of the outputs of the merged model from those of the unmerged one, where that is exact;
after saving and loading, and of a model that has trained; of the export in PEFT from the merged model; of adapters of
PEFT's, of all layers that it has a form for, and with DoRA and biases, from what they are there, and of their export in
PEFT and in Transformers; of trained tokens from the base model with such rows; of gradients under checkpointing from
those without; of logits of cached decoding from uncached. "-" stands for what an architecture does not offer.
"""
COLUMNS = (
    "architecture", "kind", "adapted", "PEFT", "outputs", "gradients", "merged", "loaded", "trained", "in PEFT",
    "from PEFT", "in Transformers", "tokens", "checkpointed", "cached decoding", "notes",
)  # fmt: skip


@dataclass
class Row:
    """An architecture. ``figures``: the worst relative difference by column; ``notes``: why counts differ, refusals."""

    name: str
    kind: str
    adapted: int = 0
    peft: str = "-"
    figures: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @contextmanager
    def noted(self, what: str) -> Iterator[None]:
        """Whatever goes wrong stands in the table, and fails the test at its end."""
        try:
            yield
        except Exception as error:
            self.failures.append(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:160]}")

    def bounded(self, column: str, figure: float) -> None:
        """Keep the worst of a column; an AssertionError if it is more than rounding."""
        self.figures[column] = max(figure, self.figures.get(column, 0.0))
        assert figure < ROUNDING, f"{column} differ by {figure:.1e}"

    def cells(self) -> list[str]:
        figures = [f"{self.figures[c]:.0e}" if c in self.figures else "-" for c in COLUMNS[4:-1]]
        notes = [*(f"**{failure}**" for failure in self.failures), *dict.fromkeys(self.notes)]
        return [self.name, self.kind, str(self.adapted), self.peft, *figures, "; ".join(notes)]


class Table:
    """Rows in the order in which the tests ran."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def text(self) -> str:
        kinds = Counter(row.kind for row in self.rows)
        total = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        lines = [
            HEADER,
            f"{len(self.rows)} architectures: {total}. {_versions()}",
            "",
            "| " + " | ".join(COLUMNS) + " |",
        ]
        lines.append("|" + " --- |" * len(COLUMNS))
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row.cells()) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"


def _versions() -> str:
    """What they were computed with."""
    libraries = ("torch", "transformers", "peft", "diffusers")
    return f"On {platform.machine()}, {', '.join(f'{name} {version(name)}' for name in libraries)}."


HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sweep-table", help="file for the table of the sweep")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "sweep" in config.option.markexpr:
        return
    here = [item for item in items if HERE in item.path.parents]
    config.hook.pytest_deselected(items=here)
    items[:] = [item for item in items if item not in here]


@pytest.fixture(scope="session")
def table(request: pytest.FixtureRequest) -> Table:
    table = Table()
    path = request.config.getoption("--sweep-table", None)
    if path:
        request.addfinalizer(lambda: Path(path).write_text(table.text(), encoding="utf-8"))
    return table

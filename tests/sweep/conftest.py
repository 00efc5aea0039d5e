"""The sweep runs where its marker is asked for by name, and writes its table where ``--sweep-table`` says."""

from __future__ import annotations

from pathlib import Path

import pytest

from .table import Table

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

"""The suites that have a database, once more: each of these files is one of them, on PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import postgres


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what has no database, or is SQLite's alone: it has been seen."""
    here = config.rootpath / "tests/integration/postgresql"
    seen = [
        item
        for item in items
        if here in item.path.parents
        and ("database_url" not in getattr(item, "fixturenames", ()) or item.get_closest_marker("sqlite"))
    ]
    config.hook.pytest_deselected(items=seen)
    items[:] = [item for item in items if item not in seen]


@pytest.fixture
def database_url(postgresql: postgres.Server) -> Iterator[str]:
    """An empty database."""
    with postgresql.schema() as url:
        yield url

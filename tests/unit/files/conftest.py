"""An empty store of files, in SQLite and in PostgreSQL."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from postgresql import Server

from tandem.files.uploads import UploadStore
from tandem.registry import Registry, upgrade


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[UploadStore]:
    """A store in a database of its own."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path}/tandem.db"
    else:
        server: Server = request.getfixturevalue("postgresql_server")
        url = server.create(uuid.uuid4().hex)
        upgrade(url)
    with Registry(url) as registry, UploadStore.at(registry.address) as opened:
        yield opened

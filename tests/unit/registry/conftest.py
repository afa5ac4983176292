"""Folders that look like exports, and a fresh registry."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from postgresql import Server
from small_folders import small_adapter, small_model

from tandem.registry import Registry, upgrade

MakeFolder = Callable[..., Path]


@pytest.fixture
def sqlite_registry(tmp_path: Path) -> Registry:
    """An empty registry in `home/tandem.db`, for what is SQLite's alone."""
    return Registry(f"sqlite:///{tmp_path}/home/tandem.db")


@pytest.fixture(scope="session")
def migrated(postgresql_server: Server) -> str:
    """The name of a PostgreSQL database with the newest schema, which tests copy: migrations take longer than most tests."""
    upgrade(postgresql_server.create("migrated"))
    return "migrated"


@pytest.fixture(params=["sqlite", "postgresql"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Registry]:
    """An empty registry in an SQLite file, and in a PostgreSQL database, of its own."""
    if request.param == "sqlite":
        yield Registry(f"sqlite:///{tmp_path}/home/tandem.db")
        return
    server: Server = request.getfixturevalue("postgresql_server")
    url = server.create(uuid.uuid4().hex, template=request.getfixturevalue("migrated"))
    with Registry(url) as opened:
        yield opened


@pytest.fixture
def model_folder(tmp_path: Path) -> MakeFolder:
    """Makes a folder in the form of a model; `weights` decides its digest."""

    def make(name: str = "base", weights: bytes = b"weights", config: object = None) -> Path:
        return small_model(tmp_path / "exports" / name, repr(weights), config)

    return make


@pytest.fixture
def adapter_folder(tmp_path: Path) -> MakeFolder:
    """Makes a folder in the form of a LoRA adapter; `weights` decides its digest."""

    def make(name: str = "adapter", weights: bytes = b"delta", rank: object = 16, **options: Any) -> Path:
        return small_adapter(tmp_path / "exports" / name, repr(weights), rank=rank, **options)

    return make

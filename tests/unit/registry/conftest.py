"""Folders that look like exports, and a fresh registry."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_folders import small_adapter, small_model

from tandem.registry import Registry

MakeFolder = Callable[..., Path]


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """A registry in an SQLite file of its own."""
    return Registry(f"sqlite:///{tmp_path}/home/tandem.db")


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

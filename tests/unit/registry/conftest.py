"""Folders that look like exports, and a fresh registry."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

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
        folder = tmp_path / "exports" / name
        folder.mkdir(parents=True, exist_ok=True)
        config = {"max_position_embeddings": 512} if config is None else config
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "model.safetensors").write_bytes(weights)
        return folder

    return make


@pytest.fixture
def adapter_folder(tmp_path: Path) -> MakeFolder:
    """Makes a folder in the form of a LoRA adapter."""

    def make(name: str = "adapter", weights: bytes = b"delta", rank: object = 16) -> Path:
        folder = tmp_path / "exports" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps({"r": rank, "peft_type": "LORA"}))
        (folder / "adapter_model.safetensors").write_bytes(weights)
        return folder

    return make

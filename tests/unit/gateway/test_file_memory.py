"""Large files through a gateway in a process of its own: its memory stays bounded."""

from __future__ import annotations

import hashlib
from pathlib import Path

import openai
import pytest
from gateway_process import gateway_process

from tandem.registry import Registry

MIB = 2**20
LARGE_BYTES = 200 * MIB
LINE = b'{"prompt": "' + b"x" * 1000 + b'", "completion": "y"}\n'


@pytest.fixture
def large_file(tmp_path: Path) -> Path:
    path = tmp_path / "large.jsonl"
    with path.open("wb") as file:
        block = LINE * (MIB // len(LINE))
        while file.tell() < LARGE_BYTES:
            file.write(block)
    return path


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def test_a_large_file_is_uploaded_and_downloaded_in_bounded_memory(tmp_path: Path, large_file: Path) -> None:
    registry = Registry(f"sqlite:///{tmp_path}/tandem.db")
    with gateway_process(registry.url, {}, tmp_path / "home") as gateway:
        client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none")
        list(client.files.list())
        gateway.reset_peak()
        before = gateway.memory_bytes("VmRSS")
        with large_file.open("rb") as file:
            uploaded = client.files.create(file=file, purpose="user_data")
        assert (uploaded.bytes, uploaded.filename, uploaded.status) == (
            large_file.stat().st_size,
            "large.jsonl",
            "processed",
        )
        copy = tmp_path / "copy.jsonl"
        with client.files.with_streaming_response.content(uploaded.id) as answer:
            answer.stream_to_file(copy)
        assert file_digest(copy) == file_digest(large_file)
        assert gateway.memory_bytes("VmHWM") - before < 48 * MIB

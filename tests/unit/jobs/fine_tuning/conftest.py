"""What tests of fine-tuning jobs share: a tenant's file of examples."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tandem.files.records import NewFile, Purpose
from tandem.files.store import FileStore


@pytest.fixture
def files(url: str) -> Iterator[FileStore]:
    with FileStore(url) as opened:
        new = NewFile(
            id="file-1", tenant="lab", key_id="", purpose=Purpose.FINE_TUNE, filename="a.jsonl", size_bytes=1, sha256="0" * 64,
            location="/files/1",
        )  # fmt: skip
        opened.add(new, quota_bytes=10**9)
        yield opened

"""Fields of the audit log's entries about adapters, of changes over HTTP and by commands alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from tandem.registry import ModelRecord

MAX_LOGGED_VERSIONS = 100
"""Deleted versions that an entry names."""


def registration_fields(record: ModelRecord) -> dict[str, Any]:
    """Fields about a registered version."""
    source = without_credentials(record.location)
    return {"id": record.id, "base": record.base, "source": source, "digest": record.digest}


def deletion_fields(records: Sequence[ModelRecord]) -> dict[str, Any]:
    """Fields about deleted versions."""
    return {"deleted": [record.id for record in records[:MAX_LOGGED_VERSIONS]], "deleted_count": len(records)}


def without_credentials(source: str) -> str:
    """A folder or URI without the parts that may hold a secret: user, query and fragment."""
    if "://" not in source:
        return source
    parts = urlsplit(source)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))

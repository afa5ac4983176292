"""The server of bench.harness.postgresql, for tests; these are skipped where a machine cannot have one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from bench.harness import postgresql as harness
from bench.harness.postgresql import Server
from hosts import skipped_where_unavailable

__all__ = ["Server", "postgresql"]


@contextlib.contextmanager
def postgresql(host: str = "127.0.0.1") -> Iterator[Server]:
    """See bench.harness.postgresql."""
    with skipped_where_unavailable(), harness.postgresql(host) as server:
        yield server

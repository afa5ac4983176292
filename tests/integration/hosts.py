"""The hosts of bench.harness.hosts, for tests; these are skipped where a machine cannot have any."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from bench.harness import hosts as harness
from bench.harness.hosts import REPOSITORY, SUBNET, Host, UnavailableError, wait_until

__all__ = ["REPOSITORY", "SUBNET", "Host", "hosts", "require_namespaces", "skipped_where_unavailable", "wait_until"]


@contextlib.contextmanager
def skipped_where_unavailable() -> Iterator[None]:
    """Skip the test if a server or a host cannot be had."""
    try:
        yield
    except UnavailableError as error:
        pytest.skip(str(error))


@contextlib.contextmanager
def hosts(count: int, folder: Path, shared: Sequence[Path]) -> Iterator[list[Host]]:
    """See bench.harness.hosts."""
    with skipped_where_unavailable(), harness.hosts(count, folder, shared) as found:
        yield found


def require_namespaces() -> None:
    """Skip the test where this user or machine cannot make namespaces; install what is missing."""
    with skipped_where_unavailable():
        harness.require_namespaces()

"""An app on several nodes needs a registry that several nodes can use, and its replicas open that one only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray

from tandem.errors import RegistryError, RegistryUnreachableError
from tandem.registry import Registry, RegistryAddress
from tandem.serve.app import check_shared
from tandem.serve.replica import check_registry


def nodes_at(monkeypatch: pytest.MonkeyPatch, *found: tuple[str, bool]) -> None:
    """Have Ray tell of nodes with these addresses, alive or not."""
    told: list[dict[str, Any]] = [{"NodeManagerAddress": address, "Alive": alive} for address, alive in found]
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: told)


def test_sqlite_is_refused_on_two_machines_with_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes_at(monkeypatch, ("10.0.0.2", True), ("10.0.0.1", True))
    with pytest.raises(
        RegistryError, match=r"2 nodes \(10\.0\.0\.1, 10\.0\.0\.2\).*TANDEM_DATABASE_URL.*`tandem db upgrade`"
    ):
        check_shared("sqlite:////home/tandem.db")


def test_sqlite_is_fine_on_one_machine_whatever_it_was_before(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes_at(monkeypatch, ("10.0.0.1", True), ("10.0.0.1", True), ("10.0.0.2", False))
    check_shared("sqlite:////home/tandem.db")


def test_postgresql_is_fine_on_any_number_of_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes_at(monkeypatch, ("10.0.0.1", True), ("10.0.0.2", True))
    check_shared("postgresql://user:password@host/tandem")


def test_a_replica_on_a_node_without_the_registry_says_so(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="There is no registry at"):
        check_registry(RegistryAddress(url=f"sqlite:///{tmp_path}/tandem.db", identity="0" * 32))
    assert not list(tmp_path.iterdir())


def test_a_replica_starts_while_the_database_is_away() -> None:
    away = RegistryAddress(url="postgresql://user:password@127.0.0.1:9/tandem?connect_timeout=2", identity="0" * 32)
    with pytest.raises(RegistryUnreachableError):
        Registry.at(away)
    check_registry(away)

"""Registry of an app on several nodes: PostgreSQL only, opened by replicas at its address."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray

from tandem.apps.resolve import address_of, check_shared
from tandem.config import GatewayConfig
from tandem.errors import RegistryError, RegistryUnreachableError
from tandem.registry import Registry, RegistryAddress
from tandem.routing.records import Snapshot
from tandem.serve.replica.deployment import check_registry


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


def test_sqlite_is_allowed_on_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes_at(monkeypatch, ("10.0.0.1", True), ("10.0.0.1", True), ("10.0.0.2", False))
    check_shared("sqlite:////home/tandem.db")


def test_postgresql_is_allowed_on_any_number_of_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes_at(monkeypatch, ("10.0.0.1", True), ("10.0.0.2", True))
    check_shared("postgresql://user:password@host/tandem")


def test_a_replica_on_a_node_without_the_registry_says_so(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="There is no registry at"):
        check_registry(RegistryAddress(url=f"sqlite:///{tmp_path}/tandem.db", identity="0" * 32), "10.0.0.1")
    assert not list(tmp_path.iterdir())


def test_a_replica_starts_while_the_database_is_away() -> None:
    away = RegistryAddress(url="postgresql://user:password@127.0.0.1:9/tandem?connect_timeout=2", identity="0" * 32)
    with pytest.raises(RegistryUnreachableError):
        Registry.at(away).revision()
    check_registry(away, "10.0.0.1")


def test_an_sqlite_registry_is_used_on_the_node_that_built_the_app_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes_at(monkeypatch, ("10.0.0.1", True))
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.1")
    with Registry(f"sqlite:///{tmp_path}/tandem.db") as registry:
        address = address_of(registry)
    check_registry(address, "10.0.0.1")
    # A node that joined later, and may see the same file.
    with pytest.raises(
        RegistryError, match=r"for the node 10\.0\.0\.1, and this replica is on 10\.0\.0\.2.*PostgreSQL"
    ):
        check_registry(address, "10.0.0.2")


def test_a_gateway_starts_while_the_database_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    from tandem.gateway.app import create_app

    away = RegistryAddress(url="postgresql://user:password@127.0.0.1:9/tandem?connect_timeout=2", identity="0" * 32)
    check_registry(away, "10.0.0.1")

    async def watch(version: int) -> Snapshot:
        return Snapshot(version=1, replicas=())

    assert create_app(models=(), watch=watch, registry=Registry.at(away), config=GatewayConfig())

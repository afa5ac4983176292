"""Registry of an app on several nodes: PostgreSQL only, opened by replicas at its address."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import ray
from small_folders import small_adapter, small_model

from tandem.apps.resolve import address_of, check_shared
from tandem.config import GatewayConfig
from tandem.errors import RegistryError, RegistryUnreachableError
from tandem.registry import Registry, RegistryAddress
from tandem.routing.records import ReplicaRecord, Snapshot
from tandem.serve.directory import Directory
from tandem.serve.pinned_adapters import PinnedAdapters
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


async def test_replicas_read_pinned_adapters_only_after_a_change_of_the_revision(tmp_path: Path) -> None:
    registry = Registry(f"sqlite:///{tmp_path}/tandem.db")
    registry.register_model("base", small_model(tmp_path / "base"))
    registry.register_adapter("red", small_adapter(tmp_path / "red"), base="base")
    directory = Directory(wake=lambda deployment: None, registry=registry.address)
    record = ReplicaRecord(
        id="r", pool="base@1", deployment="engine", url="http://127.0.0.1:1", token="t", state="ready", running=0, waiting=0,
        max_running=1, kv_usage=0.0, adapters=(), slots=(), adapter_loads=0, pin_problems=(), started_at=0.0, startup_s=(),
        tasks=(),
    )  # fmt: skip

    async def told() -> int:
        for _ in range(200):
            if (revision := (await directory.heartbeat(record)).registry_revision) == registry.revision():
                return revision
            await asyncio.sleep(0.05)
        raise AssertionError("the directory does not follow the registry")

    opened: list[Registry] = []
    pins = PinnedAdapters("base@1", lambda: opened.append(registry) or registry)
    first = await told()
    assert pins.is_behind(first) and pins.read(first) is None
    assert not pins.is_behind(await told())
    registry.pin("red")
    second = await told()
    assert pins.is_behind(second)
    assert [ref.id for ref in pins.read(second) or []] == ["red@1"]
    assert not pins.is_behind(second) and len(opened) == 2


def test_a_gateway_starts_while_the_database_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    from tandem.gateway.app import create_app

    away = RegistryAddress(url="postgresql://user:password@127.0.0.1:9/tandem?connect_timeout=2", identity="0" * 32)
    check_registry(away, "10.0.0.1")

    async def watch(version: int) -> Snapshot:
        return Snapshot(version=1, replicas=())

    assert create_app(models=(), watch=watch, registry=Registry.at(away), config=GatewayConfig())

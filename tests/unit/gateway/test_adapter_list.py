"""The list of adapters in memory, and the shared reads of the registry's revision."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import NoReturn

import pytest
from gateway_world import World
from gateway_world import world as world
from small_folders import small_adapter, small_model

from tandem.errors import RegistryUnreachableError, UnknownModelError
from tandem.gateway.models import adapter_list, registry_reads
from tandem.gateway.models.adapter_list import AdapterList
from tandem.gateway.models.registry_reads import RegistryReads
from tandem.registry import Registry
from tandem.registry.records import AdapterSummary


class Counting(Registry):
    """Counts what it is asked."""

    revisions = 0
    pages = 0

    def revision(self) -> int:
        self.revisions += 1
        return super().revision()

    def summaries(self, *args: object, **options: object) -> list[object]:  # type: ignore[override]
        self.pages += 1
        return super().summaries(*args, **options)  # type: ignore[arg-type, return-value]


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is no registry that is away."""
    monkeypatch.setattr(registry_reads, "REVISION_S", 10.0)


@pytest.fixture
def registry(tmp_path: Path) -> Counting:
    made = Counting(f"sqlite:///{tmp_path}/tandem.db")
    made.register_model("base", small_model(tmp_path / "base"))
    for name in ("red", "blue", "green"):
        made.register_adapter(name, small_adapter(tmp_path / name, name), base="base")
    return made


def listing(registry: Registry, *hidden: str) -> tuple[AdapterList, RegistryReads]:
    reads = RegistryReads(registry, name="lists")
    return AdapterList(reads, ["base@1"], reads.revision, hidden), reads


async def test_pages_are_answered_from_memory_until_the_registry_changes(registry: Counting, tmp_path: Path) -> None:
    adapters, _ = listing(registry, "green")
    found, more = await adapters.page(None, 1)
    assert [each.id for each in found] == ["blue@1"] and more
    found, more = await adapters.page("blue", 5)
    assert [each.id for each in found] == ["red@1"] and not more
    assert await adapters.page("red", 5) == ([], False) and adapters.near("bluf") == ["blue", "red"]
    assert registry.pages == 1
    registry.register_adapter("grey", small_adapter(tmp_path / "grey", "grey"), base="base")
    registry.register_adapter("dora", small_adapter(tmp_path / "dora", "dora", use_dora=True), base="base")
    found, _ = await adapters.page(None, 9)
    assert [each.name for each in found] == ["blue", "grey", "red"] and registry.pages == 2


async def test_a_tenant_gets_its_own_adapters_and_shared_ones_by_name(registry: Counting, tmp_path: Path) -> None:
    for name, tenant in (("azure", "acme"), ("pink", "acme"), ("cyan", "other")):
        registry.register_adapter(name, small_adapter(tmp_path / name, name), base="base", tenant=tenant)
    adapters, _ = listing(registry)
    found, more = await adapters.page(None, 3, "acme")
    assert [each.name for each in found] == ["azure", "blue", "green"] and more
    found, more = await adapters.page("green", 3, "acme")
    assert [each.name for each in found] == ["pink", "red"] and not more
    assert adapters.near("cya", "acme") == ["azure", "blue", "green", "pink", "red"]
    assert "cyan" in adapters.near("cya") and len((await adapters.page(None, 9))[0]) == 6


async def test_a_list_and_a_wrong_name_look_at_no_adapters_of_other_tenants(registry: Counting) -> None:
    adapters, _ = listing(registry)
    await adapters.page(None, 1)

    class Unread(list[AdapterSummary]):
        """Adapters that nobody may look at."""

        def __getitem__(self, at: object) -> NoReturn:
            raise AssertionError("it was read")

        __iter__ = __len__ = __getitem__  # type: ignore[assignment]

    adapters._by_tenant["other"] = adapters._adapters = Unread()
    assert len((await adapters.page(None, 9, "acme"))[0]) == 3 and len(adapters.near("blu", "acme")) == 3


async def test_many_pages_are_read_in_several_queries(registry: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_list, "PAGE", 2)
    adapters, _ = listing(registry)
    assert [each.name for each in (await adapters.page(None, 9))[0]] == ["blue", "green", "red"]
    assert registry.pages == 2


async def test_a_reading_that_takes_long_is_not_repeated_for_every_change(
    registry: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_list, "NO_PAUSE_BELOW_S", 0.0)
    monkeypatch.setattr(adapter_list, "PAUSE_FACTOR", 1e6)
    adapters, _ = listing(registry)
    await adapters.page(None, 9)
    for _ in range(3):
        registry.promote("red@1")
        registry.remove("blue") if _ == 0 else registry.pin("red")
        assert len((await adapters.page(None, 9))[0]) == 3
    assert registry.pages == 1
    adapters._next_refresh_at = 0.0
    assert len((await adapters.page(None, 9))[0]) == 2


async def test_a_list_that_was_never_read_needs_the_registry(
    registry: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters, reads = listing(registry)

    def fails(self: object) -> int:
        raise RegistryUnreachableError("away")

    with monkeypatch.context() as patched:
        patched.setattr(Counting, "revision", fails)
        with pytest.raises(RegistryUnreachableError):
            await adapters.page(None, 9)
        assert reads.is_unreachable
    await reads.read(Registry.revision, 5.0)
    assert len((await adapters.page(None, 9))[0]) == 3


async def test_requests_share_reads_of_the_revision_and_see_every_earlier_change(registry: Counting) -> None:
    _, reads = listing(registry)
    before = registry.revisions
    found = await asyncio.gather(*(reads.revision() for _ in range(50)))
    # One that had begun, and one for all that came meanwhile.
    assert registry.revisions - before == 2 and set(found) == {registry.revision()}
    for _ in range(5):
        waiting = [asyncio.create_task(reads.revision()) for _ in range(3)]
        await asyncio.sleep(0)
        registry.pin("red")
        registry.unpin("red")
        now = registry.revision()
        assert await reads.revision() == now
        await asyncio.gather(*waiting)


async def test_an_unknown_name_does_not_count_as_a_registry_that_is_away(registry: Counting) -> None:
    _, reads = listing(registry)
    with pytest.raises(UnknownModelError):
        await reads.read(lambda it: it.resolve("nobody", suggest=False), 5.0)
    assert not reads.is_unreachable


async def test_the_list_of_a_gateway_has_what_was_registered_just_before(world: World) -> None:
    for count, name in enumerate(("red", "blue", "green"), 2):
        world.adapter(name)
        assert len((await world.http.get("/v1/models")).json()["data"]) == count

"""The directory deployment with replicas and gateways on real connections."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from small_folders import small_adapter, small_model

from tandem.auth import Limits
from tandem.limits import Admit, Answer, DayTotals, Exchange, Refusal, Reservation, Settle, Subject, Verdict
from tandem.limits.records import Quota
from tandem.registry import Registry
from tandem.routing.changes import Changes, ReplicaChange
from tandem.routing.fleet_view import FleetView
from tandem.routing.records import HeartbeatReply, ReplicaRecord, Snapshot
from tandem.serve import directory_link, directory_protocol, directory_server
from tandem.serve.directory import WARM_UP_S, Directory
from tandem.serve.directory_link import DirectoryClient, DirectoryWatcher, LimitsLink, ReplicaReporter
from tandem.serve.directory_protocol import DirectoryAddress, FrameReader, Hello, ProtocolError, frame
from tandem.serve.directory_state import SILENT_AFTER_S

A = ReplicaRecord(id="a", pool="base@1", deployment="engine-a", url="http://a", token="t")


@dataclass
class World:
    """One directory at a time, its replicas and its gateways."""

    directory: Directory
    reporters: list[ReplicaReporter] = field(default_factory=list)
    watchers: list[DirectoryWatcher] = field(default_factory=list)

    async def locate(self) -> DirectoryAddress:
        return await self.directory.address()

    async def replica(
        self, record: ReplicaRecord, on_reply: Callable[[HeartbeatReply], None] = lambda reply: None
    ) -> tuple[ReplicaReporter, dict[str, ReplicaRecord]]:
        """A replica that reports; its record, as "now", may be replaced."""
        state = {"now": record}
        reporter = ReplicaReporter(DirectoryClient(self.locate), lambda: state["now"], on_reply)
        self.reporters.append(reporter)
        await reporter.start(5.0)
        return reporter, state

    def gateway(self) -> tuple[DirectoryWatcher, FleetView]:
        watcher = DirectoryWatcher(DirectoryClient(self.locate))
        self.watchers.append(watcher)
        return watcher, FleetView()

    async def restart(self) -> None:
        await self.directory.close()
        self.directory = Directory(lambda deployment: None, host="127.0.0.1")


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World(Directory(lambda deployment: None, host="127.0.0.1"))
    yield made
    for reporter in made.reporters:
        if reporter._task is not None:
            reporter._task.cancel()
    for watcher in made.watchers:
        watcher.close()
    await made.directory.close()


async def until(watcher: DirectoryWatcher, view: FleetView, done: Callable[[], bool]) -> list[object]:
    """Apply updates until `done`; the kinds of the updates."""
    kinds: list[object] = []
    async with asyncio.timeout(20):
        while not done():
            with contextlib.suppress(OSError, TimeoutError):
                update = await watcher(view.version)
                view.apply(update)
                kinds.append(type(update))
            await asyncio.sleep(0.01)
    return kinds


async def test_gateways_are_sent_a_snapshot_first_and_then_only_changes(world: World) -> None:
    reporter, state = await world.replica(A)
    await world.replica(replace(A, id="b", adapters=tuple(f"adapter-{n}@1" for n in range(1000))))
    watcher, view = world.gateway()
    kinds = await until(watcher, view, lambda: view.records.keys() == {"a", "b"})
    assert kinds[0] is Snapshot
    before = watcher.received_bytes
    state["now"] = replace(A, running=3, adapters=("red@1",), slots=("red@1",), adapter_loads=1)
    reporter.changed()
    kinds = await until(watcher, view, lambda: view.records["a"].adapters == ("red@1",))
    assert view.records["a"] == state["now"] and set(kinds) == {Changes}
    # The thousand adapters of the other replica were not sent again.
    assert watcher.received_bytes - before < 2000


async def test_a_replica_that_leaves_is_removed_and_its_state_changes_arrive(world: World) -> None:
    reporter, state = await world.replica(A)
    watcher, view = world.gateway()
    await until(watcher, view, lambda: "a" in view.records)
    state["now"] = replace(A, state="draining")
    reporter.report()
    await until(watcher, view, lambda: view.records["a"].state == "draining")
    await reporter.leave()
    await until(watcher, view, lambda: not view.records)


async def test_after_a_restart_replicas_and_gateways_find_the_new_directory_and_forget_nobody(world: World) -> None:
    _, state = await world.replica(A)
    watcher, view = world.gateway()
    await until(watcher, view, lambda: "a" in view.records)
    epoch = view.epoch
    await world.restart()
    state["now"] = replace(A, adapters=("red@1",))
    kinds = await until(watcher, view, lambda: view.epoch != epoch and view.reported.get("a") == state["now"])
    assert Snapshot in kinds and view.records == {"a": state["now"]}


async def test_a_gateway_that_asks_for_version_0_gets_a_snapshot_again(world: World) -> None:
    await world.replica(A)
    watcher, view = world.gateway()
    await until(watcher, view, lambda: "a" in view.records)
    assert isinstance(await watcher(view.version), Changes)
    assert isinstance(await watcher(0), Snapshot)


async def test_a_replica_that_the_directory_has_forgotten_is_asked_for_its_record(world: World) -> None:
    reporter, _ = await world.replica(A)
    watcher, view = world.gateway()
    await until(watcher, view, lambda: "a" in view.records)
    assert world.directory._state.remove("a")
    await until(watcher, view, lambda: "a" not in view.records)
    await until(watcher, view, lambda: "a" in view.records)
    assert reporter.reply.resend is False


async def test_a_replica_without_heartbeats_becomes_silent_while_a_gateway_is_connected(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    reporter, _ = await world.replica(A)
    watcher, view = world.gateway()
    await until(watcher, view, lambda: "a" in view.records)
    assert reporter._task is not None
    reporter._task.cancel()
    world.directory._state._replicas["a"].heard_at -= SILENT_AFTER_S
    await until(watcher, view, lambda: view.lost == {"a"})
    assert view.records["a"].state == "silent"


async def test_a_connection_without_the_token_is_closed_and_learns_nothing(world: World) -> None:
    await world.replica(A)
    good = await world.directory.address()

    async def locate() -> DirectoryAddress:
        return replace(good, token="guessed")

    connection = await DirectoryClient(locate).connect(lambda token: Hello(token=token, purpose="watch"), 1_000_000)
    with pytest.raises(ConnectionError):
        await connection.read(5.0)
    assert "guessed" not in repr(await locate())


async def test_of_many_connections_without_the_token_the_oldest_are_closed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory_server, "MAX_UNAUTHENTICATED", 3)
    monkeypatch.setattr(directory_server, "HELLO_S", 60.0)
    watcher, view = world.gateway()
    await until(watcher, view, lambda: True)
    address = await world.directory.address()
    strangers = []
    for _ in range(5):
        strangers.append(await asyncio.open_connection(address.host, address.port))
        await asyncio.sleep(0.05)
    for reader, _ in strangers[:2]:
        assert await asyncio.wait_for(reader.read(), 5.0) == b""
    for reader, _ in strangers[2:]:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(), 0.05)
    # Those that have shown the token stay, and new ones are taken.
    _, state = await world.replica(A)
    await until(watcher, view, lambda: view.records == {"a": state["now"]})
    for _, writer in strangers:
        writer.close()


async def test_a_frame_that_is_no_report_ends_its_connection_only(world: World) -> None:
    _, state = await world.replica(A)
    connection = await DirectoryClient(world.locate).connect(lambda token: Hello(token=token), 1_000_000)
    connection.send(b'{"id": 5}')
    with pytest.raises(ConnectionError):
        await connection.read(5.0)
    watcher, view = world.gateway()
    await until(watcher, view, lambda: view.records == {"a": state["now"]})


def test_reports_are_decoded_together_and_one_that_cannot_be_read_leaves_the_others() -> None:
    good = [directory_protocol.encode_change(ReplicaChange(id=name)) for name in "ab"]
    assert directory_protocol.decode_changes(good) == [ReplicaChange(id="a"), ReplicaChange(id="b")]
    assert directory_protocol.decode_changes([]) == []
    # One frame must not pass for two.
    double = good[0] + b"," + good[1]
    for bad in (b'{"id": 5}', b"{", double):
        found = directory_protocol.decode_changes([good[0], bad, good[1]])
        assert found == [ReplicaChange(id="a"), None, ReplicaChange(id="b")]


def test_frames_are_found_in_whatever_pieces_they_arrive_and_long_ones_refused() -> None:
    sent = frame(b"one") + frame(b"") + frame(b"three")
    for size in (1, 2, 5, len(sent)):
        reader, found = FrameReader(limit=5), []
        for start in range(0, len(sent), size):
            found += list(reader.feed(sent[start : start + size]))
        assert found == [b"one", b"", b"three"]
    with pytest.raises(ProtocolError, match=r"6 bytes; 5 are allowed"):
        list(FrameReader(limit=5).feed(frame(b"longer")))


async def test_a_gateway_connects_again_when_the_directory_says_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory_link, "SILENT_S", 0.1)
    taken = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = taken.sockets[0].getsockname()[1]

    async def locate() -> DirectoryAddress:
        return DirectoryAddress(host="127.0.0.1", port=port, token="t")

    watcher = DirectoryWatcher(DirectoryClient(locate))
    for _ in range(2):
        with pytest.raises(TimeoutError):
            await watcher(0)
        assert watcher._connection is None
    taken.close()


async def test_demand_wakes_a_model_without_replicas_once_and_is_in_heartbeat_replies(world: World) -> None:
    woken: list[str] = []
    up = asyncio.Event()

    async def wake(deployment: str) -> None:
        woken.append(deployment)
        await up.wait()

    world.directory = Directory(wake, host="127.0.0.1")
    for _ in range(3):
        await world.directory.demand("g1", {"engine-a": 4})
        await asyncio.sleep(0.01)
    assert woken == ["engine-a"]
    up.set()
    await asyncio.sleep(0.01)
    reporter, _ = await world.replica(A)
    assert reporter.reply.waiting == 4
    await world.directory.demand("g1", {"engine-a": 4})
    await asyncio.sleep(0.01)
    assert woken == ["engine-a"]
    async with asyncio.timeout(20):
        while reporter.reply.waiting:
            await world.directory.demand("g1", {})
            await asyncio.sleep(0.05)


async def test_a_wake_up_is_cancelled_when_no_request_waits() -> None:
    ended: list[str] = []

    async def wake(deployment: str) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(deployment)

    directory = Directory(wake)
    await directory.demand("g1", {"engine-a": 1})
    await asyncio.sleep(0.01)
    assert ended == []
    await directory.demand("g1", {})
    await asyncio.sleep(0.01)
    assert ended == ["engine-a"]


async def test_updates_of_a_new_directory_are_marked_incomplete(world: World) -> None:
    watcher, view = world.gateway()
    view.apply(await watcher(0))
    assert not view.complete and not (await world.directory.watch(0)).complete
    world.directory._started_at -= WARM_UP_S
    await until(watcher, view, lambda: view.complete)
    assert (await world.directory.watch(0)).complete


async def test_tools_read_all_replicas_and_wait_for_a_change(world: World) -> None:
    known = await world.directory.watch(0)
    assert known.replicas == ()
    waiting = asyncio.create_task(world.directory.watch(known.version))
    await world.replica(A)
    assert (await asyncio.wait_for(waiting, 5)).replicas == (A,)


async def test_replicas_are_told_of_pinned_adapters_and_ask_no_database(tmp_path: Path) -> None:
    registry = Registry(f"sqlite:///{tmp_path}/tandem.db")
    registry.register_model("base", small_model(tmp_path / "base"))
    registry.register_adapter("red", small_adapter(tmp_path / "red"), base="base")
    world = World(Directory(lambda deployment: None, registry=registry.address, host="127.0.0.1"))
    told: list[list[str] | None] = []

    def on_reply(reply: HeartbeatReply) -> None:
        told.append(None if reply.pins is None else [pin.id for pin in reply.pins])

    _, prefill = replace(A, id="p"), await world.replica(replace(A, id="p", pool="base@1#prefill"), on_reply)
    assert prefill
    registry.pin("red")
    async with asyncio.timeout(20):
        while not told or told[-1] != ["red@1"]:
            await asyncio.sleep(0.05)
    registry.unpin("red")
    async with asyncio.timeout(20):
        while told[-1] != []:
            await asyncio.sleep(0.05)
    # An answer is sent when it differs: not one each second.
    assert len(told) <= 4
    for reporter in world.reporters:
        await reporter.leave()
    await world.directory.close()


async def test_a_gateway_that_does_not_read_gets_what_it_missed_at_once(world: World) -> None:
    reporter, state = await world.replica(A)
    slow = await DirectoryClient(world.locate).connect(lambda token: Hello(token=token, purpose="watch"), 10**9)
    assert slow._transport is not None
    slow._transport.pause_reading()
    # More than the buffers of both sockets hold.
    names = tuple(f"{'adapter' * 20}-{n}@1" for n in range(20_000))
    began, turn = time.monotonic(), 0
    while time.monotonic() - began < 20 and not any(peer.paused for peer in world.directory._server._peers):
        turn += 1
        state["now"] = replace(A, adapters=names[turn % 2 :: 2])
        reporter.report()
        await asyncio.sleep(0.12)
    (peer,) = (peer for peer in world.directory._server._peers if peer.paused)
    assert peer._transport is not None
    waiting = peer._transport.get_write_buffer_size()
    state["now"] = replace(A, adapters=names)
    reporter.report()
    await asyncio.sleep(1.5)
    # Nothing is added to what waits for it, neither changes nor the message of each second.
    assert peer.paused and peer._transport.get_write_buffer_size() <= waiting
    state["now"] = replace(A, running=1)
    reporter.report()
    slow._transport.resume_reading()
    view = FleetView()
    async with asyncio.timeout(30):
        while view.records.get("a") != state["now"]:
            view.apply(directory_protocol.decode_update(await slow.read()))
    slow.close()


def test_a_change_that_holds_a_whole_record_is_known_before_it_is_decoded() -> None:
    whole = ReplicaChange(id="a", record=replace(A, adapters=('","record":{',)))
    load = ReplicaChange(id="a", adapter_loads=1)
    found = [directory_protocol.has_record(directory_protocol.encode_change(each)) for each in (whole, load)]
    assert found == [True, False]


async def test_the_ledger_of_limits_asks_a_gateway_that_it_does_not_know_what_is_in_flight(world: World) -> None:
    subject = Subject("key:k", Limits(concurrent_requests=1))
    one = Reservation("a", (subject,), 1)
    link = LimitsLink(DirectoryClient(world.locate))
    assert await link(Exchange("g", 1, (Admit(one),))) == Answer(resend=True)
    assert await link(Exchange("g", 2, (), reservations=(one,))) == Answer()
    (verdict,) = (await link(Exchange("g", 3, (Admit(one._replace(id="b")),)))).verdicts
    assert verdict.refusal is not None
    link.close()


def test_exchanges_reach_the_ledger_whole() -> None:
    subject = Subject("tenant:t", Limits(requests_per_minute=5, tokens_per_day=10**12))
    exchange = Exchange(
        "g",
        7,
        (Admit(Reservation("a", (subject,), 3)), Settle("b", None, 2), Settle("c", 9)),
        (Reservation("d", (), 1),),
        DayTotals(20_000, {"key:k": 5}),
    )
    assert directory_protocol.decode_exchange(directory_protocol.encode_exchange(exchange)) == exchange
    refusal = Refusal("tokens_per_minute", "key:k", 1, 2, math.inf)
    answer = Answer((Verdict(refusal, Quota(5, 4, 1.5)), Verdict(None)), True)
    assert directory_protocol.decode_answer(directory_protocol.encode_answer(answer)) == answer


async def test_a_late_answer_about_limits_is_not_taken_for_that_to_the_next_exchange(
    world: World,
) -> None:
    link = LimitsLink(DirectoryClient(world.locate))
    one = Reservation("a", (Subject("key:k", Limits(concurrent_requests=1)),), 1)
    assert await link(Exchange("g", 1, (), reservations=())) == Answer()
    exchange_task = asyncio.create_task(link(Exchange("g", 2, (Admit(one),))))
    await asyncio.sleep(0)
    exchange_task.cancel()
    await asyncio.wait((exchange_task,))
    assert await link(Exchange("g", 3, ())) == Answer()
    link.close()


async def test_the_link_to_the_ledger_connects_again_after_a_restart_of_the_directory(world: World) -> None:
    link = LimitsLink(DirectoryClient(world.locate))
    assert await link(Exchange("g", 1, (), reservations=())) == Answer()
    await world.restart()
    async with asyncio.timeout(10):
        while True:
            with contextlib.suppress(OSError):
                assert await link(Exchange("g", 2, ())) == Answer(resend=True)
                break
    link.close()


async def test_a_frame_about_limits_that_cannot_be_read_ends_its_connection(world: World) -> None:
    connection = await DirectoryClient(world.locate).connect(
        lambda token: Hello(token=token, purpose="limits"), 1_000_000
    )
    connection.send(b'["g", 1, [[["a", "subjects", 1]]]]')
    with pytest.raises(ConnectionError):
        await connection.read(5)

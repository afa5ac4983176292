"""Replica index, hash ring and histories."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tandem.routing.affinity import MAX_HOLDERS, PrefixHistory, SessionHistory
from tandem.routing.fleet_view import FleetView
from tandem.routing.hash_ring import HashRing
from tandem.routing.index import LoadBuckets, ReplicaIndex
from tandem.routing.records import ReplicaRecord, Snapshot

ADAPTERS = st.lists(st.sampled_from(["red@1", "blue@1"]), unique=True).map(tuple)
RECORDS = st.builds(
    ReplicaRecord,
    id=st.sampled_from("abcde"),
    pool=st.just("base@1"),
    url=st.just(""),
    token=st.just(""),
    state=st.sampled_from(["ready", "draining"]),
    running=st.integers(0, 3),
    adapters=ADAPTERS,
)


def replica(name: str, running: int = 0, waiting: int = 0, kv_usage: float = 0.0, *adapters: str) -> ReplicaRecord:
    return ReplicaRecord(
        id=name,
        pool="base@1",
        url="",
        token="",
        running=running,
        waiting=waiting,
        kv_usage=kv_usage,
        adapters=adapters,
    )


def index(*records: ReplicaRecord) -> ReplicaIndex:
    made = ReplicaIndex(random.Random(0))
    made.update(records)
    return made


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.none() | st.integers(0, 9))), st.sets(st.sampled_from("abcdef"))
)
def test_least_loaded_matches_a_linear_scan(moves: list[tuple[str, int | None]], exclude: set[str]) -> None:
    load_buckets, plain = LoadBuckets(), dict[str, int]()
    for name, load in moves:
        if load is None:
            load_buckets.drop(name)
            plain.pop(name, None)
        else:
            load_buckets.set(name, load)
            plain[name] = load
        for left_out in (set(), exclude):
            found = load_buckets.least_loaded(random.Random(0), left_out)
            left = {other: plain[other] for other in plain if other not in left_out}
            assert (found is None) == (not left)
            assert found is None or left[found] == min(left.values())
        assert load_buckets.mean() == (sum(plain.values()) / len(plain) if plain else 0)
        assert load_buckets.spread() == (max(plain.values()) - min(plain.values()) if plain else 0)
        assert {other: load_buckets.get(other) for other in "abcdef"} == {other: plain.get(other) for other in "abcdef"}


def test_own_requests_count_at_once_and_only_once_after_a_report() -> None:
    made = index(replica("a"))
    made.request_started("a", None)
    made.request_started("a", None)
    assert made.load_buckets.get("a") == 2
    made.update([replica("a", 5)])
    assert made.load_buckets.get("a") == 5, "three of the five are other gateways'"
    made.request_ended("a", None)
    assert made.load_buckets.get("a") == 4
    made.request_ended("a", None)
    made.update([replica("a", 5)])
    assert made.load_buckets.get("a") == 5


def test_waiting_requests_and_a_full_cache_count_more_than_running_requests() -> None:
    made = index(replica("a", 6), replica("b", 4, 2), replica("c", 6, 0, 0.98), replica("d", 6, 0, 0.85))
    load = {name: made.load_buckets.get(name) or 0 for name in "abcd"}
    assert load["a"] == load["d"] < load["b"] and load["a"] < load["c"]


def test_a_replicas_report_of_its_adapters_replaces_observations() -> None:
    made = index(replica("a"), replica("b"))
    made.adapter_loaded("a", "red@1")
    assert made.holders("red@1", 4) == ["a"] and made.adapter_presence("a", "red@1") == 1
    made.update([replica("a"), replica("b", 0, 0, 0.0, "red@1")])
    assert made.holders("red@1", 4) == ["b"] and not made.adapter_presence("a", "red@1")


def test_an_adapter_in_a_slot_is_worth_more_than_one_in_memory() -> None:
    record = replace(replica("a", 0, 0, 0.0, "red@1", "blue@1"), slots=("blue@1",))
    made = index(record, replica("b", 0, 0, 0.0, "red@1"))
    assert 0 < made.adapter_presence("a", "red@1") < made.adapter_presence("a", "blue@1") == 1
    assert made.adapter_presence("b", "red@1") == 1, (
        "one that does not tell its slots is believed to use all that it holds"
    )
    made.request_started("a", "red@1")
    assert made.adapter_presence("a", "red@1") == 1, "a request of one's own has put it into a slot"


def test_a_loading_adapter_counts_at_the_replica_of_its_request() -> None:
    made = index(replica("a"), replica("b"))
    made.request_started("a", "red@1")
    assert made.holders("red@1", 4) == ["a"]
    made.request_ended("a", "red@1")
    assert made.holders("red@1", 4) == []


@given(st.lists(st.sets(st.sampled_from("abcdef")), max_size=8), st.lists(st.sampled_from("xyz"), unique=True))
def test_removed_replicas_leave_no_state(steps: list[set[str]], adapters: list[str]) -> None:
    made = ReplicaIndex(random.Random(0))
    for names in steps:
        made.update([replica(name, 1, 0, 0.0, *adapters) for name in sorted(names)])
        assert set(made.ready) == names == set(made.ring.successors(0, 9))
        for adapter in "xyz":
            assert set(made.holders(adapter, 9)) == (names if adapter in adapters else set())
        assert sorted(made.round_robin()) == sorted(names)


def test_own_requests_at_a_replica_that_leaves_and_returns_still_count() -> None:
    made = index(replica("a"))
    made.request_started("a", None)
    made.update([])
    made.update([replica("a")])
    assert made.load_buckets.get("a") == 1
    made.update([])
    made.request_ended("a", None)
    made.update([replica("a")])
    assert made.load_buckets.get("a") == 0


def test_ring_keys_spread_evenly_and_move_only_from_removed_replicas() -> None:
    ring, names = HashRing(), [f"r{i}" for i in range(10)]
    ring.set(names)
    keys = [random.Random(i).getrandbits(64) for i in range(2000)]
    before = [ring.successors(key, 2) for key in keys]
    assert all(len(set(homes)) == 2 for homes in before)
    shares = Counter(homes[0] for homes in before)
    assert set(shares) == set(names) and max(shares.values()) < 450 and min(shares.values()) > 60
    ring.set(names[1:])
    for homes, now in zip(before, (ring.successors(key, 2) for key in keys), strict=True):
        assert now[0] == next(home for home in homes if home != "r0")
    ring.set(names)
    assert [ring.successors(key, 2) for key in keys] == before
    assert len(ring.successors(1, 99)) == 10


def test_histories_are_bounded_and_drop_the_least_recently_used() -> None:
    prefixes, sessions = PrefixHistory(10), SessionHistory(10)
    for i in range(100):
        prefixes.record([i, 0], "a")  # the second is in all of them
        sessions.record(i, "a")
        sessions.record(0, "b")
    assert len(prefixes) == len(sessions) == 10
    assert (
        prefixes.longest_matches([0], 4) and prefixes.longest_matches([99], 4) and not prefixes.longest_matches([50], 4)
    )
    assert (sessions.get(0), sessions.get(99), sessions.get(50)) == ("b", "a", None)
    for i in range(100):
        prefixes.record([0], f"r{i}")
    assert len(prefixes.longest_matches([0], 1000)) == MAX_HOLDERS


def test_an_active_session_is_not_dropped() -> None:
    sessions = SessionHistory(2)
    for session in (1, 2, 1, 3):
        sessions.record(session, "a")
    assert sessions.get(1) == "a" and sessions.get(2) is None


def test_the_shortest_prefixes_of_a_text_are_dropped_last() -> None:
    prefixes = PrefixHistory(2)
    prefixes.record([1, 2, 3, 4], "a")
    assert prefixes.longest_matches([1, 2, 3, 4], 9) == {"a": 2}


def test_longest_matches_lists_the_longest_first_and_each_replica_once() -> None:
    prefixes = PrefixHistory(99)
    prefixes.record([1], "a")
    prefixes.record([1, 2, 3], "b")
    prefixes.record([1, 2], "c")
    assert list(prefixes.longest_matches([1, 2, 3, 4], 9).items()) == [("b", 3), ("c", 2), ("a", 1)]
    assert list(prefixes.longest_matches([1, 2, 3, 4], 2)) == ["b", "c"]


@given(st.lists(st.lists(RECORDS, max_size=5, unique_by=lambda record: record.id), max_size=6))
def test_applied_changes_leave_the_index_as_a_whole_update_does(states: list[list[ReplicaRecord]]) -> None:
    whole, changed, view = ReplicaIndex(random.Random(1)), ReplicaIndex(random.Random(1)), FleetView()
    for version, records in enumerate(states, 1):
        whole.update(records)
        change = view.apply(Snapshot(version=version, replicas=tuple(records)))
        changed.apply(change.changed, [record.id for record in change.removed])
        assert sorted(whole.ready) == sorted(changed.ready)
        for replica in whole.ready:
            assert whole.load_buckets.get(replica) == changed.load_buckets.get(replica)
            assert set(whole.record(replica).adapters) == set(changed.record(replica).adapters)
        for adapter in ("red@1", "blue@1"):
            assert sorted(whole.holders(adapter, 9)) == sorted(changed.holders(adapter, 9))

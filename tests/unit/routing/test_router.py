"""Routing decisions: invariants of every policy, and the rules of each."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.config import RouterConfig
from tandem.errors import ConfigError
from tandem.routing import policies
from tandem.routing.records import ReplicaRecord, Snapshot
from tandem.routing.request import PREFIX_LENGTHS, RoutingRequest, hash_key
from tandem.routing.router import Router

BASE = "base@1"


def replica(name: str, running: int = 0, **fields: Any) -> ReplicaRecord:
    values = {"id": name, "pool": BASE, "url": f"http://{name}", "token": "t", "running": running, **fields}
    return ReplicaRecord(**values)


def router(*records: ReplicaRecord, seed: int = 0, gateways: int = 1, **config: Any) -> Router:
    made = Router(RouterConfig(**config), random.Random(seed), gateways=gateways)
    made.update(Snapshot(version=1, replicas=records))
    return made


def routing_request(
    *, text: int = 0, blocks: int = 0, pool: str = BASE, adapter: str | None = None, session: int | None = None
) -> RoutingRequest:
    """A request whose text is known by a number; texts of one number share their first `prefix_hashes` beginnings."""
    hashes = tuple(hash_key(f"{text}/{i}/{adapter}") for i in range(blocks))
    return RoutingRequest(
        pool=pool,
        adapter=adapter,
        prefix_hashes=hashes,
        size=PREFIX_LENGTHS[blocks - 1] if blocks else 0,
        session=session,
    )


def sent(made: Router, request: RoutingRequest, *exclude: str) -> str | None:
    """Choose, and let the request begin."""
    found = made.choose(request, exclude)
    if found is None:
        return None
    made.request_started(request, found.id)
    return found.id


def answered(made: Router, request: RoutingRequest, *exclude: str) -> str | None:
    """A request that is answered at once."""
    found = sent(made, request, *exclude)
    if found is not None:
        made.adapter_loaded(request, found)
        made.request_ended(request, found)
    return found


def several(count: int, **fields: Any) -> list[ReplicaRecord]:
    return [replica(f"r{i}", **fields) for i in range(count)]


# ---- what holds for every policy ------------------------------------------------------------------------------------

RECORDS = st.lists(
    st.builds(
        replica,
        st.sampled_from([f"r{i}" for i in range(8)]),
        st.integers(0, 40),
        waiting=st.integers(0, 5),
        kv_usage=st.floats(0, 1),
        state=st.sampled_from(["ready", "ready", "draining", "dead"]),
        pool=st.sampled_from([BASE, "other@1"]),
        adapters=st.lists(st.sampled_from("abc"), unique=True).map(tuple),
    ),
    unique_by=lambda record: record.id,
)
REQUESTS = st.builds(
    routing_request,
    text=st.integers(0, 3),
    blocks=st.integers(0, len(PREFIX_LENGTHS)),
    adapter=st.sampled_from([None, "a", "b", "z"]),
    session=st.sampled_from([None, 1, 2]),
)


@pytest.mark.parametrize("policy", policies.POLICIES)
@given(
    snapshots=st.lists(RECORDS, min_size=1, max_size=4),
    requests=st.lists(REQUESTS, min_size=1, max_size=12),
    exclude=st.sets(st.sampled_from([f"r{i}" for i in range(8)])),
)
def test_every_policy_chooses_a_ready_replica_of_the_pool_outside_exclude_if_there_is_one(
    policy: str, snapshots: list[list[ReplicaRecord]], requests: list[RoutingRequest], exclude: set[str]
) -> None:
    made = router(policy=policy)
    running: list[tuple[RoutingRequest, str]] = []
    for version, records in enumerate(snapshots):
        made.update(Snapshot(version=version, replicas=tuple(records)))
        allowed = {r.id for r in records if r.state == "ready" and r.pool == BASE} - exclude
        for request in requests:
            found = made.choose(request, exclude)
            assert (found is None) == (not allowed)
            if found is not None:
                assert found.id in allowed and found in records
                made.request_started(request, found.id)
                running.append((request, found.id))
    for request, name in running:
        made.adapter_loaded(request, name)
        made.request_ended(request, name)


@pytest.mark.parametrize("policy", policies.POLICIES)
def test_an_unknown_pool_has_no_replica(policy: str) -> None:
    assert router(*several(3), policy=policy).choose(routing_request(pool="other@1")) is None
    assert Router(RouterConfig(policy=policy)).choose(routing_request()) is None


@pytest.mark.parametrize("policy", policies.POLICIES)
def test_requests_without_affinity_spread_over_all_replicas(policy: str) -> None:
    made = router(*several(10), policy=policy)
    counts = Counter(sent(made, routing_request()) for _ in range(200))
    assert len(counts) == 10 and max(counts.values()) <= 30


def test_a_policy_is_one_function_under_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(policies.POLICIES, "last", lambda request, context: max(context.index.ready))
    made = router(*several(5), policy="last")
    assert answered(made, routing_request()) == "r4"
    assert answered(made, routing_request(), "r4") != "r4", "a policy that proposes one to avoid is overruled"


def test_an_unknown_policy_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'affinity'"):
        Router(RouterConfig(policy="afinity"))


# ---- affinity -------------------------------------------------------------------------------------------------------


def test_an_adapter_request_prefers_the_replica_already_holding_it() -> None:
    made = router(*several(50), replica("red", 5, adapters=("red@1",)))
    assert answered(made, routing_request(adapter="red@1")) == "red"


def test_requests_for_a_cold_adapter_go_where_it_is_being_loaded() -> None:
    made = router(*several(50))
    assert len({sent(made, routing_request(adapter="red@1")) for _ in range(5)}) == 1


def test_the_least_loaded_holder_of_an_adapter_is_chosen() -> None:
    made = router(*several(50), *(replica(f"red{i}", 20 - 5 * i, adapters=("red@1",)) for i in range(4)))
    assert answered(made, routing_request(adapter="red@1")) == "red3"


def test_a_hot_adapter_spills_over_to_a_second_replica_and_stays_there() -> None:
    made = router(*several(20), adapter_requests=4)
    homes = [sent(made, routing_request(adapter="hot@1")) for _ in range(12)]
    assert homes[:4] == homes[:1] * 4
    # The first keeps what it may have beyond the others, and no more.
    assert 1 < len(set(homes)) < 5 and Counter(homes).most_common(1)[0][1] <= 8


def test_requests_for_an_adapter_with_two_holders_stay_at_one_below_its_spill_over() -> None:
    holders = [replica(name, adapters=("red@1",)) for name in ("one", "two")]
    made = router(*several(20), *holders)
    homes = [sent(made, routing_request(adapter="red@1", text=text, blocks=2)) for text in range(4)]
    assert len(set(homes)) == 1
    more = {sent(made, routing_request(adapter="red@1", text=text, blocks=2)) for text in range(10, 20)}
    assert more == {"one", "two"}


def test_under_high_load_a_small_difference_does_not_load_an_adapter_twice() -> None:
    for all_have, expected in ((2, False), (80, True)):
        made = router(*several(50, running=all_have), replica("red", all_have + 12, adapters=("red@1",)))
        assert (answered(made, routing_request(adapter="red@1")) == "red") is expected


def test_a_text_goes_to_the_replica_that_read_its_prefix() -> None:
    made = router(*several(50))
    first = answered(made, routing_request(text=1, blocks=10))
    # Whatever else was sent meanwhile.
    for text in range(2, 40):
        answered(made, routing_request(text=text, blocks=10))
    longer = routing_request(text=1, blocks=12)
    assert answered(made, longer) == first


def test_the_longer_a_matching_prefix_the_busier_its_replica_may_be() -> None:
    short, long = routing_request(text=1, blocks=3), routing_request(text=2, blocks=11)
    for busier, expected in (
        (0, {"short", "long"}),
        (1, {"short", "long"}),
        (3, {"long"}),
        (15, {"long"}),
        (17, set()),
    ):
        made = router(*several(50), replica("reader", busier))
        found = set()
        for name, request in (("short", short), ("long", long)):
            made.request_started(request, "reader")
            made.request_ended(request, "reader")
            found |= {name} if getattr(made.choose(request), "id", None) == "reader" else set()
        assert found == expected, busier


def test_the_replica_with_the_longer_matching_prefix_is_chosen() -> None:
    made = router(*several(50))
    short, long = routing_request(text=1, blocks=3), routing_request(text=1, blocks=11)
    made.request_started(long, "r7")
    made.request_ended(long, "r7")
    made.request_started(short, "r9")
    made.request_ended(short, "r9")
    assert made.choose(long) == replica("r7")


def test_a_hot_text_spills_over_and_no_replica_has_many_more_than_the_others() -> None:
    made = router(*several(20), prefix_requests=4)
    counts = Counter(sent(made, routing_request(text=1, blocks=13)) for _ in range(200))
    assert len(counts) == 20 and max(counts.values()) <= 10 + 6


def test_a_session_sticks_to_its_replica_while_that_is_healthy() -> None:
    made = router(*several(50))
    first = answered(made, routing_request(session=7))
    assert {answered(made, routing_request(session=7)) for _ in range(30)} == {first}
    left = [r for r in several(50) if r.id != first]
    made.update(Snapshot(version=2, replicas=(*left, replica(str(first), state="draining"))))
    second = answered(made, routing_request(session=7))
    assert second != first
    made.update(Snapshot(version=3, replicas=tuple(several(50))))
    assert {answered(made, routing_request(session=7)) for _ in range(30)} == {second}


def test_a_session_leaves_a_replica_that_is_far_busier_than_others() -> None:
    made = router(*several(50))
    first = answered(made, routing_request(session=7))
    made.update(Snapshot(version=2, replicas=tuple(replace(r, running=40 * (r.id == first)) for r in several(50))))
    assert answered(made, routing_request(session=7)) != first


@pytest.mark.parametrize(
    "request_",
    [
        routing_request(adapter="cold@1"),
        routing_request(adapter="red@1", text=1, blocks=4),
        routing_request(adapter="red@1", session=7),
        routing_request(text=1, blocks=4),
        routing_request(session=7),
    ],
)
def test_independent_gateways_send_equal_requests_to_the_same_replica(request_: RoutingRequest) -> None:
    records = [replica(f"r{i}", adapters=("red@1",) * (i % 20 == 0)) for i in range(100)]
    chosen = {answered(router(*records, seed=seed, gateways=2), request_) for seed in range(40)}
    assert len(chosen) == 1


def test_a_text_spills_over_to_the_second_replica_that_it_hashes_to() -> None:
    chosen = []
    for seed in range(40):
        made = router(*several(100), seed=seed, gateways=2, home_requests=8)
        counts = Counter(sent(made, routing_request(text=seed % 2, blocks=1)) for _ in range(9))
        chosen.append((seed % 2, frozenset(name for name, _ in counts.most_common(2)), len(counts)))
    assert len({(text, two) for text, two, _ in chosen}) == 2 and {count for _, _, count in chosen} == {2}


def test_a_new_replica_takes_over_few_hashed_keys() -> None:
    requests = [routing_request(adapter=f"a{i}@1") for i in range(400)]
    before = [answered(router(*several(20), seed=i, gateways=2), a) for i, a in enumerate(requests)]
    after = [answered(router(*several(21), seed=i, gateways=2), a) for i, a in enumerate(requests)]
    assert 0 < sum(b != a for b, a in zip(before, after, strict=True)) < 60


def test_in_a_small_pool_the_least_loaded_replica_is_always_a_candidate() -> None:
    made = router(replica("a", 3), replica("b", 1), replica("c", 9))
    assert {answered(made, routing_request()) for _ in range(20)} == {"b"}


# ---- the others -----------------------------------------------------------------------------------------------------


def test_round_robin_uses_every_replica_equally() -> None:
    made = router(*several(5), policy="round_robin")
    counts = Counter(answered(made, routing_request(adapter="red@1", session=3)) for _ in range(25))
    assert set(counts.values()) == {5}
    assert "r1" not in {answered(made, routing_request(), "r1") for _ in range(25)}


def test_least_loaded_breaks_ties_at_random() -> None:
    made = router(*several(50, running=3), replica("a", 1), replica("b", 0, waiting=2), policy="least_loaded")
    assert {answered(made, routing_request()) for _ in range(20)} == {"a"}
    made = router(replica("a"), replica("b"), policy="least_loaded")
    counts = Counter(answered(made, routing_request()) for _ in range(400))
    assert min(counts["a"], counts["b"]) > 150


def test_two_choices_never_chooses_the_busiest() -> None:
    made = router(*several(3), replica("busy", 9), policy="two_choices")
    counts = Counter(answered(made, routing_request()) for _ in range(300))
    assert counts["busy"] == 0 and min(counts[f"r{i}"] for i in range(3)) > 50


def test_the_prefix_tree_rule_follows_the_text_until_loads_differ_too_much() -> None:
    made = router(*several(10), policy="prefix_tree", imbalance_requests=5)
    homes = [sent(made, routing_request(text=1, blocks=8)) for _ in range(6)]
    assert len(set(homes)) == 1
    assert sent(made, routing_request(text=1, blocks=8)) != homes[0]


def test_the_prefix_tree_rule_ignores_a_match_that_is_a_small_share() -> None:
    made = router(*several(10), policy="prefix_tree", match_rate=0.5)
    first = sent(made, routing_request(text=1, blocks=3))
    long = routing_request(text=1, blocks=10)
    found = made.choose(replace(long, prefix_hashes=long.prefix_hashes[:3]))
    assert found is not None and found.id != first
    assert sent(made, routing_request(text=1, blocks=3)) == first

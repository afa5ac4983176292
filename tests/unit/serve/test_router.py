from __future__ import annotations

import random
from collections import Counter

from tandem.serve.records import ReplicaRecord, Snapshot
from tandem.serve.router import SPILL_REQUESTS, choose


def replica(name: str, running: int = 0, **fields: object) -> ReplicaRecord:
    values = {"base": "base@1", "url": f"http://{name}", "token": "t", "running": running, **fields}
    return ReplicaRecord(id=name, **values)  # type: ignore[arg-type]


def snapshot(*replicas: ReplicaRecord) -> Snapshot:
    return Snapshot(version=1, replicas=replicas)


def picked(*args: object, **options: object) -> str | None:
    found = choose(*args, **options)  # type: ignore[arg-type]
    return found.id if found else None


def test_the_least_loaded_replica_is_chosen() -> None:
    assert picked(snapshot(replica("a", 3), replica("b", 1), replica("c", 0, waiting=2)), "base@1") == "b"


def test_requests_that_this_gateway_has_in_flight_count() -> None:
    assert picked(snapshot(replica("a", 1), replica("b", 0)), "base@1", in_flight={"b": 5}) == "a"


def test_adapter_request_prefers_the_replica_already_holding_it() -> None:
    replicas = snapshot(replica("a", 0), replica("b", 5, adapters=("red@1",)))
    assert picked(replicas, "base@1", adapter="red@1") == "b"
    assert picked(replicas, "base@1") == "a"


def test_a_replica_that_holds_the_adapter_but_is_much_busier_is_passed_over() -> None:
    replicas = snapshot(replica("a", 0), replica("b", SPILL_REQUESTS + 1, adapters=("red@1",)))
    assert picked(replicas, "base@1", adapter="red@1") == "a"


def test_other_bases_and_replicas_that_are_not_ready_are_never_chosen() -> None:
    replicas = snapshot(replica("a", base="other@1"), replica("b", state="dead"), replica("c", state="draining"))
    assert picked(replicas, "base@1") is None


def test_avoided_replicas_are_left_out() -> None:
    assert picked(snapshot(replica("a"), replica("b", 9)), "base@1", avoid=["a"]) == "b"
    assert picked(snapshot(replica("a")), "base@1", avoid=["a"]) is None


def test_ties_are_broken_at_random() -> None:
    dice = random.Random(0)
    counts = Counter(picked(snapshot(replica("a"), replica("b")), "base@1", dice=dice) for _ in range(400))
    assert min(counts["a"], counts["b"]) > 150

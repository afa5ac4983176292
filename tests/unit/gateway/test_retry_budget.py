"""Retry budget of one request."""

from __future__ import annotations

from tandem.gateway.replicas.upstream import Attempt
from tandem.gateway.retry_budget import MAX_STARTED_REPLICAS, MAX_TRIED_REPLICAS, RetryBudget
from tandem.routing.records import ReplicaRecord

REPLICA = ReplicaRecord(id="r", pool="base", url="http://a", token="t")


def test_replicas_that_did_not_begin_are_limited_for_each_turn_only() -> None:
    budget = RetryBudget()
    for number in range(MAX_TRIED_REPLICAS):
        assert budget.allows_attempt
        budget.tried_replicas.append(f"r{number}")
        budget.record(Attempt(REPLICA, failure="refused"))
    assert not budget.allows_attempt and not budget.exhausted
    budget.requeued()
    assert budget.allows_attempt and budget.tried_replicas == [] and budget.failure == ""


def test_replicas_that_may_have_begun_are_limited_over_all_turns() -> None:
    budget = RetryBudget()
    for _ in range(MAX_STARTED_REPLICAS):
        assert not budget.exhausted
        budget.requeued()
        budget.record(Attempt(REPLICA, failure="died", may_have_begun=True))
    assert budget.exhausted and not budget.allows_attempt and budget.failure == "died"


def test_an_attempt_that_is_not_retriable_exhausts_the_budget() -> None:
    budget = RetryBudget()
    budget.record(Attempt(REPLICA, failure="no adapter slot", retriable=False))
    assert budget.exhausted

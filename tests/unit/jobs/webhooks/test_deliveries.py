"""Webhook deliveries on SQLite and PostgreSQL: recorded once for each endpoint, leased, tried again for a day."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest

from tandem.config.serving.webhooks import EVENTS
from tandem.db.backup import backup, restore
from tandem.jobs.webhooks.deliveries import DELIVERED, GIVEN_UP, LEASE, PENDING, Deliveries, Delivery, Subscription
from tandem.jobs.webhooks.events import event_type
from tandem.jobs.work.clock import ManualClock
from tandem.jobs.work.records import JobSubmission
from tandem.jobs.work.states import JobKind, State
from tandem.jobs.work.store import JobStore

ALL = Subscription(endpoint="a" * 64, events=EVENTS, tenant=None)
LAB = Subscription(endpoint="b" * 64, events=("batch.cancelled",), tenant="lab")


@pytest.fixture
def deliveries(url: str, clock: ManualClock) -> Iterator[Deliveries]:
    with Deliveries(url, clock=clock) as opened:
        yield opened


def cancelled(store: JobStore, id_: str, kind: JobKind = JobKind.BATCH, tenant: str = "lab") -> str:
    """A job that has ended."""
    store.submit(JobSubmission(kind=kind, name="job", id=id_, spec={}, tenant=tenant))
    assert store.cancel(id_).state is State.CANCELLED
    return id_


def claim(deliveries: Deliveries, *endpoints: Subscription) -> list[Delivery]:
    return deliveries.claim([each.endpoint for each in endpoints or (ALL,)], 100)


def test_each_endpoint_is_told_once_of_the_ends_that_it_asks_for(store: JobStore, deliveries: Deliveries) -> None:
    cancelled(store, "batch_1")
    cancelled(store, "batch_2", tenant="other")
    cancelled(store, "ftjob-1", JobKind.TRAIN)
    cancelled(store, "adapter-1", JobKind.TRAIN)
    store.submit(JobSubmission(kind=JobKind.BATCH, name="job", id="batch_3", spec={}, tenant="lab"))
    for _ in range(2):
        deliveries.record([ALL, LAB])
    told = {(each.endpoint[0], each.event.job, each.event.type) for each in claim(deliveries, ALL, LAB)}
    assert told == {
        ("a", "batch_1", "batch.cancelled"),
        ("a", "batch_2", "batch.cancelled"),
        ("a", "ftjob-1", "fine_tuning.job.cancelled"),
        ("b", "batch_1", "batch.cancelled"),
    }


def test_a_claimed_delivery_is_another_ones_when_its_lease_has_run_out(
    store: JobStore, deliveries: Deliveries, clock: ManualClock
) -> None:
    cancelled(store, "batch_1")
    deliveries.record([ALL])
    (first,) = claim(deliveries)
    assert claim(deliveries) == []
    clock.advance(LEASE.total_seconds())
    (second,) = claim(deliveries)
    assert (first.event, second.attempts) == (second.event, 2), "the receiver knows it by the same id"
    # What the slow one reports then does not end the attempt of the other.
    deliveries.failed(first, "late")
    assert deliveries.states() == {first.event.id: PENDING}
    deliveries.delivered(second)
    deliveries.failed(first, "late")
    assert deliveries.states() == {first.event.id: DELIVERED}


def test_a_delivery_is_tried_for_a_day_at_growing_intervals(
    store: JobStore, deliveries: Deliveries, clock: ManualClock
) -> None:
    cancelled(store, "batch_1")
    start = deliveries.record([ALL])
    times = []
    for _ in range(100):
        for delivery in claim(deliveries):
            times.append(deliveries.now() - start)
            goes_on = deliveries.failed(delivery, "it answered 500")
        if not goes_on:
            break
        clock.advance(10.0)
        while not deliveries_due(deliveries) and deliveries.now() - start < timedelta(days=2):
            clock.advance(60.0)
    assert set(deliveries.states().values()) == {GIVEN_UP}
    assert 20 < len(times) < 60 and times[-1] > timedelta(hours=22)


def deliveries_due(deliveries: Deliveries) -> bool:
    """Whether a claim would find something, without claiming it."""
    from sqlalchemy import select

    from tandem.db.schema import WebhookDeliveryRow

    with deliveries._reading() as session:
        row = session.scalars(select(WebhookDeliveryRow)).one()
        return row.next_at <= deliveries.now()


def test_ends_of_long_ago_are_not_told_and_forgotten(
    store: JobStore, deliveries: Deliveries, clock: ManualClock
) -> None:
    cancelled(store, "batch_1")
    deliveries.record([ALL])
    clock.advance(timedelta(days=8).total_seconds())
    deliveries.forget_old()
    deliveries.record([ALL])
    assert deliveries.states() == {}


def test_deliveries_are_in_a_backup(store: JobStore, deliveries: Deliveries, url: str, tmp_path) -> None:
    cancelled(store, "batch_1")
    deliveries.record([ALL])
    backup(url, tmp_path / "copy.gz")
    restore(f"sqlite:///{tmp_path}/restored.db", tmp_path / "copy.gz")
    with Deliveries(f"sqlite:///{tmp_path}/restored.db") as copy:
        assert copy.states() == deliveries.states() != {}


def test_every_end_of_a_job_has_a_type_that_a_config_can_name() -> None:
    types = {event_type(job, state) for job in ("batch_1", "ftjob-1") for state in State}
    assert types - {None} == set(EVENTS)
    assert {event_type("adapter-1", state) for state in State} == {None}

"""Batches take the slots that clients leave."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tandem.gateway.work.batch_capacity import QUIET_AFTER_S, BatchCapacity, ModelLoad


def load(limit: int | None, running: int, waiting: int = 0) -> ModelLoad:
    return ModelLoad(limit=limit, running=running, waiting=waiting)


def unslowed(share: float) -> BatchCapacity:
    """The capacity for batches at an engine that requests do not slow down."""
    capacity = BatchCapacity(share, 1.25)
    for running in (1, 8):
        capacity.answered(running, seconds=1.0, tokens=10, now=0.0)
    return capacity


def test_without_clients_batches_take_all_slots() -> None:
    capacity = unslowed(0.5)
    assert capacity.free(load(16, 0), in_flight=0, now=0.0) == 16
    assert capacity.free(load(16, 16), in_flight=16, now=1.0) == 0


def test_beside_clients_batches_take_their_share_and_never_more_than_is_free() -> None:
    capacity = unslowed(0.5)
    assert capacity.free(load(16, 2), in_flight=0, now=0.0) == 8
    assert capacity.free(load(16, 14), in_flight=2, now=0.0) == 2
    assert capacity.free(load(16, 12), in_flight=8, now=0.0) == 0


def test_after_clients_have_left_for_a_while_batches_take_all_again() -> None:
    capacity = unslowed(0.5)
    capacity.free(load(16, 1), in_flight=0, now=0.0)
    assert capacity.free(load(16, 0), in_flight=0, now=QUIET_AFTER_S / 2) == 8
    assert capacity.free(load(16, 0), in_flight=0, now=2 * QUIET_AFTER_S) == 16


def test_where_clients_wait_nothing_is_sent() -> None:
    assert unslowed(1.0).free(load(16, 4, waiting=1), in_flight=0, now=0.0) == 0


@given(
    limit=st.integers(0, 1000),
    share=st.floats(0.01, 1.0),
    in_flight=st.integers(0, 1000),
    interactive=st.integers(0, 1000),
    waiting=st.integers(0, 5),
)
def test_the_limit_is_never_exceeded(limit: int, share: float, in_flight: int, interactive: int, waiting: int) -> None:
    running = in_flight + interactive
    free = unslowed(share).free(load(limit, running, waiting), in_flight, now=0.0)
    assert free >= 0 and (free == 0 or running + free <= max(1, limit))


def test_beside_clients_batches_slow_tokens_down_by_no_more_than_is_allowed() -> None:
    capacity = BatchCapacity(0.5, 1.25)
    for running in (2, 20, 200):  # a step takes 10 parts, and one for each request
        capacity.answered(running, (10 + running) * 50, 50, now=0.0)
    assert capacity.free(load(256, 4), in_flight=0, now=0.0) == 3
    assert capacity.free(load(256, 4 + 3), in_flight=3, now=0.0) == 0
    assert capacity.free(load(256, 0), in_flight=0, now=2 * QUIET_AFTER_S) == 256, "without clients they take all"

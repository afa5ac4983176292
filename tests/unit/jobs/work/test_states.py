"""States of durable work: the table of legal transitions, for each kind."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.errors import IllegalTransitionError
from tandem.jobs.work.retries import RetryPolicy, after_failure
from tandem.jobs.work.states import TRANSITIONS, Action, JobKind, State, is_legal, next_state

KINDS = st.sampled_from(JobKind)
AGAIN = ((Action.REQUEUE, State.QUEUED), (Action.ADOPT, State.RUNNING))
ACTIONS = st.lists(st.sampled_from(Action), max_size=30)


def reachable(kind: JobKind, start: State) -> set[State]:
    """All states that some actions lead to."""
    found, left = {start}, [start]
    while left:
        state = left.pop()
        after = {target for (before, _), target in TRANSITIONS[kind].items() if before is state} - found
        found |= after
        left += after
    return found


def states_of(kind: JobKind) -> set[State]:
    return reachable(kind, State.QUEUED)


@given(kind=KINDS, actions=ACTIONS)
def test_actions_that_are_not_legal_are_refused_and_change_nothing(kind: JobKind, actions: list[Action]) -> None:
    state = State.QUEUED
    for action in actions:
        if is_legal(kind, state, action):
            after = next_state(kind, state, action)
            # What has ended changes by being queued again, or started by its command, and by nothing else.
            assert not state.ended or (action, after) in AGAIN or after is state
            assert after in states_of(kind)
            state = after
        else:
            with pytest.raises(IllegalTransitionError, match=rf"'{action}' is not possible.*{kind}.*'{state}'"):
                next_state(kind, state, action)


@pytest.mark.parametrize("kind", JobKind)
def test_every_state_leads_to_an_end_and_is_left_by_an_operator_within_two_actions(kind: JobKind) -> None:
    for state in states_of(kind):
        assert any(each.ended for each in reachable(kind, state))
        after = next_state(kind, state, Action.CANCEL)
        assert after.ended or next_state(kind, after, Action.STOPPED).ended


@pytest.mark.parametrize("kind", JobKind)
def test_a_cancel_is_accepted_or_answered_by_the_end_in_every_state(kind: JobKind) -> None:
    for state in states_of(kind):
        after = next_state(kind, state, Action.CANCEL)
        if state.ended:
            assert after is state
        else:
            assert after in (State.CANCELLED, State.STOPPING)
            # Once more changes nothing.
            assert next_state(kind, after, Action.CANCEL) is after


@pytest.mark.parametrize("kind", JobKind)
def test_after_a_cancel_a_job_ends_as_cancelled_unless_it_finishes_first(kind: JobKind) -> None:
    if kind is not JobKind.GENERATE:
        reports = (Action.STOPPED, Action.FAIL, Action.RETRY, Action.GIVE_UP)
        assert {next_state(kind, State.STOPPING, report) for report in reports} == {State.CANCELLED}
        assert next_state(kind, State.STOPPING, Action.FINISH) is State.FINISHED


@pytest.mark.parametrize("kind", JobKind)
def test_in_every_state_that_a_process_runs_in_its_end_can_be_recorded(kind: JobKind) -> None:
    for state, action in itertools.product(states_of(kind), (Action.FINISH, Action.FAIL, Action.RETRY, Action.GIVE_UP)):
        assert is_legal(kind, state, action) == state.active


def test_kinds_without_checkpoints_are_not_paused() -> None:
    for kind in (JobKind.EVALUATE, JobKind.EXPORT, JobKind.GENERATE):
        assert not is_legal(kind, State.QUEUED, Action.PAUSE) and State.PAUSED not in states_of(kind)
    assert State.PAUSED in states_of(JobKind.TRAIN)


@given(failures=st.integers(1, 10_000), draw=st.floats(0, 1, exclude_max=True))
def test_delays_double_up_to_the_longest_less_the_jitter(failures: int, draw: float) -> None:
    policy = RetryPolicy(first_s=5.0, longest_s=600.0, jitter=0.5)
    delay_s = policy.delay_s(failures, draw)
    whole = min(600.0, 5.0 * 2 ** min(failures - 1, 20))
    assert whole / 2 <= delay_s <= whole


@given(failures=st.integers(1, 20), attempts=st.integers(1, 20))
def test_work_is_tried_again_until_its_attempts_are_used_up(failures: int, attempts: int) -> None:
    action = after_failure(failures, attempts, retryable=True)
    assert action is (Action.RETRY if failures < attempts else Action.GIVE_UP)
    assert after_failure(failures, attempts, retryable=False) is Action.FAIL

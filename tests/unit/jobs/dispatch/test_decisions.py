"""What starts next in order of priority and submission, and the next step of a job. Pure."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.db.schema import JobRow
from tandem.jobs.dispatch import reconcile
from tandem.jobs.dispatch.decisions import Capacity, Start, Wait, first_come_first_served
from tandem.jobs.dispatch.reconcile import next_step
from tandem.jobs.dispatch.runner import RunState, RunStatus
from tandem.jobs.work.records import Job, JobSubmission, Resources
from tandem.jobs.work.rows import job_values, to_job
from tandem.jobs.work.states import ACTIVE, Action, JobKind, State, is_legal

NOW = datetime(2026, 5, 4, 12, tzinfo=UTC)


def job(
    name: str, *, state: State = State.QUEUED, handle: str | None = None, workers: int | None = None, **need: float
) -> Job:
    submission = JobSubmission(kind=JobKind.TRAIN, name=name, id=name, spec={}, resources=Resources(**need))  # type: ignore[arg-type]
    row = JobRow(number=1, **job_values(submission, NOW))
    return replace(to_job(row), state=state, handle=handle, workers=workers, attempt=1)


def test_jobs_start_in_their_order_with_as_many_workers_as_fit() -> None:
    waiting = [job("a", max_workers=4), job("b", max_workers=4), job("c")]
    assert first_come_first_served(waiting, [job("r", workers=2)], lambda: Capacity(cpus=8), NOW) == [
        Start(job_id="a", workers=4),
        Start(job_id="b", workers=2),
        Wait(job_id="c", reason="waits for 1 CPUs and 0 GPUs; 0 CPUs and 0 GPUs are free"),
    ]


def test_a_job_that_waits_for_room_is_not_passed_by_smaller_ones() -> None:
    large = job("large", gpus_per_worker=1, min_workers=8, max_workers=8)
    running = [job("r", gpus_per_worker=1, workers=2)]
    assert first_come_first_served([large, job("small")], running, lambda: Capacity(cpus=16, gpus=8), NOW) == [
        Wait(job_id="large", reason="waits for 8 CPUs and 8 GPUs; 14 CPUs and 6 GPUs are free"),
        Wait(job_id="small", reason="waits behind large"),
    ]


def test_a_job_behind_one_of_another_tenant_is_not_told_its_name() -> None:
    large = replace(job("large", gpus_per_worker=8), tenant="other")
    decisions = first_come_first_served([large, job("small")], [], lambda: Capacity(cpus=8, gpus=8), NOW)
    assert [type(decision) for decision in decisions] == [Start, Start]
    running = [job("r", gpus_per_worker=1, workers=1)]
    decisions = first_come_first_served([large, job("small")], running, lambda: Capacity(cpus=8, gpus=8), NOW)
    assert decisions[1] == Wait(job_id="small", reason="waits behind a job of another tenant")


def test_a_job_that_the_cluster_could_never_hold_delays_nobody() -> None:
    decisions = first_come_first_served(
        [job("huge", gpus_per_worker=9), job("small")], [], lambda: Capacity(cpus=2, gpus=8), NOW
    )
    assert decisions == [
        Wait(job_id="huge", reason="needs 1 CPUs and 9 GPUs; the cluster has 2 CPUs and 8 GPUs"),
        Start(job_id="small", workers=1),
    ]


@given(
    needs=st.lists(
        st.tuples(st.sampled_from([0.0, 0.1, 0.5, 1.0, 3.0]), st.integers(1, 4), st.integers(0, 4)), max_size=8
    ),
    cpus=st.integers(0, 12),
)
def test_what_starts_fits_into_the_cluster(needs: list[tuple[float, int, int]], cpus: int) -> None:
    jobs = {
        f"j{n}": job(f"j{n}", cpus_per_worker=need, min_workers=low, max_workers=low + more)
        for n, (need, low, more) in enumerate(needs)
    }
    decisions = first_come_first_served(list(jobs.values()), [], lambda: Capacity(cpus=cpus), NOW)
    assert [decision.job_id for decision in decisions] == list(jobs)
    started = [decision for decision in decisions if isinstance(decision, Start)]
    assert sum(jobs[each.job_id].resources.cpus_per_worker * each.workers for each in started) <= cpus + 1e-6
    for each in started:
        need = jobs[each.job_id].resources
        assert need.min_workers <= each.workers <= need.max_workers


ACTIONS = {
    reconcile.RecordStarted: Action.STARTED,
    reconcile.RecordFinished: Action.FINISH,
    reconcile.RecordFailed: Action.RETRY,
    reconcile.RecordStopped: Action.STOPPED,
    reconcile.AbandonRun: Action.STOPPED,
}


@pytest.mark.parametrize("state", sorted(ACTIVE))
@pytest.mark.parametrize("run_state", [None, *RunState])
@pytest.mark.parametrize("handle", [None, "handle"])
def test_every_step_is_legal_in_the_state_of_its_job(
    state: State, run_state: RunState | None, handle: str | None
) -> None:
    status = None if run_state is None else RunStatus(state=run_state)
    step = next_step(job("a", state=state, handle=handle), handle or ("found" if status else None), status)
    if (action := ACTIONS.get(type(step))) is not None:
        assert is_legal(JobKind.TRAIN, state, action)
    if state.leaving:
        # Never started anew, and not left alone.
        assert step is not None and not isinstance(step, reconcile.StartRun)
    if step is None:
        assert (state, run_state) == (State.RUNNING, RunState.RUNNING)


def test_a_run_that_its_runner_has_forgotten_is_tried_again() -> None:
    step = next_step(job("a", state=State.RUNNING, handle="a.1"), "a.1", None)
    assert step == reconcile.RecordFailed(error="The ray runner does not know a.1 any more.", retryable=True)


def test_a_run_that_somebody_else_stopped_is_not_started_again_by_itself() -> None:
    step = next_step(job("a", state=State.RUNNING, handle="a.1"), "a.1", RunStatus(state=RunState.STOPPED))
    assert step == reconcile.PauseStopped()
    export = replace(job("a", state=State.RUNNING, handle="a.1"), kind=JobKind.EXPORT)
    step = next_step(export, "a.1", RunStatus(state=RunState.STOPPED))
    assert step == reconcile.RecordFailed(error="a.1 was stopped from outside.", retryable=False)

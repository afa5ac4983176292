"""The restart policy decides by the outcome of an attempt and the history of the run, without Ray."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tandem.config import SpikeConfig
from tandem.errors import DataError, JobError, JobStopped
from tandem.observability.events import LossSpikeReport
from tandem.train.supervision.history import RunHistory
from tandem.train.supervision.outcome import Fault, Faulted, NoCapacity, Refused, StoppedEarly
from tandem.train.supervision.policy import Resize, Restart, SkipRows, Stop, decide, updated_history

HISTORY = RunHistory(max_failures=2, spike=SpikeConfig(max_rollbacks=1), last_step=17, checkpoint_step=10)
DIED = Faulted(Fault(kind="worker", reason="worker 1 died.", rank=1))
SPIKED = StoppedEarly(step=17, reason="a loss that jumped", spike=LossSpikeReport(rows=136, loss=9.0, median=2.0))


def history(**changes: Any) -> RunHistory:
    return replace(HISTORY, **changes)


def test_a_fault_restarts_the_workers():
    assert decide(DIED, HISTORY) == Restart(DIED.fault, failures=1)


def test_faults_in_a_row_without_a_new_checkpoint_stop_the_run_after_max_failures():
    now = HISTORY
    for failures in (1, 2):
        decision = decide(DIED, now)
        assert decision == Restart(DIED.fault, failures)
        now = updated_history(decision, now)
    decision = decide(DIED, now)
    assert isinstance(decision, Stop) and decision.fault == DIED.fault
    assert isinstance(decision.error, JobError)
    assert "failed 3 times without a new checkpoint in between" in str(decision.error)
    assert "worker 1 died." in str(decision.error) and "resume from step 10" in str(decision.error)


def test_a_new_checkpoint_resets_the_count_of_failures():
    now = updated_history(decide(DIED, HISTORY), HISTORY)
    now = updated_history(decide(DIED, now), now)
    assert decide(DIED, replace(now, checkpoint_step=11)) == Restart(DIED.fault, failures=1)


def test_the_error_without_a_checkpoint_says_that_the_run_begins_from_the_start():
    decision = decide(DIED, history(checkpoint_step=None, max_failures=0))
    assert isinstance(decision, Stop) and "resume from the start" in str(decision.error)


def test_a_stop_request_stops_the_run_whatever_the_outcome():
    for outcome in (DIED, SPIKED, NoCapacity(2), StoppedEarly(step=17, reason="the job was told to stop")):
        decision = decide(outcome, history(stop_requested=True))
        assert isinstance(decision, Stop) and isinstance(decision.error, JobStopped) and decision.fault is None
        assert "stopped after step 17. The same command resumes it from step 10" in str(decision.error)


@pytest.mark.parametrize(("name", "kind"), [("DataError", DataError), ("ValueError", JobError)])
def test_an_error_that_would_recur_stops_the_run_with_that_error(name: str, kind: type[Exception]):
    decision = decide(Refused(error=name, message="no rows"), history(stop_requested=True))
    assert isinstance(decision, Stop) and type(decision.error) is kind and str(decision.error) == "no rows"


def test_workers_that_stopped_for_capacity_are_resized():
    outcome = StoppedEarly(step=17, reason="there is room for more workers")
    assert decide(outcome, HISTORY) == Resize(reason="there is room for more workers")


def test_missing_capacity_is_announced_once_until_the_workers_train_again():
    first = decide(NoCapacity(4), HISTORY)
    assert first == Resize(reason="there was no room for 4 workers", waiting=True, announce=True)
    waiting = updated_history(first, HISTORY)
    assert decide(NoCapacity(4), waiting) == replace(first, announce=False)
    trained = updated_history(Resize(reason="there is room for more workers"), waiting)
    assert decide(NoCapacity(4), trained) == first


def test_missing_capacity_is_no_failure():
    now = HISTORY
    for _ in range(5):
        now = updated_history(decide(NoCapacity(4), now), now)
    assert now.failures == 0


def test_a_loss_spike_skips_the_rows_since_the_checkpoint():
    decision = decide(SPIKED, history(checkpoint_rows=80))
    assert isinstance(decision, SkipRows) and (decision.rows, decision.at_step) == ((80, 136), 17)
    assert decision.reason == "the loss jumped to 9 in step 17, from 2: rows 80 to 135 are skipped"
    assert updated_history(decision, HISTORY).skipped_rows == ((80, 136),)


def test_spikes_stop_the_run_after_max_rollbacks():
    decision = decide(SPIKED, history(skipped_rows=((0, 8),)))
    assert isinstance(decision, Stop) and isinstance(decision.error, JobError)
    assert "gone back 1 times before" in str(decision.error) and "max_rollbacks (1)" in str(decision.error)

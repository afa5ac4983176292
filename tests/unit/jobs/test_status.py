"""The status of a job is folded from its events."""

from __future__ import annotations

from tandem.jobs.status import WARNINGS_SHOWN, fold_events
from tandem.observability.events import (
    CheckpointSaved,
    Failed,
    FaultDetected,
    Notice,
    RegistrationFailed,
    Resized,
    Restarted,
    Started,
    Step,
)


def test_steps_between_the_checkpoint_and_the_fault_are_repeated_steps():
    status = fold_events(
        [Started(), Step(step=14), Restarted(resumed_from=10), Step(step=12), Started(resumed_from=11)]
    )
    assert (status.restarts, status.repeated_steps) == (2, 4 + 1)


def test_the_first_start_is_no_restart():
    assert fold_events([Started(workers=2, layout="ddp")]).restarts == 0


def test_a_start_after_an_end_reopens_the_job():
    assert isinstance(fold_events([Started(), Failed(error="x"), Started()]).last_end, Started)


def test_the_newest_values_win():
    status = fold_events(
        [Started(workers=4, layout="a"), CheckpointSaved(step=5, time=1.0), CheckpointSaved(step=9, time=2.0),
         Resized(from_workers=4, to_workers=2, layout="b")]
    )  # fmt: skip
    assert (status.workers, status.layout, status.checkpoint, status.checkpoint_at) == (2, "b", 9, 2.0)


def test_faults_are_counted_by_kind():
    status = fold_events([FaultDetected(kind="node"), FaultDetected(kind="worker"), FaultDetected(kind="node")])
    assert status.faults == {"node": 2, "worker": 1}


def test_the_newest_warnings_are_kept():
    notices = [Notice(message=str(n)) for n in range(9)]
    status = fold_events([*notices, RegistrationFailed(error="no registry")])
    assert status.warnings == ("5", "6", "7", "8", "no registry") and len(status.warnings) == WARNINGS_SHOWN

"""Hung, failed and slow ranks are found in the heartbeats of all ranks."""

from __future__ import annotations

import threading
from dataclasses import replace

from tandem.config import FaultsConfig
from tandem.train.supervision.health import find_culprit, find_hang, find_slow_ranks
from tandem.train.supervision.heartbeat import Heartbeat, HeartbeatThread
from tandem.train.supervision.processes import training_thread

FAULTS = FaultsConfig(heartbeat_s=1, hang_after_s=10, stuck_after_s=100)


def heartbeat(rank: int, **changes: float | str) -> Heartbeat:
    return replace(
        Heartbeat(rank=rank, node="n", pid=100 + rank, process_started_at=0.0, step=7, phase="step"), **changes
    )


def test_the_rank_without_heartbeats_is_hung_and_not_the_ranks_that_wait_for_it():
    found = find_hang(
        [heartbeat(0, since_progress_s=11), heartbeat(1, since_heartbeat_s=11, since_progress_s=11)], FAULTS
    )
    assert found is not None and found.ranks == (1,)
    assert "rank 1 (pid 101, step, step 7) sent no heartbeat for 11 s" in found.reason


def test_all_ranks_are_hung_if_all_send_heartbeats_and_none_makes_progress():
    assert find_hang([heartbeat(0, since_progress_s=101), heartbeat(1, since_progress_s=99)], FAULTS) is None
    found = find_hang([heartbeat(0, since_progress_s=101), heartbeat(1, since_progress_s=101)], FAULTS)
    assert found is not None and found.ranks == (0, 1) and "none of 2 ranks" in found.reason


def test_a_rank_that_is_done_needs_no_heartbeats():
    assert find_hang([heartbeat(0), heartbeat(1, since_heartbeat_s=1000, phase="done")], FAULTS) is None


def test_the_culprit_died_or_reported_no_error_or_reported_its_error_first():
    lost = {0: "connection closed"}
    told = heartbeat(0, phase="done", error="connection closed", since_heartbeat_s=1)
    assert find_culprit(lost, [], [told, heartbeat(1)])[0] == 1
    assert (
        "(101) ended without an error message, after its heartbeat in step 7; worker 0 reported: connection closed"
        in find_culprit(lost, [], [told, heartbeat(1)])[1]
    )
    # One that failed by itself was heard before those that lost it.
    assert find_culprit(lost, [], [told, heartbeat(1, phase="done", error="no memory", since_heartbeat_s=2)]) == (
        1,
        "no memory",
    )
    # What Ray knows of a death counts more than what others say of it.
    assert find_culprit({0: "connection closed", 2: "killed"}, [2], [told, heartbeat(1), heartbeat(2)]) == (2, "killed")
    assert find_culprit(lost, [], []) == (0, "connection closed")


def test_a_slow_rank_is_reported_with_the_task_that_is_slow():
    found = find_slow_ranks(
        [heartbeat(0, compute_s=0.010), heartbeat(1, compute_s=0.021), heartbeat(2, compute_s=0.011)], 1.5
    )
    assert list(found) == [1] and "21.0 ms to compute the same, 2.0 times" in found[1]
    found = find_slow_ranks([heartbeat(0, data_s=0.2), heartbeat(1, data_s=0.4)], 1.5)
    assert list(found) == [1] and "for its rows" in found[1]


def test_ranks_without_measurements_are_not_slow():
    assert find_slow_ranks([heartbeat(0, compute_s=0.010), heartbeat(1)], 1.5) == {}
    assert find_slow_ranks([heartbeat(0, data_s=0.001), heartbeat(1, data_s=0.004)], 1.5) == {}


def test_the_heartbeat_thread_reads_the_stack_of_the_training_thread():
    heartbeat_thread = HeartbeatThread(None, rank=0, node="n", every_s=1)
    found: list[str] = []
    other = threading.Thread(target=lambda: found.append(heartbeat_thread.stack()))
    other.start()
    other.join()
    assert "test_the_heartbeat_thread_reads_the_stack_of_the_training_thread" in found[0]


def test_the_training_thread_is_found_in_the_output_of_py_spy():
    dumped = (
        'Process 1: x\n\nThread 2 (idle): "M"\n    a (b.py:1)\nThread 3 (idle): "T"\n    c (tandem/train/worker.py:9)\n'
    )
    assert training_thread(dumped) == 'Thread 3 (idle): "T"\n    c (tandem/train/worker.py:9)'
    assert training_thread("Process 1: x") == "Process 1: x"

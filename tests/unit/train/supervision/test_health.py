"""Which rank is to blame when training stands still, and which one is slow."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from tandem.config import (
    DataConfig,
    FaultsConfig,
    ParallelismConfig,
    TrainConfig,
    check_elastic,
    with_workers,
    worker_counts,
)
from tandem.config.load import from_dict, to_dict
from tandem.errors import ConfigError, JobError, StorageError
from tandem.observability.journal import Journal
from tandem.train.anomalies import NonFiniteGuard, SpikeDetector
from tandem.train.storage_retry import backoff_delays, retry_storage, wait_for_storage
from tandem.train.supervision.capacity import Node, max_workers
from tandem.train.supervision.health import Heartbeat, HeartbeatThread, find_culprit, find_hang, find_slow_ranks
from tandem.train.supervision.processes import training_thread

FAULTS = FaultsConfig(heartbeat_s=1, hang_after_s=10, stuck_after_s=100)


def heartbeat(rank: int, **changes: float | str) -> Heartbeat:
    return replace(
        Heartbeat(rank=rank, node="n", pid=100 + rank, process_started_at=0.0, step=7, phase="step"), **changes
    )


def test_the_rank_that_gives_no_sign_is_to_blame_and_not_those_that_wait_for_it():
    found = find_hang(
        [heartbeat(0, since_progress_s=11), heartbeat(1, since_heartbeat_s=11, since_progress_s=11)], FAULTS
    )
    assert found is not None and found.ranks == (1,)
    assert "rank 1 (pid 101, step, step 7) gave no sign of life for 11 s" in found.why


def test_ranks_that_all_live_and_get_nothing_done_are_all_stuck():
    assert find_hang([heartbeat(0, since_progress_s=101), heartbeat(1, since_progress_s=99)], FAULTS) is None
    found = find_hang([heartbeat(0, since_progress_s=101), heartbeat(1, since_progress_s=101)], FAULTS)
    assert found is not None and found.ranks == (0, 1) and "none of 2 ranks" in found.why


def test_a_rank_that_is_done_may_be_silent():
    assert find_hang([heartbeat(0), heartbeat(1, since_heartbeat_s=1000, phase="done")], FAULTS) is None


def test_the_rank_behind_a_failure_is_the_one_that_said_nothing_or_spoke_first():
    lost = {0: "connection closed"}
    told = heartbeat(0, phase="done", error="connection closed", since_heartbeat_s=1)
    assert find_culprit(lost, [], [told, heartbeat(1)])[0] == 1
    assert (
        "(101) ended without a word, after its sign of life in step 7; worker 0 said: connection closed"
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


def test_a_slow_rank_is_named_with_what_it_is_slow_at():
    found = find_slow_ranks(
        [heartbeat(0, compute_s=0.010), heartbeat(1, compute_s=0.021), heartbeat(2, compute_s=0.011)], 1.5
    )
    assert list(found) == [1] and "21.0 ms to compute the same, 2.0 times" in found[1]
    found = find_slow_ranks([heartbeat(0, data_s=0.2), heartbeat(1, data_s=0.4)], 1.5)
    assert list(found) == [1] and "for its rows" in found[1]


def test_ranks_that_have_not_been_measured_yet_are_not_slow():
    assert find_slow_ranks([heartbeat(0, compute_s=0.010), heartbeat(1)], 1.5) == {}
    assert find_slow_ranks([heartbeat(0, data_s=0.001), heartbeat(1, data_s=0.004)], 1.5) == {}


def test_a_pulse_says_where_the_thread_that_trains_is():
    heartbeat_thread = HeartbeatThread(None, rank=0, node="n", every_s=1)
    found: list[str] = []
    other = threading.Thread(target=lambda: found.append(heartbeat_thread.stack()))
    other.start()
    other.join()
    assert "test_a_pulse_says_where_the_thread_that_trains_is" in found[0]


def test_of_a_dumped_process_the_training_thread_is_shown():
    dumped = (
        'Process 1: x\n\nThread 2 (idle): "M"\n    a (b.py:1)\nThread 3 (idle): "T"\n    c (tandem/train/worker.py:9)\n'
    )
    assert training_thread(dumped) == 'Thread 3 (idle): "T"\n    c (tandem/train/worker.py:9)'
    assert training_thread("Process 1: x") == "Process 1: x"


# ---- how many workers ------------------------------------------------------------------------------------------------


def elastic(least: int, most: int, *, batch_size: int = 8, accumulate: int = 1, **degrees: int) -> TrainConfig:
    parallel = ParallelismConfig(workers=most, min_workers=least, **degrees)
    return TrainConfig(
        name="a", data=DataConfig(path="x"), parallel=parallel, batch_size=batch_size, accumulate=accumulate
    )


def test_fewer_workers_take_the_same_batch_in_micro_batches_of_the_same_size():
    config = elastic(1, 4, batch_size=8, accumulate=2)
    assert worker_counts(config) == [1, 2, 4]
    assert [(n, with_workers(config, n).accumulate) for n in worker_counts(config)] == [(1, 8), (2, 4), (4, 2)]
    assert all(with_workers(config, n).batch_size == 8 for n in worker_counts(config))


def test_model_parallel_groups_stay_whole():
    assert worker_counts(elastic(2, 8, tensor=2)) == [2, 4, 8]
    assert worker_counts(elastic(4, 8, batch_size=24, tensor=2, pipeline=2, accumulate=4)) == [4, 8]


def test_a_least_number_that_cannot_work_is_refused_with_those_that_can():
    with pytest.raises(
        ConfigError, match=r"min is 3, but each worker of a group of 2 is needed. Set it to one of 2, 4"
    ):
        check_elastic(elastic(3, 4, tensor=2))
    with pytest.raises(ConfigError, match=r"min is 3, but batch_size \(8\) cannot be shared out"):
        check_elastic(elastic(3, 4))


def test_the_range_is_written_as_a_mapping_and_read_back():
    values = {"name": "a", "data": {"path": "x"}, "parallel": {"workers": {"min": 2, "max": 4}}}
    config = from_dict(TrainConfig, values)
    assert (config.parallel.workers, config.parallel.min_workers) == (4, 2)
    assert from_dict(TrainConfig, to_dict(config)) == config
    with pytest.raises(ConfigError, match="both of min and max"):
        from_dict(TrainConfig, {**values, "parallel": {"workers": {"min": 2}}})


def test_workers_are_counted_where_there_is_room_for_whole_tensor_groups():
    config = elastic(2, 8, tensor=2)
    assert max_workers([Node(id="a", cpus=3), Node(id="b", cpus=3)], config) == 4
    assert max_workers([Node(id="a", cpus=3), Node(id="b", cpus=3, draining=True)], config) == 2
    assert max_workers([Node(id="a", cpus=1.5), Node(id="b", cpus=1.5)], config) == 0
    # Reading the data needs a quarter of a CPU beside them.
    assert max_workers([Node(id="a", cpus=4)], elastic(1, 4)) == 2
    assert max_workers([Node(id="a", cpus=1)], elastic(1, 4), {"a": 3}) == 2
    assert max_workers([Node(id="a", cpus=1.25)], elastic(1, 4), {"a": 3}) == 4


# ---- bad numbers -----------------------------------------------------------------------------------------------------


def test_steps_that_are_not_finite_end_the_run_only_in_a_row_and_their_rows_are_named():
    counted = NonFiniteGuard(2)
    assert counted.record_skipped(5, 32, 8, []).in_a_row == 1
    counted.check()
    counted.record_taken()
    counted.record_skipped(7, 48, 8, [50, 51])
    counted.check()
    assert counted.record_skipped(8, 56, 8, []).in_a_row == 2
    with pytest.raises(
        JobError, match=r"2 steps in a row.*step 7 \(rows 48 to 55; .* among 50, 51\); step 8 \(rows 56 to 63\)"
    ):
        counted.check()


def test_a_loss_jumps_only_against_enough_others():
    from tandem.config import SpikeConfig

    found = SpikeDetector(SpikeConfig(factor=2, window=3))
    assert [found.median_exceeded_by(loss) for loss in (9.0, 1.0, 1.0, 1.9)] == [None] * 4
    assert found.median_exceeded_by(2.1) == 1.0
    # It is not among those that the next is held to.
    assert found.median_exceeded_by(2.1) == 1.0


# ---- storage ---------------------------------------------------------------------------------------------------------


def test_storage_that_comes_back_is_waited_for():
    tries, slept, told = [0], list[float](), list[str]()

    def write() -> str:
        tries[0] += 1
        if tries[0] < 4:
            raise StorageError("gone.")
        return "written"

    assert retry_storage(write, limit_s=100, give_up=lambda: False, tell=told.append, sleep=slept.append) == "written"
    assert slept == [1, 2, 4] and told == ["gone. It is tried again for 100 s."]


def test_storage_that_stays_away_ends_the_run_after_the_stated_time():
    def refuse() -> None:
        raise StorageError("gone.")

    slept: list[float] = []
    with pytest.raises(StorageError):
        retry_storage(refuse, limit_s=100, give_up=lambda: False, tell=lambda message: None, sleep=slept.append)
    assert sum(slept) == 100 and max(slept) == 30 and list(backoff_delays(0)) == []
    with pytest.raises(StorageError):
        retry_storage(refuse, limit_s=100, give_up=lambda: True, tell=lambda message: None, sleep=slept.append)
    assert sum(slept) == 100


def test_a_run_does_not_begin_anew_because_its_checkpoints_are_away(tmp_path: Path):
    journal, root = Journal(tmp_path / "events.jsonl"), tmp_path / "checkpoints"
    wait_for_storage(root, journal, 0)
    journal.write({"event": "checkpoint", "step": 40, "path": str(root)})
    with pytest.raises(StorageError, match="is not there, though a checkpoint of step 40 was written"):
        wait_for_storage(root, journal, 0)
    wait_for_storage(root, journal, 5, sleep=lambda seconds: root.mkdir())

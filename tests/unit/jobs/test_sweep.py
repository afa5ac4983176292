"""The trials of a sweep are ordinary jobs, all checked before one starts."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tandem.config import DataConfig, ParallelismConfig, TrainConfig
from tandem.data.build import build_dataset
from tandem.errors import ClusterError, ConfigError
from tandem.jobs.folder import JobFolder
from tandem.jobs.prepare import prepare
from tandem.jobs.sweep import SweepFolder, find_sweep, prepare_sweep, score, trials_at_once
from tandem.jobs.sweep_result import best_of, finish_if_over, waiting_trials
from tandem.jobs.tune import reported_metrics
from tandem.observability.events import Evaluated, Failed, Step, SweepFinished
from tandem.observability.journal import Journal
from tandem.sdk import slurm_sweep

RATES = [{"optimizer.learning_rate": "1e-3"}, {"optimizer.learning_rate": "3e-3"}]


@pytest.fixture
def values(tandem_home: Path) -> dict[str, Any]:
    source = tandem_home / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": f"a line of text {i} " * 30}) + "\n" for i in range(40)))
    build_dataset(str(source), tandem_home / "data" / "texts", vocab_size=300)
    return {"name": "m", "data": {"path": "texts", "sequence_length": 64}}


def sweep_of(values: dict[str, Any], trials: list[dict[str, str]], **changes: Any) -> SweepFolder:
    return prepare_sweep(values, trials, **{"metric": "loss", "parallel": 2, **changes})


def finish(job: JobFolder, model: str | None) -> None:
    job.export.mkdir(exist_ok=True)
    (job.path / "events.jsonl").write_text(json.dumps({"event": "finished", "model": model, "loss": 1.0}) + "\n")


def test_a_trial_is_the_job_of_its_values_but_is_not_registered(values: dict[str, Any]):
    sweep = sweep_of(values, RATES)
    first, second = sweep.jobs()
    assert (first.config().register, second.config().optimizer.learning_rate) == (False, 0.003)
    by_hand = first.config()
    assert prepare(replace(by_hand, register=True)) == first
    assert sweep.plan().trials == tuple(RATES)
    assert sweep.plan().register


def test_a_finished_trial_is_unfinished_if_it_is_to_be_registered(values: dict[str, Any]):
    job = sweep_of(values, RATES).jobs()[0]
    finish(job, None)
    assert job.finished()
    prepare(replace(job.config(), register=True))
    assert job.finished() is None
    finish(job, "m@1")
    assert job.finished()


def test_the_same_sweep_is_the_same_folder_and_another_metric_another(values: dict[str, Any]):
    first = sweep_of(values, RATES)
    assert sweep_of(values, RATES, parallel=1) == first
    assert sweep_of(values, RATES, metric="mfu") != first
    assert find_sweep(first.id) == first
    assert find_sweep("m") is None, "a job's id starts so too"


def test_trials_that_differ_only_in_layout_are_separate_jobs(values: dict[str, Any]):
    jobs = sweep_of(values, [{"parallel.workers": "1"}, {"parallel.workers": "2"}], metric="tokens_per_s").jobs()
    assert [job.config().parallel.workers for job in jobs] == [1, 2]
    read = sweep_of(values, [{"data.readers": "0.25"}, {"data.readers": "0.5"}]).jobs()
    assert [job.config().data.readers for job in read] == [0.25, 0.5]


def test_nothing_is_written_if_one_trial_is_invalid(values: dict[str, Any], tandem_home: Path):
    with pytest.raises(
        ConfigError, match=r"The trial optimizer.learnin_rate=1 cannot be: .*Did you mean 'learning_rate'"
    ):
        sweep_of(values, [*RATES, {"optimizer.learnin_rate": "1"}])
    with pytest.raises(ConfigError, match="--metric is 'los'.*Did you mean 'loss'"):
        sweep_of(values, RATES, metric="los")
    with pytest.raises(ConfigError, match="--parallel is 0"):
        sweep_of(values, RATES, parallel=0)
    assert not (tandem_home / "jobs").exists()
    assert not (tandem_home / "sweeps").exists()


def test_trials_of_equal_jobs_are_refused(values: dict[str, Any]):
    with pytest.raises(ConfigError, match="are the same job"):
        sweep_of(values, [{"seed": "1"}, {"seed": "0x1"}])


def test_a_sweep_is_done_while_its_best_trial_exists(values: dict[str, Any]):
    sweep = sweep_of(values, RATES)
    assert sweep.finished() is None
    end = {"event": "swept", "best": 1, "score": 1.0, "job": sweep.jobs()[0].id}
    (sweep.path / "events.jsonl").write_text(json.dumps(end) + "\n")
    assert sweep.finished() is None
    finish(sweep.jobs()[0], None)
    assert sweep.finished() == SweepFinished(best=1, score=1.0, job=sweep.jobs()[0].id)


def test_a_score_is_the_last_loss_or_the_median_speed():
    events = [
        Step(step=1, loss=3.0, tokens_per_s=10.0),
        Evaluated(step=1, measured={"loss": 2.5, "perplexity": 12.0}),
        Step(step=2, loss=2.0, tokens_per_s=900.0),
        Step(step=3, loss=2.1, tokens_per_s=800.0),
    ]
    assert score("loss", events) == 2.1
    assert score("evaluation_loss", events) == 2.5
    assert score("perplexity", events) == 12.0
    assert score("tokens_per_s", events) == 800.0
    assert score("mfu", events) is None
    assert score("loss", [Step(step=1, loss=math.nan)]) is None


def test_trials_that_run_apart_are_compared_when_the_last_is_over(values: dict[str, Any]):
    sweep = sweep_of({**values, "register": False}, [*RATES, {"optimizer.learning_rate": "1"}])
    first, second, third = sweep.jobs()
    # What failed before the sweep was started again is not over.
    Journal(third.path / "events.jsonl").write(Failed(error="an earlier run"))
    # Times of events are in milliseconds.
    time.sleep(0.01)
    slurm_sweep.begin(sweep, at_once=2)
    assert waiting_trials(sweep) == [1, 2, 3] and finish_if_over(sweep) is None
    for job, loss in ((first, 2.0), (second, 1.0)):
        finish(job, None)
        Journal(job.path / "events.jsonl").write(Step(step=1, loss=loss))
    assert waiting_trials(sweep) == [3] and finish_if_over(sweep) is None
    Journal(third.path / "events.jsonl").write(Failed(error="it diverged"))
    end = finish_if_over(sweep)
    assert end is not None and (end.best, end.score, end.job) == (2, 1.0, second.id)
    assert sweep.finished() == finish_if_over(sweep) and len(sweep.typed_events()) == 2


def config(**parallel: float) -> TrainConfig:
    return TrainConfig(name="a", data=DataConfig(path="x"), parallel=ParallelismConfig(**parallel), batch_size=24)


def test_concurrent_trials_are_limited_by_the_largest_trial():
    two = [config(workers=1), config(workers=2)]
    assert trials_at_once(two, {"CPU": 4.51}, 8) == 2
    assert trials_at_once(two, {"CPU": 4.5}, 8) == 1
    assert trials_at_once(two, {"CPU": 64.0}, 3) == 3
    assert trials_at_once([config(workers=2, gpus_per_worker=1)], {"CPU": 64.0, "GPU": 5.0}, 8) == 2
    with pytest.raises(ClusterError, match="needs 2.251 CPU, and the whole cluster has 2"):
        trials_at_once(two, {"CPU": 2.0}, 8)


def test_the_best_is_the_first_of_the_best_scores():
    assert best_of("loss", [None, 2.0, 1.0, 1.0]) == 2
    assert best_of("tokens_per_s", [0.0, None, 5.0]) == 2
    assert best_of("loss", [None, None]) is None


def test_a_trial_reports_only_numbers():
    newest = {
        Step: Step(time=1.0, step=3, loss=2.0),
        Evaluated: Evaluated(step=3, measured={"loss": 2.5, "perplexity": 12.0}),
    }
    numbers = reported_metrics(newest)
    assert numbers == {"step": 3, "steps": 0, "loss": 2.0, "evaluation_loss": 2.5, "perplexity": 12.0}
    assert reported_metrics({}) == {}

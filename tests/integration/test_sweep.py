"""Sweeps on a real cluster: concurrent trials as ordinary jobs, and registration of the best one."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest
import yaml
from commands import started, tandem

from tandem.cluster.local import LocalCluster
from tandem.data.build import build_dataset
from tandem.jobs.client import JobClient
from tandem.jobs.folder import JobState
from tandem.jobs.sweep import SweepFolder, sweep_folders
from tandem.observability.events import Finished, Step
from tandem.registry import Registry


@pytest.fixture(scope="module")
def config(session_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "texts.jsonl").write_text(
        "".join(json.dumps({"text": f"line {i} of a text. " * 20}) + "\n" for i in range(100))
    )
    build_dataset(str(folder / "texts.jsonl"), session_home / "data" / "sweep-text", vocab_size=300)
    path = folder / "config.yaml"
    shape = {"hidden_size": 32, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "intermediate_size": 64}
    path.write_text(
        yaml.safe_dump(
            {
                "name": "swept", "data": {"path": "sweep-text", "sequence_length": 32}, "model": shape, "steps": 20,
                "batch_size": 4, "optimizer": {"warmup_steps": 0},
            }
        )
    )  # fmt: skip
    return path


def sweep(config: Path, home: Path, *arguments: str) -> tuple[int, str]:
    done = tandem("train", "sweep", "--config", str(config), *arguments, home=home)
    return done.returncode, done.stdout


def newest() -> SweepFolder:
    return next(sweep_folders())


@pytest.mark.slow  # two jobs
def test_two_trials_run_as_jobs_and_the_better_one_is_registered_under_the_configs_name(
    cluster: LocalCluster, session_home: Path, config: Path
):
    # The second rate is so small that nothing is learned.
    arguments = ("--param", "optimizer.learning_rate=1e-2,1e-9", "--parallel", "2")
    status, said = sweep(config, session_home, *arguments)
    assert status == 0, said
    assert "2 of 2 at once" in said
    assert "The best is trial 1" in said and "--set optimizer.learning_rate=1e-2" in said
    assert "swept@1" in said and "tandem serve up swept\n" in said
    found = newest()
    good, bad = found.jobs()
    assert good.finished() and bad.finished()
    losses = [job.last(Step).loss for job in (good, bad)]
    assert losses[0] < losses[1] - 0.3
    assert bad.last(Finished).model is None, "a trial that did not win is not registered"
    registry = Registry.open()
    assert [r.id for r in registry.list(all_versions=True) if r.name.startswith("swept")] == ["swept@1"]
    record = registry.resolve("swept")
    assert (record.path, record.lineage["job"], record.lineage["loss"]) == (good.export, good.id, losses[0])
    # Both had their turn before one was done.
    turns = [(e["trial"], e["state"]) for e in found.events() if e["event"] == "trial"]
    begun = [turns.index((trial, "pending")) for trial in (1, 2)]
    assert max(begun) < min(turns.index((trial, "finished")) for trial in (1, 2)), turns

    # Trials are jobs like any other.
    status_of_trial = json.loads(tandem("train", "status", bad.id, "--json", home=session_home).stdout)
    assert (status_of_trial["state"], status_of_trial["step"]) == ("finished", 20)
    table = tandem("train", "status", found.id, home=session_home).stdout
    assert "learning_rate" in table and "★ 1" in table and "20/20" in table

    # The same sweep again is done already.
    events = (found.path / "events.jsonl").read_text()
    status, said = sweep(config, session_home, *arguments)
    assert status == 0 and "The best is trial 1" in said
    assert (found.path / "events.jsonl").read_text() == events


def test_an_unknown_key_starts_nothing(cluster: LocalCluster, session_home: Path, config: Path):
    before = set(session_home.glob("jobs/*"))
    status, said = sweep(config, session_home, "--param", "optimizer.learnin_rate=1e-2,1e-3")
    assert status == 2
    assert "Did you mean 'learning_rate'" in said
    assert set(session_home.glob("jobs/*")) == before


@pytest.mark.slow  # two jobs
def test_a_trial_that_fails_does_not_end_the_sweep(
    cluster: LocalCluster, session_home: Path, config: Path, tmp_path: Path
):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        "".join(json.dumps({"prompt": f"What is {n}?", "answer": f"It is {n}."}) + "\n" for n in range(32))
    )
    tokenizer = session_home / "data" / "sweep-text" / "tokenizer"
    build_dataset(str(pairs), session_home / "data" / "sweep-pairs", tokenizer=tokenizer)
    # Only the job itself finds out that no answer fits into 8 tokens.
    status, said = sweep(
        config, session_home, "--param", "data.sequence_length=8,64", "--set", "data.path=sweep-pairs", "--set",
        "name=half", "--set", "steps=5", "--parallel", "1",
    )  # fmt: skip
    assert status == 0, said
    assert "1 of 2 at once" in said
    assert "trial 1 (data.sequence_length=8) failed" in said
    assert "The best is trial 2" in said and "half@1" in said


@pytest.mark.slow  # two jobs
def test_a_stopped_sweep_leaves_no_trial_running(
    cluster: LocalCluster, session_home: Path, config: Path, tmp_path: Path
):
    command = [
        sys.executable, "-m", "tandem", "train", "sweep", "--config", str(config), "--param", "seed=1,2", "--set",
        "steps=100000", "--set", "name=long",
    ]  # fmt: skip
    client = JobClient(cluster)
    with started(command, home=session_home, log=tmp_path / "log", PYTHONUNBUFFERED="1") as running:
        running.wait_for(
            lambda: any(job.last(Step) for job in newest().jobs()) if newest().id.startswith("long") else False
        )
        assert running.interrupt(signal.SIGINT) == 130, "the cluster is not the command's own: it lets go"
    found = newest()
    assert client.running(found)
    stopped = tandem("train", "stop", found.id, home=session_home)
    assert stopped.returncode == 0, stopped.stdout
    assert client.running(found) is None
    sent = [job.submissions()[-1]["id"] for job in found.jobs() if job.submissions()]
    assert sent and all(client.state(submission) is JobState.STOPPED for submission in sent)

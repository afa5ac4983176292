"""Fault tolerance of training runs: real processes are killed; the losses equal those of an undisturbed run."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import stored_metrics
from drivers import Driver, losses, write_job

from tandem.checkpoint import folders
from tandem.cluster.local import LocalCluster
from tandem.data.build import build_dataset
from tandem.data.tokenize import TextEncoder
from tandem.jobs.client import JobClient
from tandem.jobs.folder import JobFolder, JobState
from tandem.observability import codec
from tandem.settings import child_environment

STEPS, EVERY = 80, 10

# Written at once: what a fault costs is then counted from the step that was due, and not from when the disk was done.
RUN = {"steps": STEPS, "checkpoint": {"every_steps": EVERY, "asynchronous": False}}

FAST = {"heartbeat_s": 0.5, "hang_after_s": 12.0}


RARE = "~"
"""Ends few lines of the text."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults-home")
    text = folder / "text.txt"
    text.write_text(
        "".join(
            f"Line {n}: the quick brown fox jumps over {n * 7 % 13} lazy dogs{RARE if n % 40 == 7 else '.'}\n\n"
            for n in range(400)
        )
    )
    build_dataset(str(text), folder / "data" / "text", vocab_size=300)
    return folder


@pytest.fixture
def run(home: Path, ray_cluster: LocalCluster) -> Iterator[Callable[..., Driver]]:
    drivers: list[Driver] = []

    def start(name: str, *, module: str = "tandem.train.launch", **changes: Any) -> Driver:
        drivers.append(Driver(write_job(home, name, **{**RUN, **changes}), home, ray_cluster.address, module=module))
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.kill()


@pytest.fixture(scope="module")
def undisturbed(home: Path, ray_cluster: LocalCluster) -> dict[int, float]:
    """The losses of the run that nothing is done to."""
    driver = Driver(write_job(home, "undisturbed", **RUN), home, ray_cluster.address)
    status, _ = driver.end()
    assert status == 0, "".join(driver.lines[-60:])
    return losses(driver.job)


def actors(cluster: LocalCluster, name: str) -> list[int]:
    """The processes of the living actors of a class."""
    from ray.util.state import list_actors

    found = list_actors(address=cluster.dashboard_url, filters=[("class_name", "=", name), ("state", "=", "ALIVE")])
    return [actor.pid for actor in found]


def as_undisturbed(driver: Driver, undisturbed: dict[int, float]) -> list[dict[str, Any]]:
    """Hold a run that has ended to the other one; returns its events."""
    status, _ = driver.end()
    assert status == 0, "".join(driver.lines[-60:])
    found = losses(driver.job)
    assert sorted(found) == list(range(1, STEPS + 1))
    assert found == pytest.approx(undisturbed, abs=1e-5)
    return list(codec.read(driver.job / "events.jsonl"))


def past_a_checkpoint(driver: Driver) -> None:
    """Return when a run has gone some steps beyond its first checkpoint, which is whole."""
    driver.wait_for(lambda e: e["event"] == "checkpoint")
    driver.wait_for_step(EVERY + 2)


def computed_twice(found: list[dict[str, Any]]) -> int:
    return len([e for e in found if e["event"] == "step"]) - STEPS


def test_a_killed_worker_restarts_and_sinks_get_each_step_once(
    home: Path, run: Callable[..., Driver], ray_cluster: LocalCluster, undisturbed: dict[int, float]
):
    store = f"sqlite:///{home}/mlflow.db"
    metrics = {"wandb": {"project": "p", "mode": "offline"}, "mlflow": {"uri": store}}
    driver = run("worker", metrics=metrics, checkpoint={"every_steps": EVERY})
    past_a_checkpoint(driver)
    killed = actors(ray_cluster, "RayTrainWorker")[1]
    os.kill(killed, signal.SIGKILL)
    fault = driver.wait_for(lambda e: e["event"] == "fault")
    restart = driver.wait_for(lambda e: e["event"] == "restart")
    after = driver.wait_for(lambda e: e["event"] == "step")
    found = as_undisturbed(driver, undisturbed)
    assert fault["kind"] == "worker" and restart["reason"] == fault["reason"]
    # The one that was killed, and not the one that lost it.
    assert re.search(rf"worker {fault['rank']}: .*({killed}\) ended without an error message|died)", fault["reason"])
    assert restart["resumed_from"] >= EVERY and restart["resumed_from"] % EVERY == 0
    assert after["step"] == restart["resumed_from"] + 1
    # Up to an interval, and what was trained while the checkpoint before was still being written.
    assert computed_twice(found) == restart["repeated"] <= 2 * EVERY
    assert restart["lost_s"] > 0
    # Steps that were repeated gave what they gave before, and who follows the numbers has each of them once.
    told = {e["step"]: pytest.approx(e["loss"], rel=1e-5) for e in found if e["event"] == "step"}
    assert [e["loss"] for e in found if e["event"] == "step"] == [
        told[e["step"]] for e in found if e["event"] == "step"
    ]
    runs, on_wandb = stored_metrics.wandb_offline(driver.job)
    jobs, on_mlflow = stored_metrics.mlflow(store, "tandem")
    assert runs == jobs == {"worker"}
    for series in (stored_metrics.tensorboard(driver.job / "tensorboard"), on_wandb, on_mlflow):
        assert len(series["train/loss"]) == STEPS and dict(series["train/loss"]) == told
        assert {"train/grad_norm", "train/learning_rate", "train/mfu", "train/memory_bytes"} <= series.keys()
    assert not [e for e in found if e["event"] == "notice"]


@pytest.mark.slow  # a training run with faults: half a minute or more
def test_a_suspended_rank_is_reported_with_its_stack_and_restarted(
    run: Callable[..., Driver], ray_cluster: LocalCluster, undisturbed: dict[int, float]
):
    driver = run("stopped-rank", faults=FAST)
    past_a_checkpoint(driver)
    pids = actors(ray_cluster, "RayTrainWorker")
    assert len(pids) == 2
    os.kill(pids[0], signal.SIGSTOP)
    hang = driver.wait_for(lambda e: e["event"] == "hang")
    found = as_undisturbed(driver, undisturbed)
    (rank,) = hang["ranks"]
    assert f"rank {rank} (pid {pids[0]}," in hang["reason"] and "sent no heartbeat" in hang["reason"]
    # Its own stack, read from outside, and where the other one waits for it.
    assert "process" in hang["stacks"][str(rank)] and "stopped" in hang["stacks"][str(rank)]
    assert "train/loop.py" in hang["stacks"][str(rank)], hang["stacks"]
    assert "train/loop.py" in hang["stacks"][str(1 - rank)], hang["stacks"]
    (fault,) = (e for e in found if e["event"] == "fault")
    assert fault["kind"] == "hang" and fault["rank"] == rank
    assert not psutil.pid_exists(pids[0])
    assert 0 <= computed_twice(found) <= EVERY


@pytest.mark.slow  # a training run with faults: half a minute or more
def test_a_run_survives_the_kill_of_ray_trains_controller(
    run: Callable[..., Driver], ray_cluster: LocalCluster, undisturbed: dict[int, float]
):
    driver = run("controller")
    past_a_checkpoint(driver)
    workers = actors(ray_cluster, "RayTrainWorker")
    (controller,) = actors(ray_cluster, "TrainController")
    os.kill(controller, signal.SIGKILL)
    found = as_undisturbed(driver, undisturbed)
    assert [e["kind"] for e in found if e["event"] == "fault"] == ["controller"]
    assert not any(psutil.pid_exists(pid) for pid in workers)
    assert 0 <= computed_twice(found) <= EVERY


@pytest.mark.slow  # a training run with faults: half a minute or more
def test_a_worker_that_gets_sigterm_saves_first_and_loses_no_step(
    run: Callable[..., Driver], ray_cluster: LocalCluster, undisturbed: dict[int, float]
):
    driver = run("sigterm-worker", faults=FAST)
    driver.wait_for_step(EVERY + 2)
    os.kill(actors(ray_cluster, "RayTrainWorker")[1], signal.SIGTERM)
    found = as_undisturbed(driver, undisturbed)
    (restart,) = (e for e in found if e["event"] == "restart")
    assert "was sent SIGTERM" in restart["reason"] and restart["resumed_from"] > EVERY
    assert computed_twice(found) == restart["repeated"] == 0
    assert not [e for e in found if e["event"] == "fault"]


@pytest.mark.slow  # a training run with faults: half a minute or more
def test_a_stopped_job_saves_first_and_resumes_at_the_next_step(
    run: Callable[..., Driver], undisturbed: dict[int, float]
):
    first = run("sigterm", faults=FAST)
    first.wait_for_step(EVERY + 2)
    first.process.send_signal(signal.SIGTERM)
    status, left = first.end()
    assert status == 143 and left[-1]["event"] == "stopped", "".join(first.lines[-60:])
    stopped_at = max(losses(first.job))
    newest = folders.latest(first.job / "checkpoints")
    assert newest is not None and folders.read_state(newest).step == stopped_at
    assert JobFolder(first.job).summary().state is JobState.STOPPED
    found = as_undisturbed(run("sigterm"), undisturbed)
    assert [e["resumed_from"] for e in found if e["event"] == "started"] == [None, stopped_at]
    assert computed_twice(found) == 0


@pytest.mark.slow  # a training run with faults: half a minute or more
def test_a_killed_driver_is_restarted_and_resubmitted_if_its_supervisor_is_killed_too(
    home: Path, ray_cluster: LocalCluster, undisturbed: dict[int, float]
):
    job = JobFolder(write_job(home, "driver", **RUN))
    client = JobClient(ray_cluster)
    submission = client.submit(job)
    followed: list[str] = []

    def follow() -> None:
        followed.extend(client.follow_resubmitted(job, submission))

    follower = threading.Thread(target=follow)
    follower.start()
    wait_until(lambda: any(e["event"] == "checkpoint" for e in job.events()))
    wait_for_steps(job, EVERY + 2)
    (driver,) = processes("tandem.train.launch", job.path)
    driver.kill()
    wait_until(lambda: sum(e["event"] == "started" for e in job.events()) == 2)
    wait_for_steps(job, 3 * EVERY + 2)
    for process in [
        *processes("tandem.train.supervision.supervisor", job.path),
        *processes("tandem.train.launch", job.path),
    ]:
        process.kill()
    follower.join(timeout=240)
    assert not follower.is_alive()
    found = job.events()
    assert found[-1]["event"] == "finished", followed[-60:]
    assert losses(job.path) == pytest.approx(undisturbed, abs=1e-5)
    assert len(job.submissions()) == 2
    assert [e["kind"] for e in found if e["event"] == "fault"] == ["driver"]
    starts = [e["resumed_from"] for e in found if e["event"] == "started"]
    assert len(starts) == 3 and starts[0] is None and EVERY <= starts[1] <= starts[2]
    assert computed_twice(found) <= 2 * EVERY
    summary = job.summary()
    assert (summary.faults, summary.restarts, summary.checkpoint) == ({"driver": 1}, 2, STEPS)


def processes(module: str, job: Path) -> list[psutil.Process]:
    """The processes that run a module for a job."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if module in command and str(job) in command and "-m" in command:
            found.append(process)
    return found


def wait_for_steps(job: JobFolder, step: int) -> None:
    wait_until(lambda: max(losses(job.path), default=0) >= step)


def wait_until(true: Callable[[], bool]) -> None:
    for _ in range(1200):
        if true():
            return
        time.sleep(0.1)
    raise AssertionError("it did not come to that")


@pytest.mark.slow  # a training run with faults: half a minute or more
def test_a_run_waits_for_storage_that_is_away(home: Path, run: Callable[..., Driver], undisturbed: dict[int, float]):
    driver = run("storage")
    kept, away = driver.job / "checkpoints", driver.job / "away"
    driver.wait_for(lambda e: e["event"] == "checkpoint")
    kept.rename(away)
    kept.symlink_to("/nowhere/that/is")
    driver.wait_for(lambda e: e["event"] == "notice" and "is tried again" in e["message"])
    kept.unlink()
    away.rename(kept)
    found = as_undisturbed(driver, undisturbed)
    assert computed_twice(found) == 0
    assert [p.name for p in folders.list_complete(kept)] == ["step-00000070", "step-00000080"]


@pytest.fixture
def small_disk(home: Path) -> Iterator[Path]:
    """A file system of 8 MiB, for the checkpoints of the job `full-disk`."""
    folder = home / "jobs" / "full-disk" / "checkpoints"
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow  # a training run with faults: half a minute or more
def test_a_run_waits_for_a_full_disk_and_loses_no_checkpoint(
    small_disk: Path, run: Callable[..., Driver], undisturbed: dict[int, float]
):
    driver = run("full-disk")
    past_a_checkpoint(driver)
    fill = small_disk / "fill"
    with contextlib.suppress(OSError), fill.open("wb") as file:
        while True:
            file.write(bytes(2**16))
    told = driver.wait_for(lambda e: e["event"] == "notice")
    assert "disk is full" in told["message"] and "is tried again" in told["message"]
    whole = folders.list_complete(small_disk)
    assert whole and folders.read_state(whole[-1]).step >= EVERY
    fill.unlink()
    found = as_undisturbed(driver, undisturbed)
    assert computed_twice(found) == 0
    assert [p.name for p in folders.list_complete(small_disk)] == ["step-00000070", "step-00000080"]


@pytest.mark.slow  # a training run with faults: half a minute or more
def test_storage_that_stays_away_stops_the_run_without_starting_over(run: Callable[..., Driver]):
    driver = run("no-storage", faults={"storage_retry_s": 1})
    kept = driver.job / "checkpoints"
    driver.wait_for(lambda e: e["event"] == "checkpoint")
    kept.rename(driver.job / "away")
    kept.symlink_to("/nowhere/that/is")
    status, left = driver.end()
    assert status == 1 and left[-1]["event"] == "failed", "".join(driver.lines[-60:])
    assert sum(e["event"] == "started" for e in left) == 0
    again = run("no-storage")
    status, left = again.end()
    assert status == 1 and "is not there, though a checkpoint of step" in left[-1]["error"]
    assert folders.list_complete(driver.job / "away")


@pytest.mark.slow  # a training run with faults: half a minute or more
def test_nonfinite_steps_are_skipped_and_too_many_in_a_row_end_the_run(
    home: Path, run: Callable[..., Driver], undisturbed: dict[int, float]
):
    from safetensors.torch import load_file, save_file

    base = home / "broken-base"
    subprocess.run(["cp", "-r", str(home / "jobs" / "undisturbed" / "export"), str(base)], check=True)
    weights = load_file(base / "model.safetensors")
    rare = TextEncoder(str(home / "data" / "text" / "tokenizer")).tokenizer.encode(RARE).ids[-1]
    weights["model.embed_tokens.weight"][rare] = float("nan")
    if "lm_head.weight" not in weights:
        weights["lm_head.weight"] = load_file(base / "model.safetensors")["model.embed_tokens.weight"].clone()
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    driver = run("not-finite", model={"base": str(base)}, steps=20, faults={"max_nonfinite": 20})
    status, _ = driver.end()
    assert status == 0, "".join(driver.lines[-60:])
    found = list(codec.read(driver.job / "events.jsonl"))
    skipped = [e for e in found if e["event"] == "skipped"]
    assert 0 < len(skipped) < 20
    assert all(e["rows"] == 4 and e["first"] == 4 * (e["step"] - 1) and e["suspects"] for e in skipped)
    wrong = {e["step"] for e in skipped}
    told = [e for e in found if e["event"] == "step"]
    assert {e["step"] for e in told if e["loss"] != e["loss"]} == wrong
    summary = JobFolder(driver.job).summary()
    assert summary.skipped_steps == len(skipped) and "not finite" in summary.warnings[-1]

    weights["model.embed_tokens.weight"][:] = float("nan")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    driver = run("never-finite", model={"base": str(base)}, faults={"max_nonfinite": 3})
    status, left = driver.end()
    assert status == 1
    assert re.search(r"not finite in 3 steps in a row.*step 1 \(rows 0 to 3.*step 3 \(rows 8 to 11", left[-1]["error"])


@pytest.mark.slow  # a training run with faults: half a minute or more
def test_a_loss_spike_rolls_back_and_skips_its_rows(home: Path, run: Callable[..., Driver]):
    text = home / "spiked.txt"
    rows = [f"Line {n}: the quick brown fox jumps over {n * 7 % 13} lazy dogs.\n\n" for n in range(600)]
    rows[300:330] = ["".join(chr(33 + (n * n * 7 + k * k * 31) % 90) for k in range(60)) + "\n\n" for n in range(30)]
    text.write_text("".join(rows))
    build_dataset(str(text), home / "data" / "spiked", tokenizer=home / "data" / "text" / "tokenizer")
    driver = run(
        "spiked",
        data={"path": str(home / "data" / "spiked"), "sequence_length": 32, "shuffle": False, "open_shards": 1},
        faults={"spike": {"factor": 1.5, "window": 5}},
        steps=120,
    )
    status, _ = driver.end()
    assert status == 0, "".join(driver.lines[-60:])
    found = list(codec.read(driver.job / "events.jsonl"))
    back = [e for e in found if e["event"] == "rollback"]
    assert back and all(e["step"] % EVERY == 0 and e["step"] < e["from"] for e in back)
    assert all(e["loss"] > 1.5 * e["median"] for e in back)
    state = folders.read_state(folders.latest(driver.job / "checkpoints") or Path())
    left_out = sum(end - first for first, end in (e["rows"] for e in back))
    assert state.step == 120 and state.cursor["walk"]["rows"] == 4 * 120 + left_out


@pytest.mark.slow  # a training run with faults: half a minute or more
@pytest.mark.parametrize(
    ("name", "resized", "faults", "repeated"),
    [
        ("elastic", [(4, 2), (2, 4)], ["node"], EVERY),
        ("fixed", [], ["node"], EVERY),
        # Told before, it moves without losing a step.
        ("drained", [(4, 2)], [], 0),
    ],
)
def test_an_elastic_run_shrinks_when_a_node_is_lost_and_grows_back(
    name: str, resized: list[tuple[int, int]], faults: list[str], repeated: int, home: Path,
    undisturbed: dict[int, float],
):  # fmt: skip
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("nodes_that_go.py")), str(home), str(STEPS), name],
        env=child_environment({"TANDEM_HOME": str(home), "RAY_ADDRESS": None, "OMP_NUM_THREADS": "1"}),
        capture_output=True,
        text=True,
        timeout=400,
    )
    said = result.stdout + result.stderr[-3000:]
    found = list(codec.read(home / "jobs" / name / "events.jsonl"))
    assert found[-1]["event"] == "finished", said
    assert [(e["from"], e["to"]) for e in found if e["event"] == "resized"] == resized, said
    assert [e["kind"] for e in found if e["event"] == "fault"] == faults, said
    assert losses(home / "jobs" / name) == pytest.approx(undisturbed, abs=1e-5)
    assert computed_twice(found) <= repeated

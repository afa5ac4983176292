"""Jobs of a real Slurm on hosts in network namespaces, submitted, reached through SSH, ended and queued again."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from bench.cluster.slurm_tunnel import is_master
from bench.harness.slurm_site import Site, slurm_site
from drivers import losses
from hosts import REPOSITORY, SUBNET, skipped_where_unavailable, wait_until
from postgresql import postgresql
from serve_fixtures import write_model

from tandem.cluster.slurm.folder import Connection

# Each job starts Ray on its node, and an engine: half a minute each.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TRAINING = """\
name: {name}
data: {{path: text, sequence_length: 64}}
model: {{architecture: llama, hidden_size: 32, num_layers: 2, num_heads: 2, num_kv_heads: 1, intermediate_size: 64}}
parallel: {{workers: {workers}, cpus_per_worker: 1.5}}
checkpoint: {{every_steps: 100}}
steps: {steps}
batch_size: 4
"""
STEPS = 4000
"""Steps of a run that is stopped twice: some hundred pass between a signal and its end."""
PROJECT = """\
setup: .venv/.ready-cpu
.venv/.ready-cpu:
	@mkdir -p .venv/bin
	@printf '#!/bin/sh\\nexport PYTHONPATH={platform}\\nexec {python} "$$@"\\n' > .venv/bin/python
	@chmod 755 .venv/bin/python
	@touch $@
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with skipped_where_unavailable(), slurm_site(tmp_path_factory.mktemp("slurm"), nodes=2) as found:
        yield found


@pytest.fixture(scope="module")
def database(site: Site) -> Iterator[str]:
    """A database for jobs of both nodes."""
    with postgresql(f"{SUBNET}.1") as server:
        yield server.create("tandem")


@pytest.fixture(scope="module")
def served(site: Site) -> Connection:
    """A job that serves a tiny model with vLLM."""
    model = write_model(site.shared / "tiny")
    shown = site.tandem("slurm", "submit", "serve", str(model))
    connection = site.job().connection()
    assert connection is not None and connection.state == "ready" and "tandem slurm tunnel" in shown
    return connection


def build_text(site: Site) -> None:
    """The dataset of the training jobs, unless it is there."""
    texts = site.shared / "texts.jsonl"
    if not texts.exists():
        texts.write_text("".join(json.dumps({"text": f"line {i} of a text. " * 20}) + "\n" for i in range(300)))
        site.tandem("data", "build", str(texts), "text", "--vocab-size", "512")


def client(port: int, key: str) -> Any:
    from openai import OpenAI

    return OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0, timeout=60)


def test_a_compute_node_is_checked_as_jobs_find_it(site: Site) -> None:
    shown = site.run("slurm", "check").stdout
    assert "Python" in shown and "Packages" in shown and "TANDEM_HOME must be" not in shown


def test_the_shared_file_system_is_prepared_from_a_laptop_and_checked_on_a_node(site: Site) -> None:
    # A checkout that is there, whose environment is this one.
    folder = site.shared / "project"
    (folder / "requirements").mkdir(parents=True)
    (folder / "Makefile").write_text(PROJECT.format(python=sys.executable, platform=REPOSITORY / "platform"))
    words = ["-m", "tandem", "slurm", "setup", str(folder), "--site-set", "cpus_per_node=2"]
    words += ["--host", f"root@{site.login.address}"]
    variables = {**site.slurm.environment, "COLUMNS": "200"}
    first, second = (site.on_laptop(*words, **variables).stdout for _ in range(2))
    assert "checkout of its own" in first and first.count(": made") == 4 and second.count(": is there") == 4
    for shown in (first, second):
        assert f"tandem: {folder}/tandem" in shown and "cpus_per_node: 2" in shown
        assert "On a compute node:" in shown and "Python" in shown and "TANDEM_HOME must be" not in shown


def test_a_job_is_reached_through_the_login_node_with_its_key(site: Site, served: Connection) -> None:
    with site.tunnel(18300):
        answer = client(18300, served.api_key).completions.create(
            model=served.models[0], prompt="the cat", max_tokens=4
        )
        assert answer.usage is not None and answer.usage.completion_tokens == 4
        refused = subprocess.run(
            ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "http://127.0.0.1:18300/v1/models", "-H", "x-api-key: x"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert refused.stdout == "401"
    status = json.loads(site.tandem("slurm", "status", "--json"))
    assert status[0]["slurm"] == "RUNNING" and status[0]["state"] == "ready" and status[0]["ends_at"]


def test_clients_on_a_laptop_open_the_way_themselves(site: Site, served: Connection) -> None:
    scripts = sorted((REPOSITORY / "examples").glob("*.py"))
    own = [[str(path), served.job_id] for path in scripts if not path.name.startswith("openai")]
    for words in (["-m", "tandem", "chat", "--slurm", served.job_id, "--max-tokens", "4", "the cat"], *own):
        done = site.on_laptop(*words)
        assert done.returncode == 0 and done.stdout.strip(), f"{words}\n{done.stdout}{done.stderr}"
    with site.tunnel(18304):
        sdk = {"OPENAI_BASE_URL": "http://127.0.0.1:18304/v1", "OPENAI_API_KEY": served.api_key}
        for path in scripts:
            if path.name.startswith("openai"):
                done = site.on_laptop(str(path), **sdk)
                assert done.returncode == 0 and done.stdout.strip(), f"{path}\n{done.stdout}{done.stderr}"
    assert not left_by_ssh()


def left_by_ssh() -> list[str]:
    """Connections of tunnels and clients that are still up."""
    shown = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in shown.splitlines() if "/tmp/tandem-ssh-" in line]


def test_a_tunnel_connects_again_at_the_same_port(site: Site, served: Connection) -> None:
    with site.tunnel(18301) as process:
        ask = client(18301, served.api_key).completions.create
        ask(model=served.models[0], prompt="the cat", max_tokens=2)

        def answers() -> bool:
            with contextlib.suppress(Exception):
                return bool(ask(model=served.models[0], prompt="the cat", max_tokens=2).usage)
            return False

        # A killed process leaves its socket.
        for connection in psutil.process_iter():
            if is_master(connection):
                connection.kill()
        wait_until(answers, 30, "the tunnel did not connect again after a kill")
        assert len([each for each in psutil.process_iter() if is_master(each)]) == 1
        link = f"v{site.login.namespace}"
        subprocess.run(["ip", "link", "set", link, "down"], check=True)
        time.sleep(6)
        subprocess.run(["ip", "link", "set", link, "up"], check=True)
        wait_until(answers, 30, "the tunnel did not connect again")
        assert process.poll() is None


def test_clients_of_a_tunnel_move_to_a_successor_without_a_failed_request(site: Site, served: Connection) -> None:
    first = site.job()
    with site.tunnel(18303):
        failures: list[str] = []
        jobs: list[str] = []
        done = threading.Event()

        def ask_on_and_on() -> None:
            ask = client(18303, served.api_key).completions.with_raw_response.create
            while not done.is_set():
                try:
                    jobs.append(ask(model=served.models[0], prompt="the cat", max_tokens=2).headers["x-tandem-replica"])
                except Exception as error:
                    failures.append(repr(error))
                time.sleep(0.1)

        asking = threading.Thread(target=ask_on_and_on)
        asking.start()
        try:
            site.tandem("slurm", "submit", "serve", str(site.shared / "tiny"), "--successor-of", first.name)
            site.tandem("slurm", "stop", first.name)
            wait_until(
                lambda: len(site.slurm.run("squeue", "--noheader").splitlines()) == 1, 90, "the first job did not end"
            )
            time.sleep(2)
        finally:
            done.set()
            asking.join(30)
        assert not failures and len(set(jobs)) == 2 and jobs[-1] != jobs[0]


def test_a_job_that_is_told_to_end_answers_what_has_begun(site: Site, served: Connection) -> None:
    with site.tunnel(18302) as process:
        stream = client(18302, served.api_key).completions.create(
            model=served.models[0], prompt="the cat", max_tokens=1500, stream=True,
            stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
        )  # fmt: skip
        usages = []
        for number, chunk in enumerate(stream):
            if number == 3:
                site.tandem("slurm", "stop", "latest")
            usages.append(chunk.usage)
        assert usages[-1] is not None and usages[-1].completion_tokens == 1500
        wait_until(lambda: not site.slurm.run("squeue", "--noheader").strip(), 90, "the job did not end")
        connection = site.job().connection()
        assert connection is not None and connection.state == "ended"
        wait_until(lambda: process.poll() is not None, 30, "the tunnel did not notice that the job has ended")
    for node in site.nodes:
        left = [
            line for line in node.run("ps -eo args").stdout.splitlines() if re.match(r"\S*(ray::|raylet|gcs)", line)
        ]
        assert not left


def test_an_app_that_cannot_start_says_why(site: Site) -> None:
    result = site.run("slurm", "submit", "serve", "no-such-model")
    assert result.returncode != 0 and "has failed" in result.stdout and "tandem slurm logs" in result.stdout
    assert "no-such-model" in site.tandem("slurm", "logs", "latest")


def test_training_that_spans_three_jobs_has_the_losses_of_one(site: Site) -> None:
    build_text(site)
    for name in ("whole", "parts"):
        (site.shared / f"{name}.yaml").write_text(TRAINING.format(name=name, workers=1, steps=STEPS))
    site.tandem("slurm", "submit", "train", "--detach", "--config", str(site.shared / "parts.yaml"))
    job_id = site.job().submission().job_id or ""

    def steps(name: str) -> dict[int, float]:
        """The losses of a job by step."""
        found = list((site.home / "jobs").glob(f"{name}-*"))
        return losses(found[0]) if found else {}

    for run in range(2):
        next_step = max(steps("parts"), default=0) + 100
        wait_until(lambda: max(steps("parts"), default=0) >= next_step or site.job_failed(), 240, "no step came")  # noqa: B023
        assert not site.job_failed(), site.output()
        # What Slurm sends before the time limit.
        site.slurm.run("scancel", "--signal=USR1", "--batch", job_id)
        wait_until(
            lambda run=run: f"Restarts={run + 1}" in site.slurm.run("scontrol", "--oneliner", "show", "job", job_id), 120,
            "the job was not queued again",
        )  # fmt: skip
    wait_until(lambda: not site.slurm.run("squeue", "--noheader").strip(), 400, "the job did not end")
    site.tandem("slurm", "submit", "train", "--config", str(site.shared / "whole.yaml"))
    wait_until(lambda: not site.slurm.run("squeue", "--noheader").strip(), 400, "the job did not end")
    whole = steps("whole")
    assert len(whole) == STEPS and steps("parts") == pytest.approx(whole, abs=1e-5)


def test_training_runs_over_two_nodes(site: Site, database: str) -> None:
    build_text(site)
    (site.shared / "wide.yaml").write_text(TRAINING.format(name="wide", workers=2, steps=6))
    variables = {"TANDEM_DATABASE_URL": database}
    site.tandem("db", "upgrade", **variables)
    site.tandem("slurm", "submit", "train", "--nodes", "2", "--config", str(site.shared / "wide.yaml"), **variables)
    wait_until(lambda: not site.slurm.run("squeue", "--noheader").strip(), 300, "the job did not end")
    assert "2 workers on 2 nodes" in site.job().log.read_text(), site.output()


def test_trials_of_a_sweep_run_as_tasks_side_by_side_on_a_node(site: Site, database: str) -> None:
    build_text(site)
    config = site.shared / "swept.yaml"
    config.write_text(TRAINING.format(name="swept", workers=1, steps=30).replace("1.5", "0.5"))
    variables = {"TANDEM_DATABASE_URL": database}
    site.tandem("db", "upgrade", **variables)
    words = ["slurm", "submit", "sweep", "--config", str(config), "--param", "optimizer.learning_rate=1e-9,1e-2,1e-8"]
    one_node = ["--site-set", "cpus_per_node=1", "--site-set", f"options=[--nodelist={site.nodes[1].name}]"]
    site.tandem(*words, *one_node, "--at-once", "2", **variables)
    job_id, most = site.job().submission().job_id or "", 0

    def over() -> bool:
        nonlocal most
        states = site.slurm.run("squeue", "--noheader", "--array", f"--jobs={job_id}", "--format=%T").split()
        most = max(most, states.count("RUNNING"))
        return not states

    wait_until(over, 500, "the array did not end")
    logs = "".join(site.job().task(number).log.read_text()[-2000:] for number in (1, 2, 3))
    assert most == 2, logs
    # The last task has compared them, and the same command has nothing left to run.
    shown = site.tandem(*words, *one_node, **variables)
    assert "The best is trial 2" in shown and "swept@1" in shown, shown + logs
    assert json.loads(site.tandem("slurm", "status", "--json"))[0]["state"] == "3 ended"

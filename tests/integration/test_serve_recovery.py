"""Parts of an app that are killed or stopped under load: two echo replicas and two gateways, asked over HTTP."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
import pytest
from serve_fixtures import Served, process_of

from tandem.cluster.marks import marked_processes

WORDS = 40
DELAY_S = 0.1
TEXT = " ".join(f"w{number}" for number in range(WORDS))
LONGEST_S = 60.0


@dataclass
class Sturdy:
    """The app under test."""

    url: str
    cluster: Any

    def records(self) -> list[Any]:
        from ray import serve

        directory = serve.get_deployment_handle("Directory", "sturdy")
        return list(directory.watch.remote(0).result(timeout_s=30).replicas)

    def processes(self, title: str) -> list[psutil.Process]:
        found = []
        for process in marked_processes(self.cluster.mark):
            with contextlib.suppress(psutil.Error):
                if title in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def wait_until_whole(self, without: str = "") -> None:
        """Until two replicas, other than `without`, and two gateways are there, and answer."""
        from ray import serve

        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(Exception):
                deployments = serve.status().applications["sturdy"].deployments
                running = {name: each.replica_states.get("RUNNING", 0) for name, each in deployments.items()}
                ready = [each for each in self.records() if each.state == "ready" and each.id != without]
                if (
                    running["Gateway"] == 2
                    and all(each.status == "HEALTHY" for each in deployments.values())
                    and len(ready) == 2
                ):
                    assert httpx.get(f"{self.url}/health", timeout=5).status_code == 200
                    (config,) = (self.cluster.folder / "h").glob("*/haproxy.cfg")
                    if config.read_text().count("server SERVE_REPLICA_sturdy-Gateway") == 2:
                        time.sleep(1.0)  # HAProxy reads it
                        return
            assert time.monotonic() < deadline, serve.status()
            time.sleep(0.3)


@pytest.fixture(scope="module")
def whole(served: Served, ray_cluster: Any) -> Iterator[Sturdy]:
    from ray import serve

    from tandem.apps.build import build_app
    from tandem.config import GatewayConfig, ServeConfig, ServedModelConfig

    model = ServedModelConfig(
        model="echo@1", name="echo", engine="echo", replicas=2, engine_args={"delay_s": DELAY_S, "max_length": 512}
    )
    config = ServeConfig(models=(model,), gateway=GatewayConfig(replicas=2), app="sturdy")
    serve.run(build_app(config, check=False), name="sturdy", route_prefix="/sturdy")
    yield Sturdy(url=f"{served.url}/sturdy", cluster=ray_cluster)
    serve.delete("sturdy", _blocking=False)


@pytest.fixture
def sturdy(whole: Sturdy) -> Sturdy:
    whole.wait_until_whole()
    return whole


@dataclass(repr=False)
class Answer:
    """What one client got."""

    streamed: bool
    text: str = ""
    status: int = 0
    replica: str = ""
    gateway: str = ""
    broken: str = ""
    seconds: float = 0.0

    def __repr__(self) -> str:
        kind = "stream" if self.streamed else "whole"
        return (
            f"<{kind} {self.status} {self.broken or self.text[-120:]!r} of {self.replica} after {self.seconds:.1f} s>"
        )

    @property
    def whole(self) -> bool:
        if self.streamed:
            return self.text.count("data: {") == WORDS and self.text.endswith("data: [DONE]\n\n")
        return self.status == 200 and TEXT in self.text


@dataclass
class Load:
    """Clients that each ask once, at the same time."""

    url: str
    answers: list[Answer] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)

    def begin(self, count: int) -> None:
        for number in range(count):
            self.answers.append(Answer(streamed=number % 2 == 0))
            self.threads.append(threading.Thread(target=self._ask, args=(self.answers[-1],), daemon=True))
            self.threads[-1].start()

    def end(self) -> list[Answer]:
        for thread in self.threads:
            thread.join(LONGEST_S)
            assert not thread.is_alive(), "a client hangs"
        return self.answers

    def _ask(self, answer: Answer) -> None:
        began = time.monotonic()
        body = {"model": "echo", "prompt": TEXT, "stream": answer.streamed}
        try:
            with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=LONGEST_S) as response:
                answer.status = response.status_code
                answer.replica = response.headers.get("x-tandem-replica", "")
                answer.gateway = response.headers.get("x-tandem-gateway", "")
                for text in response.iter_text():
                    answer.text += text
        except httpx.HTTPError as error:
            answer.broken = repr(error)
        answer.seconds = time.monotonic() - began


def begin(sturdy: Sturdy, count: int) -> Load:
    load = Load(sturdy.url)
    load.begin(count)
    deadline = time.monotonic() + 20
    # Loads travel with the beats.
    while sum(record.running for record in sturdy.records()) < count:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return load


def test_a_killed_gateway_breaks_only_streams_that_it_carried(sturdy: Sturdy) -> None:
    load = begin(sturdy, 8)
    gateways = sturdy.processes("ray::ServeReplica:sturdy:Gateway")
    assert len(gateways) == 2
    gateways[0].kill()
    answers = load.end()
    # What no byte was answered to went through the other gateway; what was streaming through this one has an end that shows.
    assert not [answer for answer in answers if not answer.streamed and not answer.whole]
    broken = [answer for answer in answers if not answer.whole]
    assert all(answer.broken for answer in broken) and len({answer.gateway for answer in broken}) <= 1, broken
    sturdy.wait_until_whole()


def ready(served: Served) -> set[str]:
    """The replicas of the app with a real engine that take requests."""
    return {record.id for record in served.replicas() if record.state == "ready"}


def test_without_the_controller_requests_go_on_and_only_what_died_is_replaced_once_it_is_back(
    sturdy: Sturdy, served: Served
) -> None:
    engines = ready(served)
    load = begin(sturdy, 4)
    (controller,) = sturdy.processes("ray::ServeController")
    controller.kill()
    assert not [answer for answer in load.end() if not answer.whole]
    old = next(record for record in sturdy.records() if record.state == "ready")
    process_of(old).kill()
    sturdy.wait_until_whole(without=old.id)
    assert ready(served) == engines


def test_a_killed_haproxy_is_there_again_and_new_requests_are_answered(sturdy: Sturdy) -> None:
    load = begin(sturdy, 2)
    newest = max(sturdy.processes("haproxy.cfg"), key=lambda process: process.create_time())
    newest.kill()
    for answer in load.end():
        assert answer.broken and not answer.whole
    deadline = time.monotonic() + 30
    while True:
        with contextlib.suppress(httpx.TransportError):
            answer = httpx.post(f"{sturdy.url}/v1/completions", json={"model": "echo", "prompt": "one"}, timeout=10)
            assert answer.status_code in (200, 503), answer.text
            if answer.status_code == 200:
                break
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.slow  # a stopped replica is noticed only after half a minute
def test_a_stopped_replica_is_taken_out_and_its_requests_go_elsewhere(sturdy: Sturdy) -> None:
    load = begin(sturdy, 8)
    victim = next(record for record in sturdy.records() if record.state == "ready")
    process = process_of(victim)
    os.kill(process.pid, signal.SIGSTOP)
    answers = load.end()
    # By the directory: silent after 10 s, a beat more until gateways hear of it, and then the answer's own 4 s.
    assert not [answer for answer in answers if not answer.streamed and not answer.whole]
    assert all(answer.replica != victim.id for answer in answers if not answer.streamed)
    cut = [answer for answer in answers if not answer.whole]
    assert all(answer.replica == victim.id and "engine_unavailable" in answer.text for answer in cut)
    # Serve gives up on it after three health checks, and does not wait for it.
    sturdy.wait_until_whole(without=victim.id)
    _, alive = psutil.wait_procs([process], timeout=60)
    assert not alive

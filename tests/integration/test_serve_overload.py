"""More than the engines can do, and clients that behave badly: real Ray, HAProxy and SDKs; vLLM where it matters what it does."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx
import openai
import psutil
import pytest
from serve_fixtures import Served

from tandem.cluster.local import LocalCluster
from tandem.cluster.marks import marked_processes

CONNECTIONS = 512
READERS, ANSWER_MB = 12, 48
TOKENS, MANY = 1900, 48
PATIENCE_S = 30.0
"""Many answers of so many tokens take the engine more than ten seconds."""
ONE: dict[str, Any] = {"model": "tiny", "prompt": "the cat", "max_tokens": TOKENS, "temperature": 0}
LONG: dict[str, Any] = {**ONE, "prompt": ["the cat"] * MANY, "ignore_eos": True}


@pytest.fixture(scope="module")
def narrow(served: Served) -> Served:
    """A second gateway before the same vLLM engine, below `/narrow`: two LONG requests at a time, and one may wait."""
    from ray import serve

    from tandem.apps.gateway import Gateway
    from tandem.apps.resolve import resolve_models
    from tandem.config import GatewayConfig, RouterConfig, ServeConfig, ServedModelConfig
    from tandem.serve.scaling import GATEWAY_ENVIRONMENT

    tiny = ServedModelConfig(model="tiny", requests_per_replica=2 * MANY, max_queued=1, max_adapters=2, max_lora_rank=8)
    models = tuple(resolve_models(ServeConfig(models=(tiny,)), served.registry()))
    directory = serve.get_deployment_handle("Directory", served.app)
    gateway = serve.deployment(
        serve.ingress()(Gateway),
        name="Gateway",
        ray_actor_options={
            "num_cpus": 0.1,
            "runtime_env": {"env_vars": GATEWAY_ENVIRONMENT},
        },
        max_ongoing_requests=100_000,
    )
    app = gateway.bind(directory, models, GatewayConfig(), served.registry().address, [], RouterConfig())
    serve.run(app, name="narrow", route_prefix="/narrow")
    return replace(served, url=f"{served.url}/narrow")


@pytest.fixture(scope="module")
def echoing(served: Served) -> Served:
    """An app of one echo engine, below `/echo`."""
    from ray import serve

    from tandem.apps.build import build_app
    from tandem.config import ServeConfig, ServedModelConfig

    model = ServedModelConfig(model="echo", name="echo", engine="echo", max_adapters=0, cpus_per_replica=0.1)
    serve.run(build_app(ServeConfig(models=(model,), app="echo"), check=False), name="echo", route_prefix="/echo")
    return replace(served, url=f"{served.url}/echo", app="echo")


def until(happened: Callable[[], bool]) -> None:
    """Wait for something that must come."""
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline, f"it did not come within {PATIENCE_S} s"
        time.sleep(0.05)


def running(served: Served) -> int:
    """What the engine says of itself, now."""
    from ray import serve

    model = "echo" if served.app == "echo" else "tiny"
    record = serve.get_deployment_handle(f"engine-{model}", served.app).record.remote().result(timeout_s=30)
    return int(record.running + record.waiting)


@contextlib.contextmanager
def busy(served: Served, count: int) -> Iterator[None]:
    """Streams of the engine's that go on for as long as the block."""
    with contextlib.ExitStack() as held:
        streams = []
        for _ in range(count):
            body = LONG | {"stream": True}
            answer = held.enter_context(httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=60))
            assert answer.status_code == 200
            # An iterator that nobody holds closes its connection.
            streams.append(answer.iter_raw())
            next(streams[-1])
        yield


def test_too_many_requests_are_429_that_the_sdks_understand_and_are_answered_later(narrow: Served) -> None:
    with busy(narrow, 2):
        with httpx.Client(timeout=60) as waiting, pytest.raises(httpx.ReadTimeout):
            waiting.post(f"{narrow.url}/v1/completions", json=ONE, timeout=httpx.Timeout(60, read=0.5))
        # The one that waited has left, so there is a place for one more, and for no other.
        time.sleep(1.5)
        sock = ask_and_wait(narrow, ONE)
        with pytest.raises(openai.RateLimitError) as caught:
            narrow.client().completions.create(**ONE)
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
        assert caught.value.code == "queue_full"
        import anthropic

        with pytest.raises(anthropic.RateLimitError):
            narrow.anthropic().messages.create(
                model="tiny", max_tokens=4, messages=[{"role": "user", "content": "the cat"}]
            )
        sock.close()
    answer = narrow.client(max_retries=2).completions.create(**ONE | {"max_tokens": 3})
    assert answer.usage is not None and answer.usage.completion_tokens == 3


def ask_and_wait(served: Served, body: dict[str, Any], wait_s: float = 1.5) -> socket.socket:
    """A request on a connection of its own, of which the gateway knows after `wait_s`."""
    parts = httpx.URL(f"{served.url}/v1/completions")
    sock = socket.create_connection((parts.host, parts.port or 80))
    raw = json.dumps(body).encode()
    head = f"POST {parts.path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(raw)}\r\n\r\n"
    sock.sendall(head.encode() + raw)
    time.sleep(wait_s)
    return sock


def test_a_deadline_ends_a_generation_in_the_engine(narrow: Served) -> None:
    before = narrow.metric("vllm:generation_tokens_total")
    body = {**ONE, "prompt": LONG["prompt"], "extra_body": {"ignore_eos": True, "timeout": 1.0}}
    with pytest.raises(openai.APIError) as caught:
        for _ in narrow.client().completions.create(**body, stream=True):
            pass
    assert caught.value.code == "deadline_exceeded"
    with pytest.raises(openai.InternalServerError) as late:
        narrow.client().completions.create(**body)
    assert late.value.status_code == 504 and late.value.code == "deadline_exceeded"
    until(lambda: running(narrow) == 0)
    assert narrow.metric("vllm:generation_tokens_total") - before < 2 * MANY * TOKENS


@pytest.mark.parametrize("way", ["stream", "whole", "waiting"])
def test_a_client_that_leaves_stops_its_generation_and_the_engine_has_nothing_left_to_do(
    narrow: Served, way: str
) -> None:
    before = narrow.metric("vllm:generation_tokens_total")
    body = LONG | {"stream": way == "stream"}
    with contextlib.ExitStack() as held:
        if way == "waiting":
            held.enter_context(busy(narrow, 2))
        sock = ask_and_wait(narrow, body)
        until(lambda: running(narrow) == (2 if way == "waiting" else 1) * MANY)
        # Of one that waits nothing is ever seen, though there is room for it soon.
        sock.close()
    until(lambda: running(narrow) == 0)
    done = narrow.metric("vllm:generation_tokens_total")
    time.sleep(0.5)
    assert narrow.metric("vllm:generation_tokens_total") == done
    assert done - before < (2 if way == "waiting" else 1) * MANY * TOKENS


def read_whole(sock: socket.socket) -> bytes:
    """One answer of JSON."""
    seen = b""
    while not seen.endswith(b"}"):
        part = sock.recv(65536)
        assert part, seen
        seen += part
    return seen


def memory_mb(cluster: LocalCluster) -> dict[str, float]:
    """Resident memory of each gateway and proxy."""
    found = {}
    for process in marked_processes(cluster.mark):
        with contextlib.suppress(psutil.Error):
            title = " ".join([process.name(), *process.cmdline()])
            if "Gateway" in title or "haproxy" in title:
                found[f"{title.split()[0]} {process.pid}"] = process.memory_info().rss / 2**20
    return found


def grown_mb(cluster: LocalCluster, before: dict[str, float]) -> float:
    """How much the one that grew most has grown."""
    return max(now - before[name] for name, now in memory_mb(cluster).items() if name in before)


@pytest.mark.slow  # it waits until memory stands still, up to a minute
def test_clients_that_do_not_read_their_streams_grow_neither_gateway_nor_proxy(
    echoing: Served, cluster: LocalCluster
) -> None:
    body = {"model": "echo", "prompt": "x" * 4096, "stream": True, "ignore_eos": True, "max_tokens": ANSWER_MB * 256}
    before = memory_mb(cluster)
    assert any("Gateway" in name for name in before) and any("haproxy" in name for name in before), before
    socks = [ask_and_wait(echoing, body, 0.0) for _ in range(READERS)]
    until(lambda: running(echoing) == READERS)
    try:
        last, now = {}, memory_mb(cluster)
        deadline = time.monotonic() + 60
        while now != last and time.monotonic() < deadline:
            time.sleep(1.0)
            last, now = now, memory_mb(cluster)
        assert running(echoing) == READERS, "the engine has written all of it"
        assert grown_mb(cluster, before) < 2.5 * READERS
        assert httpx.get(f"{echoing.url}/health", timeout=20).status_code == 200
    finally:
        for sock in socks:
            sock.close()
    until(lambda: running(echoing) == 0)


def proxies(cluster: LocalCluster) -> set[str]:
    """HAProxy's processes: a change of any app's gateways brings a new one, and ends what is idle at the old one."""
    return {name for name in memory_mb(cluster) if name.startswith("haproxy")}


def test_idle_connections_hinder_no_answer_and_cost_little_memory(echoing: Served, cluster: LocalCluster) -> None:
    known = proxies(cluster)
    while not idle_ones_can_still_ask(echoing, cluster):
        # The app of a test before may still have been on its way out.
        now = proxies(cluster)
        assert now != known, "idle connections were closed, and not by a reload"
        known = now


def idle_ones_can_still_ask(echoing: Served, cluster: LocalCluster) -> bool:
    """Whether connections answer again that were idle while others asked; asserts what they cost meanwhile."""
    parts = httpx.URL(f"{echoing.url}/v1/models")
    ask = f"GET {parts.path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    before = memory_mb(cluster)
    with contextlib.ExitStack() as held:
        idle = [
            held.enter_context(socket.create_connection((parts.host, parts.port or 80))) for _ in range(CONNECTIONS)
        ]
        for sock in idle:
            sock.sendall(ask)
            assert read_whole(sock).startswith(b"HTTP/1.1 200")
        assert grown_mb(cluster, before) < 32
        body = {"model": "echo", "prompt": "one two three"}
        for _ in range(20):
            assert httpx.post(f"{echoing.url}/v1/completions", json=body, timeout=20).status_code == 200
        for sock in idle[::64]:
            try:
                sock.sendall(ask)
                alive = bool(sock.recv(1, socket.MSG_PEEK))
            except ConnectionError:
                alive = False
            if not alive:
                return False
            assert read_whole(sock).startswith(b"HTTP/1.1 200")
    return True

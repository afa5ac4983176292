"""What of a real engine's app is reachable: each of vLLM's routes is tried, at the gateway and at the replica itself."""

from __future__ import annotations

import http.client
import json
import re
import socket
import subprocess
import sys
from urllib.parse import urlsplit

import httpx
import pytest
from serve_fixtures import Pooled, Served

from tandem.engine.routes import ALLOWED, ENGINE_ROUTES
from tandem.engine.spec import EngineSpec
from tandem.engine.vllm.environment import engine_environment
from tandem.settings import child_environment

LIST = """
import json, os, sys
verdict = os.dup(1)
os.dup2(2, 1)
from tandem.engine.spec import EngineSpec
from tandem.engine.vllm.engine import build_app
from tandem.engine.vllm.arguments import make_config, parse_args

found = set()
for values, tasks in json.load(sys.stdin):
    spec = EngineSpec(**values)
    args = parse_args(spec)
    args.disable_fastapi_docs = False
    args.enable_tokenizer_info_endpoint = True
    app = build_app(args, tuple(tasks), make_config(args, spec).model_config)
    for route in app.routes:
        for method in getattr(route, "methods", None) or {"GET", "POST"}:
            found.add((method, route.path))
os.write(verdict, json.dumps(sorted(found)).encode())
"""
"""vLLM's routes, with all that can be switched on; in a process of its own, because the tests' own must not import vllm."""


@pytest.fixture(scope="module")
def routes(served: Served, pooled: Pooled) -> set[tuple[str, str]]:
    """Every method and path of vLLM's app, for models of every sort."""
    asked = []
    for path, tasks, args in (
        (served.base, ["generate", "transcription", "realtime", "render"], {}),
        (served.base, ["embed", "token_embed"], {"runner": "pooling", "convert": "embed"}),
        (pooled.judge, ["classify", "token_classify"], {}),
    ):
        asked.append(
            ({"kind": "vllm", "id": "m", "name": "m", "path": str(path), "max_adapters": 0, "args": args}, tasks)
        )
    environment = engine_environment(EngineSpec(**asked[0][0]))  # type: ignore[arg-type]
    done = subprocess.run(
        [sys.executable, "-c", LIST],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=200,
        env=child_environment({**environment, "VLLM_SERVER_DEV_MODE": "1"}),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {(method, path) for method, path in json.loads(done.stdout)}


def ask(url: str, method: str, path: str, **headers: str) -> tuple[int, str]:
    """Status and body, of a path that nothing on the way tidies up."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    connection.request(
        method, f"{parts.path}{path}", body="{}", headers={"content-type": "application/json", **headers}
    )
    answer = connection.getresponse()
    text = answer.read().decode(errors="replace")
    connection.close()
    return answer.status, text


def test_no_route_of_vllm_is_reachable_but_the_listed_ones(
    served: Served, pooled: Pooled, routes: set[tuple[str, str]]
) -> None:
    assert len(routes) > 60 and {("POST", "/invocations"), ("POST", "/collective_rpc"), ("GET", "/docs")} <= routes
    # vLLM has each route that we list: a new version that moves one is noticed.
    assert {("POST", route.path) for route in ENGINE_ROUTES} <= routes
    (replica,) = served.replicas()
    own = {("GET", "/v1/models"), ("GET", "/health")}
    own |= {("HEAD", "/health"), ("HEAD", "/v1/models"), ("GET", "/openapi.json"), ("HEAD", "/openapi.json")}
    stored = "/v1/responses/"
    for method, pattern in sorted(routes):
        path = re.sub(r"\{[^}]*\}", "x", pattern)
        assert ask(replica.url, method, path)[0] == 401, (method, path)
        assert ask(replica.url, method, path, **{"x-tandem-token": "wrong"})[0] == 401, (method, path)
        status, text = ask(replica.url, method, path, **{"x-tandem-token": replica.token})
        if (method, path) not in ALLOWED:
            assert (status, "No route" in text or method == "HEAD") == (404, True), (method, path, text)
        elif path not in ("/v1/embeddings", "/v1/score", "/score", "/v1/rerank", "/v2/rerank", "/rerank"):
            assert status in (200, 400), (method, path, text)
        for app in (served, pooled):
            status, text = ask(app.url, method, path)
            if (method, path) in {("POST", route.path) for route in ENGINE_ROUTES}:
                assert status == 400 and "`model`" in text, (method, path, text)
            elif (method, path) in own:
                assert status == 200, (method, path, text)
            elif path.startswith(stored) and status == 404:
                assert "Method" in text or "not found" in text, (method, path, text)
            else:
                assert status in (404, 405), (method, path, text)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/completions/",
        "//v1/completions",
        "/V1/completions",
        "/v1/completions/../../load",
        "/v1/completions/%2e%2e/%2e%2e/load",
        "/%6coad",
        "/metrics/",
        "/metrics/x",
        "/v1/completions;x",
    ],
)
def test_no_spelling_of_a_path_gets_past_the_list(served: Served, path: str) -> None:
    (replica,) = served.replicas()
    for method in ("GET", "POST"):
        status, text = ask(replica.url, method, path, **{"x-tandem-token": replica.token})
        assert status == 404 and "No route" in text
        assert ask(served.url, method, path)[0] in (404, 405)


def test_a_websocket_is_refused(served: Served) -> None:
    (replica,) = served.replicas()
    headers = {
        "x-tandem-token": replica.token,
        "connection": "upgrade",
        "upgrade": "websocket",
        "sec-websocket-version": "13",
        "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    assert httpx.get(f"{replica.url}/v1/realtime", headers=headers).status_code in (403, 404)


def test_a_client_that_closes_its_sending_side_gets_an_error_in_the_apis_shape(served: Served) -> None:
    # HAProxy cannot tell it from a client that has left, for which no engine shall go on.
    url = urlsplit(served.url)
    body = json.dumps({"model": "tiny", "prompt": "the cat", "max_tokens": 400, "ignore_eos": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    head += "\r\n\r\n"
    with socket.create_connection((str(url.hostname), url.port or 80), timeout=60) as connection:
        connection.sendall(head.encode() + body)
        connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    status, _, rest = answer.partition(b"\r\n")
    assert status.split()[1] == b"400"
    error = json.loads(rest.partition(b"\r\n\r\n")[2])["error"]
    assert set(error) == {"message", "type", "param", "code"} and "closed its sending side" in error["message"]

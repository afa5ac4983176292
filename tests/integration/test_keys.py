"""API keys before two real gateways, one of which is killed: created, rotated and revoked while both answer."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anthropic
import httpx
import openai
import pytest
from commands import tandem

from tandem.apps.build import build_app
from tandem.config import GatewayConfig, ServeConfig, ServedModelConfig
from tandem.usage import UsageStore

APP = "guarded"
SEEN_S = 5.0
BODY = {"model": "echo", "prompt": "one two three"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("guarded-home")
    home.chmod(0o700)
    return home


@pytest.fixture(scope="module")
def url(serve_port: int, home: Path) -> Iterator[str]:
    from ray import serve

    model = ServedModelConfig(model="echo", name="echo", engine="echo", cpus_per_replica=0.1, max_adapters=0)
    config = ServeConfig(models=(model,), gateway=GatewayConfig(replicas=2), app=APP)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TANDEM_HOME", str(home))
        app = build_app(config, check=False)
    serve.run(app, name=APP, route_prefix=f"/{APP}")
    yield f"http://127.0.0.1:{serve_port}/{APP}"
    serve.delete(APP, _blocking=False)


def gateways() -> set[int]:
    """The processes of the gateways that Serve counts as running."""
    from ray.serve.context import _get_global_client

    details = _get_global_client().get_serve_details()["applications"][APP]["deployments"]["Gateway"]["replicas"]
    return {each["pid"] for each in details if each["state"] == "RUNNING"}


def make(home: Path, *arguments: str) -> dict[str, str]:
    done = tandem("keys", *arguments, "--json", home=home)
    assert done.returncode == 0, done.stdout
    return dict(json.loads(done.stdout))


def ask(url: str, secret: str) -> tuple[int, str]:
    """Status and gateway of one request, on a connection of its own, so that HAProxy may choose either gateway."""
    answer = httpx.post(f"{url}/v1/completions", json=BODY, headers={"x-api-key": secret}, timeout=20)
    return answer.status_code, answer.headers.get("x-tandem-gateway", "")


def on_both(url: str, secret: str, status: int) -> bool:
    """Whether ten requests in a row get this status; those that are answered, by both gateways."""
    answers = [ask(url, secret) for _ in range(10)]
    if {each for each, _ in answers} != {status}:
        return False
    return status != 200 or len({gateway for _, gateway in answers}) == 2


def within(seconds: float, condition: Callable[[], bool]) -> float:
    """Wait for a condition; the seconds that it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
    return time.monotonic() - began


def test_a_key_is_known_and_forgotten_by_every_gateway_within_seconds(url: str, home: Path) -> None:
    assert within(30, lambda: on_both(url, "", 200)) >= 0
    first = make(home, "create", "ann")
    within(SEEN_S, lambda: on_both(url, "", 401))
    within(SEEN_S, lambda: on_both(url, first["secret"], 200))
    second = make(home, "rotate", "ann", "--overlap", "1h")
    within(SEEN_S, lambda: on_both(url, second["secret"], 200))
    assert on_both(url, first["secret"], 200)
    make(home, "revoke", first["id"])
    within(SEEN_S, lambda: on_both(url, first["secret"], 401))
    assert on_both(url, second["secret"], 200)


def test_a_new_gateway_knows_the_keys_from_its_first_request_on(url: str, home: Path) -> None:
    key = make(home, "create", "bob")
    within(SEEN_S, lambda: on_both(url, key["secret"], 200))
    os.kill(min(gateways()), signal.SIGKILL)
    seen = set()
    deadline = time.monotonic() + 60
    while not on_both(url, key["secret"], 200):
        seen |= {ask(url, "tdm-wrong")[0], ask(url, key["secret"])[0]}
        assert time.monotonic() < deadline
    assert 401 in seen and not seen & {403, 500}
    assert on_both(url, "tdm-wrong", 401)


def test_the_sdks_authenticate_and_raise_their_own_errors(url: str, home: Path) -> None:
    key = make(home, "create", "sdk")
    within(SEEN_S, lambda: on_both(url, key["secret"], 200))
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key["secret"], max_retries=0)
    assert client.completions.create(**BODY).choices[0].text
    with pytest.raises(openai.AuthenticationError, match="not a valid API key"):
        openai.OpenAI(base_url=f"{url}/v1", api_key="tdm-wrong", max_retries=0).models.list()
    with pytest.raises(anthropic.AuthenticationError):
        anthropic.Anthropic(base_url=url, api_key="tdm-wrong", max_retries=0).messages.create(
            model="echo", max_tokens=4, messages=[{"role": "user", "content": "a"}]
        )


def test_limits_and_usage_are_exact_over_two_gateways_with_one_killed(url: str, home: Path) -> None:
    limited = make(home, "create", "limited", "--limit", "requests_per_minute=30", "--limit", "tokens_per_day=100000")
    free = make(home, "create", "free")
    for key in (limited, free):
        within(SEEN_S, lambda secret=key["secret"]: ask(url, secret)[0] == 200)
    within(60, lambda: len(gateways()) == 2)
    # What a gateway has not written when it is killed is lost.
    within(20, lambda: spent(home, free["id"])[0] >= 1)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: ask(url, limited["secret"]), range(40)))
    # One request was spent above, or more until both gateways knew the key.
    admitted = [gateway for status, gateway in answers if status == 200]
    assert {status for status, _ in answers} == {200, 429} and len(admitted) <= 29
    assert len(set(admitted)) == 2
    os.kill(min(gateways()), signal.SIGKILL)
    statuses = set()
    for _ in range(20):
        with contextlib.suppress(httpx.TransportError):
            statuses.add(ask(url, limited["secret"])[0])
    # 502 and 503: HAProxy's, until it has noticed.
    assert 429 in statuses and 200 not in statuses
    begin = spent(home, free["id"])
    done = sent = 0
    deadline = time.monotonic() + 90
    while done < 100:
        assert time.monotonic() < deadline
        sent += 1
        with contextlib.suppress(httpx.TransportError):
            done += ask(url, free["secret"])[0] == 200
    within(20, lambda: spent(home, free["id"])[0] - begin[0] >= done)
    requests, prompt, completion = (now - then for now, then in zip(spent(home, free["id"]), begin, strict=True))
    # One that was answered by an engine, and whose connection was cut by then, counts too.
    assert done <= requests <= sent and (prompt, completion) == (3 * requests, 3 * requests)
    requests, prompt, completion = spent(home, limited["id"])
    assert 30 >= requests >= len(admitted) and (prompt, completion) == (3 * requests, 3 * requests)


def spent(home: Path, key: str) -> tuple[int, int, int]:
    """Requests, prompt tokens and generated tokens of a key."""
    with UsageStore(f"sqlite:///{home}/tandem.db") as store:
        rows = [row for row in store.sums(("key_id",)) if row["key_id"] == key]
    return tuple(sum(row[name] for row in rows) for name in ("requests", "prompt_tokens", "completion_tokens"))  # type: ignore[return-value]

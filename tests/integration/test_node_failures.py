"""An app on two nodes whose head is a third: links that are cut, a lost node, a killed head.

Clients ask at the first worker; what fails is the second one or the head.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import secrets
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from hosts import REPOSITORY, SUBNET, Host, hosts, wait_until
from postgresql import postgresql

# Three nodes of Ray in network namespaces, and a link that is away for 90 s.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PORT = 8000
TOKEN_S = 0.1
APP = f"""\
models:
  - {{model: echo, name: echo, engine: echo, replicas: 2, cpus_per_replica: 0.5, max_adapters: 0,
      resources_per_replica: {{slot: 1}}, engine_args: {{delay_s: {TOKEN_S}, max_length: 100000}}}}
gateway: {{replicas: 2}}
listen: {{host: 0.0.0.0}}
"""
PLACES = """
import json, ray
from ray.serve.context import _get_global_client
ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
from ray import serve
serve.status()
details = _get_global_client().get_serve_details()["applications"]["tandem"]["deployments"]
print("PLACES", json.dumps({r["replica_id"]: r["node_ip"] for d in details.values() for r in d["replicas"]
                            if r["state"] == "RUNNING"}))
"""


@dataclass(frozen=True, kw_only=True)
class Deployed:
    """The cluster with the app."""

    head: Host
    near: Host
    """The worker that clients ask."""
    far: Host
    """The worker that fails."""
    key: str

    def places(self) -> dict[str, str]:
        """Address of the node of each replica and gateway, by id."""
        shown = self.near.run(f"python -c '{PLACES}'").stdout
        places: dict[str, str] = json.loads(re.findall(r"^PLACES (.*)$", shown, re.MULTILINE)[0])
        return places

    def client(self, **options: Any) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=f"http://{self.near.address}:{PORT}",
            headers={"x-api-key": self.key},
            timeout=httpx.Timeout(60.0),
            **options,
        )

    def is_served_by(self, host: Host) -> bool:
        """Whether a replica on the host answers."""
        with contextlib.suppress(httpx.HTTPError, AssertionError, subprocess.SubprocessError):
            places = self.places()
            return host.address in {places.get(replica) for replica in asyncio.run(self._ask_some())}
        return False

    async def _ask_some(self) -> set[str]:
        async with self.client() as client:
            answers = await asyncio.gather(*(client.post("/v1/completions", json=request(3)) for _ in range(8)))
        return {answer.headers["x-tandem-replica"] for answer in answers if answer.status_code == 200}


@dataclass
class Stream:
    """One answer as its client saw it."""

    replica: str = ""
    gateway: str = ""
    tokens: int = 0
    longest_gap_s: float = 0.0
    ended_at: float = 0.0
    failure: str = ""

    def passed(self, address: str, places: dict[str, str]) -> bool:
        return address in (places.get(self.replica), places.get(self.gateway))


def request(tokens: int, **more: Any) -> dict[str, Any]:
    return {"model": "echo", "prompt": "word " * tokens, "max_tokens": tokens, **more}


async def stream(client: httpx.AsyncClient, tokens: int) -> Stream:
    """Read an answer to its end."""
    seen, last_at = Stream(), time.monotonic()
    try:
        # Prompts of their own: those with the same beginning go to the same replica.
        prompt = f"{uuid.uuid4().hex} " * tokens
        async with client.stream("POST", "/v1/completions", json=request(tokens, stream=True, prompt=prompt)) as answer:
            seen.replica, seen.gateway = answer.headers["x-tandem-replica"], answer.headers["x-tandem-gateway"]
            async for line in answer.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                now = time.monotonic()
                seen.longest_gap_s, last_at = max(seen.longest_gap_s, now - last_at), now
                content = json.loads(line.removeprefix("data: "))
                if "error" in content:
                    seen.failure = str(content["error"]["message"])
                else:
                    seen.tokens += bool(content["choices"] and content["choices"][0]["text"])
    except (httpx.HTTPError, KeyError) as error:
        seen.failure = f"{type(error).__name__}: {error}"
    seen.ended_at = time.monotonic()
    return seen


@dataclass
class Probes:
    """Short requests, one after the other, while something is broken."""

    begun_at: list[float] = field(default_factory=list)
    failures: list[tuple[float, str]] = field(default_factory=list)


@contextlib.asynccontextmanager
async def probing(deployed: Deployed, pause_s: float = 0.25) -> AsyncIterator[Probes]:
    probes = Probes()

    async def ask_on() -> None:
        async with deployed.client() as client:
            while True:
                begun_at = time.monotonic()
                probes.begun_at.append(begun_at)
                try:
                    answer = await client.post("/v1/completions", json=request(2))
                    if answer.status_code != 200:
                        probes.failures.append((begun_at, answer.text))
                except httpx.HTTPError as error:
                    probes.failures.append((begun_at, repr(error)))
                await asyncio.sleep(pause_s)

    tasks = [asyncio.create_task(ask_on()) for _ in range(2)]
    yield probes
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.contextmanager
def cut_off(host: Host) -> Iterator[None]:
    """The host's link is down for the length of a block."""
    subprocess.run(["ip", "link", "set", f"v{host.name}", "down"], check=True)
    try:
        yield
    finally:
        subprocess.run(["ip", "link", "set", f"v{host.name}", "up"], check=True)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """Three nodes, each started by `tandem node start --restart`, and an app with a replica and a gateway on each worker."""
    folder = tmp_path_factory.mktemp("failures")
    shared = folder / "shared"
    shared.mkdir()
    token = shared / "auth_token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    with hosts(3, folder / "hosts", [shared]) as (head, near, far), postgresql(f"{SUBNET}.1") as database:
        environment = (
            f"export PATH={Path(sys.executable).parent}:$PATH PYTHONPATH={REPOSITORY / 'platform'} OMP_NUM_THREADS=1\n"
            f"export TANDEM_HOME={shared / 'home'} TANDEM_DATABASE_URL='{database.create('tandem')}'\n"
            f"export RAY_AUTH_TOKEN_PATH={token} RAY_AUTH_MODE=token RAY_ADDRESS={head.address}:6379\n"
        )
        for host in (head, near, far):
            host.run(f"cat > ~/.bashrc <<'END'\n{environment}END")
        head.run("tandem db upgrade")
        head.run(
            "mkdir -p ~/gcs && RAY_gcs_storage=rocksdb RAY_gcs_storage_path=$HOME/gcs tandem node start --head --restart "
            f"--port=6379 --node-ip-address={head.address} --dashboard-host=127.0.0.1 --num-cpus=0"
        )
        for host in (near, far):
            start_worker(host, head)
        (shared / "app.yaml").write_text(APP)
        key = json.loads(near.run("tandem keys create first --json").stdout)["secret"]
        head.run(f"tandem serve up -c {shared}/app.yaml --detach", timeout_s=300)
        made = Deployed(head=head, near=near, far=far, key=key)
        wait_until(lambda: made.is_served_by(near) and made.is_served_by(far), 60, "a worker serves nothing")
        yield made
        for host in (far, near, head):
            host.run("tandem node stop", check=False)


def start_worker(host: Host, head: Host) -> None:
    host.run(
        f"tandem node start --restart --address={head.address}:6379 --node-ip-address={host.address} --num-cpus=2 "
        """--resources='{"slot": 1}'"""
    )


async def streams_beside(deployed: Deployed, tokens: int, cut_s: float) -> tuple[list[Stream], Probes, float]:
    """Streams of `tokens` during which the far worker is cut off for `cut_s`; also probes, and the moment of the cut."""
    async with deployed.client() as client, probing(deployed) as probes:
        tasks = [asyncio.create_task(stream(client, tokens)) for _ in range(12)]
        await asyncio.sleep(2.0)
        cut_at = time.monotonic()
        with cut_off(deployed.far):
            await asyncio.sleep(cut_s)
        return [await task for task in tasks], probes, cut_at


def test_a_link_that_is_cut_for_five_seconds_costs_no_stream(deployed: Deployed) -> None:
    places = deployed.places()
    seen, probes, _ = asyncio.run(streams_beside(deployed, 150, 5.0))
    far = [each for each in seen if each.passed(deployed.far.address, places)]
    near = [each for each in seen if each not in far]
    assert far and near
    assert [each.failure for each in seen if each.failure] == [] and {each.tokens for each in seen} == {150}
    # Those that pass the other node only do not notice.
    assert max(each.longest_gap_s for each in near) < 3.0
    assert probes.failures == []
    assert deployed.is_served_by(deployed.far)


def test_after_a_long_cut_streams_have_ended_with_an_error_and_the_node_is_used_again(deployed: Deployed) -> None:
    places = deployed.places()
    seen, probes, cut_at = asyncio.run(streams_beside(deployed, 300, 90.0))
    far = [each for each in seen if each.passed(deployed.far.address, places)]
    near = [each for each in seen if each not in far]
    assert far and near
    assert [each.failure for each in near if each.failure] == [] and {each.tokens for each in near} == {300}
    assert max(each.longest_gap_s for each in near) < 3.0
    assert all(each.failure for each in far)
    assert max(each.ended_at - cut_at for each in far) < 25.0
    # Until the cut is noticed a request may have been given to the lost replica.
    assert [failure for begun_at, failure in probes.failures if begun_at > cut_at + 15.0] == []
    wait_until(lambda: deployed.is_served_by(deployed.far), 90, "the node that was cut off is not used again")
    assert "has been started again" in deployed.far.run("cat /tmp/tandem-0/node.log").stdout


def test_a_node_that_is_lost_is_replaced(deployed: Deployed) -> None:
    async def lose() -> Probes:
        async with probing(deployed) as probes:
            await asyncio.sleep(1.0)
            await asyncio.to_thread(
                deployed.far.run,
                # Brackets: the patterns are not to match this command itself.
                "pkill -KILL -f 'tandem[.]cluster[.]node'; pkill -KILL -x raylet; pkill -KILL -f '[r]ay::'; "
                "pkill -KILL -x haproxy; true",
            )
            lost_at = time.monotonic()
            await asyncio.sleep(10.0)
        probes.failures = [each for each in probes.failures if each[0] > lost_at + 1.0]
        return probes

    assert asyncio.run(lose()).failures == []
    start_worker(deployed.far, deployed.head)
    wait_until(lambda: deployed.is_served_by(deployed.far), 90, "the node that replaces it is not used")


def test_the_app_answers_while_the_head_is_away_and_changes_after_it_is_back(deployed: Deployed) -> None:
    raylet = "pgrep -x raylet"
    before = deployed.head.run(raylet).stdout.split()

    async def kill_head() -> Probes:
        async with probing(deployed) as probes:
            await asyncio.sleep(1.0)
            await asyncio.to_thread(deployed.head.run, "pkill -KILL -x gcs_server; pkill -KILL -x raylet; true")
            while await asyncio.to_thread(lambda: deployed.head.run(raylet, check=False).stdout.split()) in (
                before,
                [],
            ):
                await asyncio.sleep(1.0)
            await asyncio.sleep(10.0)
        return probes

    probes = asyncio.run(kill_head())
    assert probes.failures == [] and len(probes.begun_at) > 40
    for host in (deployed.near, deployed.far):
        wait_until(lambda host=host: deployed.is_served_by(host), 60, f"{host.name} serves nothing")
    # The app can be changed again: Serve's controller has come back with its state.
    shown = deployed.head.run("tandem serve deploy --set gateway.retry_after_s=7", timeout_s=240, check=False).stdout
    assert "is changed" in shown, shown


def test_ports_listen_on_a_nodes_own_addresses_only(deployed: Deployed) -> None:
    for host in (deployed.head, deployed.near, deployed.far):
        everywhere = {
            port for address, port in host.listeners() if address in ("0.0.0.0", "*", "::") and port not in (22, PORT)
        }
        # Ray's own ports, which ask for its token: none of Tandem's is among them.
        owners = host.run("ss -Htlnp").stdout
        lines = [line for line in owners.splitlines() if re.search(rf":({'|'.join(map(str, everywhere))})\s", line)]
        assert [line for line in lines if re.search(r"haproxy|Gateway|Engine|Directory", line)] == []

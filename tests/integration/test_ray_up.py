"""Two hosts, brought up by `tandem cluster up`: training over both, one app on both, and nothing left after."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from bench.harness.ray_up import Deployment, deployment
from hosts import Host, skipped_where_unavailable, wait_until
from serve_fixtures import write_adapter, write_model

from tandem.cluster.node import GATEWAY_PORTS, HAPROXY_PORTS

# `ray up` over ssh, in network namespaces: five minutes.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PUBLIC_PORT = 8000
APP = """\
models: [{model: tiny, replicas: 2, cpus_per_replica: 1, max_adapters: 2}]
gateway: {replicas: 2}
"""
TRAINING = """\
name: small
data: {path: text, sequence_length: 64}
model: {architecture: llama, hidden_size: 32, num_layers: 2, num_heads: 2, num_kv_heads: 1, intermediate_size: 64}
parallel: {workers: 2, cpus_per_worker: 1.5}
steps: 6
batch_size: 4
"""


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A cluster that is up; taken down again at the end, with a look at what is left."""
    with skipped_where_unavailable(), deployment(tmp_path_factory.mktemp("ray-up")) as found:
        assert "is up: 2 nodes" in found.cluster("up")
        found.head.run("tandem db upgrade")
        yield found
        found.cluster("down")
        for host in (found.head, found.worker):
            # The workers too are ended, and not left to notice that the head has gone.
            wait_until(lambda host=host: not ray_processes(host), 15, f"processes of Ray are left on {host.name}")
            wait_until(
                lambda host=host: "tmp" not in host.run("ls /tmp/tandem-*").stdout.split(), 30, "scratch files are left"
            )


def ray_processes(host: Host) -> list[str]:
    shown = host.run("ps -eo args").stdout.splitlines()
    return [line for line in shown if re.match(r"\S*(ray::|raylet|gcs_server|haproxy|VLLM)", line)]


def ask(host: Host, model: str, key: str) -> tuple[dict[str, str], str]:
    """Headers and text of a greedy answer, asked on a host of its own public listener."""
    body = json.dumps({"model": model, "prompt": "the cat", "max_tokens": 8, "temperature": 0})
    shown = host.run(
        f"curl -sS -i -m 60 http://127.0.0.1:{PUBLIC_PORT}/v1/completions -H 'content-type: application/json' "
        f"-H 'x-api-key: {key}' -d '{body}'"
    ).stdout
    head, _, content = shown.replace("\r\n", "\n").partition("\n\n")
    assert head.startswith("HTTP/1.1 200"), shown
    headers = dict(line.split(": ", 1) for line in head.splitlines()[1:])
    return {name.lower(): value for name, value in headers.items()}, json.loads(content)["choices"][0]["text"]


def test_training_runs_over_both_hosts(deployed: Deployment) -> None:
    texts = deployed.shared / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"line {i} of a text. " * 20}) + "\n" for i in range(100)))
    (deployed.shared / "train.yaml").write_text(TRAINING)
    deployed.head.run(f"tandem data build {texts} text --vocab-size 512")
    shown = deployed.head.run(f"tandem train submit --config {deployed.shared}/train.yaml", timeout_s=240).stdout
    assert "small@1" in shown
    assert "2 workers on 2 nodes" in shown
    # Whichever node the driver ran on, the model is in the one registry.
    listed = json.loads(deployed.worker.run("tandem models ls --json").stdout)
    assert [each["id"] for each in listed] == ["small@1"]


def test_one_app_answers_on_both_hosts_and_knows_what_is_registered_on_either(deployed: Deployment) -> None:
    head, worker, shared = deployed.head, deployed.worker, deployed.shared
    base = write_model(shared / "tiny")
    red, blue = (write_adapter(shared / name, base, seed=seed) for seed, name in enumerate(("red", "blue")))
    (shared / "app.yaml").write_text(APP)
    register = f"from tandem.registry import Registry; Registry.open().register_model('tiny', '{base}')"
    head.run(f'python -c "{register}" && tandem adapters register red {red} --base tiny')
    # The gateways listen on the hosts' addresses.
    refused = head.run(f"tandem serve up -c {shared}/app.yaml --detach", check=False, timeout_s=120)
    assert refused.returncode != 0 and "there is no API key yet" in " ".join(refused.stdout.split())
    key = json.loads(head.run("tandem keys create first --json").stdout)["secret"]
    shown = head.run(f"tandem serve up -c {shared}/app.yaml --detach", timeout_s=300).stdout
    assert "taken more than" not in shown and "Serving at" in shown
    head.run(f"tandem serve deploy -c {shared}/app.yaml", timeout_s=120)

    # HAProxy of each host reaches the gateways of both, so each adds capacity.
    answers = {host.name: [ask(host, "red", key) for _ in range(6)] for host in (head, worker)}
    for seen in answers.values():
        assert len({headers["x-tandem-gateway"] for headers, _ in seen}) == 2
    assert len({text for seen in answers.values() for _, text in seen}) == 1

    worker.run(f"tandem adapters register blue {blue} --base tiny")
    assert ask(head, "blue", key)[1] == ask(worker, "blue", key)[1] != ask(head, "red", key)[1]

    for host in (head, worker):
        listening = host.listeners()
        assert {address for address, port in listening if port == PUBLIC_PORT} == {"127.0.0.1"}
        assert {address for address, port in listening if port in GATEWAY_PORTS} == {"127.0.0.1", host.address}
        assert {address for address, port in listening if port in HAPROXY_PORTS[:2]} == {"127.0.0.1"}


def test_a_tunnel_leads_to_the_app_of_the_head(deployed: Deployment) -> None:
    assert deployed.head.address in deployed.cluster("status")
    key = json.loads(deployed.head.run("tandem keys create tunnel --json").stdout)["secret"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tandem", "cluster", "tunnel", str(deployed.file), "--port", "18400"],
        env=deployed.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None and "http://127.0.0.1:18400/v1 leads to" in process.stdout.readline()
        listed = subprocess.run(
            ["curl", "-sS", "-m", "30", "http://127.0.0.1:18400/v1/models", "-H", f"x-api-key: {key}"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert "tiny" in listed.stdout
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)


def test_an_sqlite_registry_is_refused(deployed: Deployment) -> None:
    result = deployed.head.run(
        f"unset TANDEM_DATABASE_URL; tandem serve deploy -c {deployed.shared}/app.yaml", check=False, timeout_s=120
    )
    assert result.returncode != 0
    text = " ".join(result.stdout.split())
    assert f"This cluster has 2 nodes ({deployed.head.address}, {deployed.worker.address})" in text
    assert "Set TANDEM_DATABASE_URL to a PostgreSQL database" in text

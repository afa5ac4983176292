"""Node health on a real Ray cluster: each node reports, and a node that is cordoned gets no replica and no worker."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tandem.data.tokenize import train_tokenizer
from tandem.settings import child_environment

pytestmark = pytest.mark.slow  # a cluster of three nodes, an app that is deployed three times and two training runs


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What each step of cordoned_nodes.py gave, by the step's name."""
    folder = tmp_path_factory.mktemp("cordon")
    home = folder / "home"
    home.mkdir(mode=0o700)
    train_tokenizer(["some words to learn from"] * 5, folder / "tokenizer", vocab_size=280)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("cordoned_nodes.py")), str(folder / "tokenizer"), str(folder)],
        env=child_environment({"TANDEM_HOME": str(home), "RAY_ADDRESS": None, "OMP_NUM_THREADS": "1"}),
        capture_output=True,
        text=True,
        timeout=500,
    )
    found: dict[str, list[Any]] = {}
    for line in done.stdout.splitlines():
        if line.startswith('{"step"'):
            event = json.loads(line)
            found.setdefault(event["step"], []).append(event["value"])
    assert "drain" in found, done.stdout[-3000:] + done.stderr[-4000:]
    return found


def test_doctor_reports_every_node(steps: dict[str, list[Any]]) -> None:
    status, text = steps["doctor"][0]
    nodes = json.loads(text[text.index("{") :])["nodes"]
    assert len({node["node_id"] for node in nodes}) == 3
    for node in nodes:
        kinds = {finding["kind"] for finding in node["findings"]}
        assert {"rdma", "network_settings", "disk", "memory", "serving", "time"} <= kinds
        assert node["cordon"] is None
    assert status == int(any(node["severity"] == "bad" for node in nodes))


def test_a_deployment_says_that_haproxy_is_off(steps: dict[str, list[Any]]) -> None:
    (missing,) = steps["missing"]
    assert len(missing) == 1 and "HAProxy is off" in missing[0] and "tandem node start" in missing[0]


def test_a_cordoned_node_gets_no_training_worker_and_no_replica(steps: dict[str, list[Any]]) -> None:
    out, (status, said) = steps["cordon"][0]
    workers_before, replicas_before = steps["before"][0]
    assert out in workers_before and out in replicas_before
    assert status == 0 and "is cordoned" in said and "there and stay" in said
    workers, replicas, data = steps["after"][0]
    assert out not in workers and out not in replicas and out not in data
    assert len(replicas) == len(replicas_before)


def test_doctor_shows_the_cordon(steps: dict[str, list[Any]]) -> None:
    out = steps["cordon"][0][0]
    nodes = json.loads(steps["doctor"][1][1][steps["doctor"][1][1].index("{") :])["nodes"]
    assert {node["node_id"]: node["cordon"] for node in nodes if node["cordon"]} == {out: "a test"}


def test_an_uncordoned_node_gets_replicas_again(steps: dict[str, list[Any]]) -> None:
    assert steps["uncordon"][0][0] == 0
    replicas, selector = steps["again"][0]
    assert steps["cordon"][0][0] in replicas and selector == {}


def test_a_node_can_be_drained(steps: dict[str, list[Any]]) -> None:
    _, (status, said) = steps["drain"][0]
    assert status == 0 and "It is drained" in said

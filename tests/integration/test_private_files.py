"""No other user of the machine can change, read or connect to what a running cluster keeps, and nothing of it remains."""

from __future__ import annotations

import ipaddress
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from serve_fixtures import write_model

from tandem.settings import child_environment

WORLD = Path(__file__).with_name("private_world.py")
FREE = ("/dev/null", "/dev/urandom", "/dev/random", "/dev/ptmx", "/dev/tty", "/dev/pts/")
"""Devices that every user may use."""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can run a process as another user")


def serve_and_attack(model: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(WORLD), model],
        cwd=WORLD.parents[2],
        env=child_environment({"PYTHONPATH": os.pathsep.join(sys.path)}),
        capture_output=True,
        text=True,
        timeout=500,
    )
    if "Operation not permitted" in done.stderr and "fresh_folders" in done.stderr:
        pytest.skip("this container forbids mount namespaces (CAP_SYS_ADMIN)")
    assert done.returncode == 0, done.stderr[-5000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def check(found: dict[str, Any]) -> None:
    assert found["status"] == 200
    # The search found what it is about: the script that is executed, HAProxy's and Ray's sockets, the home.
    for part in ("/haproxy-edited", "/admin.sock", "/sockets/raylet", "/.tandem/cluster-", "/.ray/auth_token"):
        assert any(part in path for path in found["paths"]), part
    assert any(path.endswith("/raylet") for path in found["sockets"])
    assert found["home"] == "0o700" and found["admin"] == ["0o600"]
    # Programs may be read by everybody, and so may the folders of libraries' caches, which hold no secrets.
    readable = (sys.prefix, sys.base_prefix, "/usr", "/lib", "/opt", "/etc", "/tmp/home/.cache")
    harmful = [
        each
        for each in found["done"]
        if not each.split(" ", 1)[1].startswith(FREE)
        and not (each.startswith("read ") and each.split(" ", 1)[1].startswith(readable))
    ]
    assert harmful == []


def check_addresses(found: dict[str, Any]) -> None:
    assert len(found["listening"]) > 10
    assert [each for each in found["listening"] if not is_loopback(each[0])] == []
    said = [answer for each in found["answers"].values() for answer in each]
    # Four of Ray's gRPC services and three of its HTTP servers ask for the token; nobody does as told without it.
    assert said.count("UNAUTHENTICATED") >= 4 and said.count(401) >= 3
    assert [a for a in said if a == 200 or str(a).startswith("OK")] == []


def is_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    mapped = getattr(parsed, "ipv4_mapped", None)
    return bool((mapped or parsed).is_loopback)


def test_another_user_can_do_nothing_to_a_cluster_and_nothing_of_it_remains() -> None:
    found = serve_and_attack("echo")
    check(found)
    check_addresses(found)
    assert found["after"] == []


@pytest.mark.slow  # the attack of the test above, on a vLLM engine
def test_another_user_can_do_nothing_to_vllm_and_nothing_of_it_remains() -> None:
    # Not below /tmp, which the world replaces.
    folder = Path("/var/tmp") / f"tandem-test-{os.getpid()}"
    write_model(folder / "tiny")
    try:
        found = serve_and_attack(str(folder / "tiny"))
    finally:
        shutil.rmtree(folder)
    check(found)
    check_addresses(found)
    # vLLM's sockets are among what was attacked.
    assert any("/tmp/tandem-" in path and "/tmp/" in path.split("/tmp/tandem-", 1)[1] for path in found["sockets"])
    assert found["after"] == []

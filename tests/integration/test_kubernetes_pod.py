"""A pod's script with a real Ray node, as process 1 of namespaces of its own, which is what a container's first process is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hosts import REPOSITORY, require_namespaces

from tandem.cluster.kubernetes import pods

# Half a minute: a Ray head starts.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

GENERATED = (
    f"ray start --head  --block  --dashboard-agent-listen-port={pods.AGENT_PORT}  --dashboard-host=0.0.0.0  --labels=pool=serve "
    f" --metrics-export-port={pods.METRICS_PORT}  --num-cpus=0  --node-ip-address=127.0.0.1 "
)
"""The command that KubeRay generates for a head; the address is of these namespaces alone."""
WATCH = f"""\
ip link set lo up
mount -t tmpfs tmpfs /run && mkdir -m 0700 /run/tandem
(
  until curl -s -m 2 --fail -o "$SEEN/health" http://127.0.0.1:{pods.AGENT_PORT}/api/healthz; do sleep 1; done
  # As the kubelet does; the kernel hands it on only if the process has asked for it.
  kill -TERM 1
) &
exec /bin/bash -c "$START"
"""


def test_a_pods_node_is_healthy_without_a_token_and_ends_with_its_pod(tmp_path: Path) -> None:
    require_namespaces()
    for name in ("home", "shared"):
        (tmp_path / name).mkdir(mode=0o700)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY / "platform"),
        "HOME": str(tmp_path / "home"),
        "TANDEM_HOME": str(tmp_path / "shared"),
        # Short, for the paths of sockets; it is in these namespaces alone.
        "TANDEM_RUNTIME_DIR": "/run/tandem",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
        "KUBERAY_GEN_RAY_START_CMD": GENERATED,
        "START": pods.START,
        "SEEN": str(tmp_path),
    }
    result = subprocess.run(
        ["unshare", "--net", "--pid", "--fork", "--mount-proc", "--ipc", "--mount", "bash", "-c", WATCH],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (tmp_path / "health").read_text() == "raylet: success\ngcs: success", result.stdout + result.stderr
    assert "Ended " in result.stdout, result.stdout + result.stderr

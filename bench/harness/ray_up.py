"""Two hosts for `tandem cluster up`, with the on-premises cluster file filled in for them; used by measurements and tests."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from bench.harness.hosts import REPOSITORY, SUBNET, Host, hosts
from bench.harness.postgresql import Server, postgresql


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """What `ray up` makes a cluster of, and how to call it."""

    head: Host
    worker: Host
    shared: Path
    """A folder that both hosts see at this path."""
    database: Server
    file: Path
    """The cluster file."""
    client: Path
    """The home directory of the user who starts the cluster."""

    @property
    def environment(self) -> dict[str, str]:
        """Variables of that user's commands."""
        own = {
            "HOME": str(self.client),
            "TANDEM_HOME": str(self.client / "tandem"),
            "RAY_ADDRESS": "",
            "COLUMNS": "160",
        }
        return {**os.environ, **own}

    def cluster(self, command: str) -> str:
        """Run `tandem cluster` on this machine; AssertionError with its output if it fails."""
        result = subprocess.run(
            [sys.executable, "-m", "tandem", "cluster", command, str(self.file)],
            env=self.environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
        return result.stdout


@contextlib.contextmanager
def deployment(folder: Path) -> Iterator[Deployment]:
    """Hosts and a cluster file for the length of a block; the cluster is not up yet. UnavailableError where there can be none."""
    shared, client = folder / "shared", folder / "client"
    shared.mkdir(parents=True)
    (client / ".ray").mkdir(parents=True)
    token = client / ".ray" / "auth_token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    with hosts(2, folder / "hosts", [shared]) as (head, worker), postgresql(f"{SUBNET}.1") as database:
        path = f"{Path(sys.executable).parent}:$PATH\nPYTHONPATH={REPOSITORY / 'platform'}\nOMP_NUM_THREADS=1"
        environment = (REPOSITORY / "deploy" / "tandem.env.example").read_text()
        for name, value in (
            ("PATH", path),
            ("TANDEM_HOME", str(shared / "home")),
            ("TANDEM_DATABASE_URL", f"'{database.create('tandem')}'"),
        ):
            environment = re.sub(rf"^{name}=.*$", f"{name}={value}", environment, flags=re.MULTILINE)
        (folder / "tandem.env").write_text(environment)
        config = yaml.safe_load((REPOSITORY / "deploy" / "onprem" / "cluster.yaml").read_text())
        config |= {
            # Ray keeps the state of a cluster under its name.
            "cluster_name": f"tandem-{secrets.token_hex(4)}",
            "provider": {"type": "local", "head_ip": head.address, "worker_ips": [worker.address]},
            "auth": {"ssh_user": "root", "ssh_private_key": str(head.key)},
            "min_workers": 1,
            "max_workers": 1,
            "file_mounts": {"~/.ray/auth_token": str(token), "~/.tandem.env": str(folder / "tandem.env")},
            # The environment is this one, which the hosts see.
            "setup_commands": [each for each in config["setup_commands"] if "make setup" not in each],
        }
        file = folder / "cluster.yaml"
        file.write_text(yaml.safe_dump(config))
        yield Deployment(head=head, worker=worker, shared=shared, database=database, file=file, client=client)

"""Ray's cluster launcher (`ray up`) for a cluster file, with checks before it and its faults on machines of one's own mended.

With the provider `local`, Ray 2.60's newer autoscaler never starts a worker, and `ray down` ends the head alone.
"""

from __future__ import annotations

import re
import shutil
import stat
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.cluster.process import run_program
from tandem.config.load import read_yaml
from tandem.config.ssh import SshConfig
from tandem.errors import ClusterError, ConfigError
from tandem.settings import child_environment

COMMAND_TIMEOUT_S = 120.0
"""Seconds that a command on the head may take."""
UP_TIMEOUT_S = 1800.0
"""Seconds that the head may take: a cloud's machine starts, and its environment is installed."""
JOIN_TIMEOUT_S = 1800.0
"""Seconds that the nodes of `min_workers` may take after the head."""
POLL_S = 3.0
PLACEHOLDER = re.compile(r"<[a-z][^<>]*>")
"""What a user has to fill in."""
ALIVE = re.compile(r"^ (\d+) (\S+)$", re.MULTILINE)
"""A line of `ray status` about active nodes: their number and kind."""


@dataclass(frozen=True, slots=True)
class ClusterFile:
    """A file of `ray up`, read and checked."""

    path: Path
    values: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> ClusterFile:
        """ConfigError if it is none."""
        if not path.is_file():
            raise ConfigError(
                f"There is no file {path}. cluster.yaml at the top of the repository is for AWS; deploy/ has others."
            )
        values = read_yaml(path)
        if "provider" not in values or "cluster_name" not in values:
            raise ConfigError(f"{path} is no cluster file: it has no `provider` or no `cluster_name`.")
        return cls(path, values)

    @property
    def is_local(self) -> bool:
        """Whether its machines are there already, and are reached over SSH."""
        return bool(self.values["provider"].get("type") == "local")

    @property
    def workers(self) -> int:
        """Nodes beside the head that are there from the start."""
        types = self.values.get("available_node_types")
        if not types:
            return int(self.values.get("min_workers", 0))
        head = self.values.get("head_node_type")
        return sum(int(kind.get("min_workers", 0)) for name, kind in types.items() if name != head)

    def login(self, head: str) -> SshConfig:
        """The way to the head by SSH, as the launcher takes it."""
        auth = self.values.get("auth", {})
        return SshConfig(host=f"{auth['ssh_user']}@{head}", key=auth.get("ssh_private_key"), check_host=False)

    def check(self) -> None:
        """ConfigError for what `ray up` would find minutes later, or not at all: placeholders and files that are missing."""
        for number, line in enumerate(self.path.read_text().splitlines(), start=1):
            if found := PLACEHOLDER.search(line.partition("#")[0]):
                raise ConfigError(f"{self.path} line {number} still has the placeholder {found[0]}. Fill it in.")
        for remote, local in self.values.get("file_mounts", {}).items():
            source = Path(local).expanduser()
            if not source.exists():
                raise ConfigError(f"{self.path} copies {local} to {remote}, and it is not here.{_missing_hint(local)}")
            if local.endswith(".env") and (found := PLACEHOLDER.search(_values_of(source))):
                raise ConfigError(f"{local} still has the placeholder {found[0]}. Fill it in.")
            if local.endswith("auth_token") and stat.S_IMODE(source.stat().st_mode) & 0o077:
                raise ConfigError(f"{local} can be read by others. Run `chmod 600 {local}`.")
        for tool in ("ssh", "rsync"):
            if shutil.which(tool) is None:
                raise ClusterError(f"This machine has no `{tool}`, which Ray's launcher needs.")


class Launcher:
    """One cluster of a file."""

    def __init__(self, file: ClusterFile) -> None:
        self.file = file

    def up(self) -> str:
        """Start the head, or update it; returns its address. Ray's own progress goes to the terminal."""
        self.file.check()
        status = self._ray("up", "-y", timeout_s=UP_TIMEOUT_S, quiet=False).returncode
        if status:
            raise ClusterError(f"`ray up` ended with status {status}; what it said is above.")
        return self.head()

    def wait_for_workers(self) -> int:
        """Wait until all nodes that are to be there from the start are; returns their number with the head."""
        wanted = 1 + self.file.workers
        deadline = time.monotonic() + JOIN_TIMEOUT_S
        while (alive := self.nodes()) < wanted:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"{alive} of {wanted} nodes are up {JOIN_TIMEOUT_S:.0f} s after the head. `tandem cluster status` shows why."
                )
            time.sleep(POLL_S)
        return alive

    def head(self) -> str:
        """The head's address; ClusterError if the cluster is not up."""
        result = self._ray("get-head-ip", timeout_s=COMMAND_TIMEOUT_S)
        address = result.stdout.strip().splitlines()[-1] if result.stdout.strip() else ""
        if result.returncode or not address:
            raise ClusterError(
                f"{self.file.values['cluster_name']} is not up. `tandem cluster up {self.file.path}` starts it."
            )
        return address

    def nodes(self) -> int:
        """Nodes that are up, the head among them; 0 while the head does not answer."""
        try:
            result = self._ray("exec", "ray status", timeout_s=COMMAND_TIMEOUT_S)
        except ClusterError:
            return 0
        return 0 if result.returncode else active_nodes(result.stdout)

    def run(self, command: str) -> str:
        """Output of a command on the head; ClusterError if it fails."""
        result = self._ray("exec", command, timeout_s=COMMAND_TIMEOUT_S)
        if result.returncode:
            raise ClusterError(f"`{command}` failed on the head: {(result.stderr or result.stdout).strip()[-2000:]}")
        return result.stdout

    def down(self) -> None:
        """End all nodes."""
        workers = self.file.values["provider"].get("worker_ips", ()) if self.file.is_local else ()
        status = self._ray("down", "-y", timeout_s=UP_TIMEOUT_S, quiet=False).returncode
        if status:
            raise ClusterError(f"`ray down` ended with status {status}; what it said is above.")
        silent = []
        for address in workers:
            login = self.file.login(address)
            command = ["ssh", *login.options(), login.host, "bash --login -ic 'tandem node stop'"]
            # One that does not answer must not keep the others up.
            try:
                run_program(command, timeout_s=COMMAND_TIMEOUT_S, hint="Is the machine up?")
            except ClusterError as error:
                silent.append(str(error))
        if silent:
            raise ClusterError(f"{len(silent)} of {len(workers)} workers may still run Ray: {' '.join(silent)}")

    def _ray(
        self, verb: str, *arguments: str, timeout_s: float, quiet: bool = True
    ) -> subprocess.CompletedProcess[str]:
        # `ray exec FILE COMMAND`, but `ray up -y FILE`.
        options = [argument for argument in arguments if argument.startswith("-")]
        words = [argument for argument in arguments if not argument.startswith("-")]
        command = [sys.executable, "-m", "ray.scripts.scripts", verb, *options, str(self.file.path), *words]
        environment = child_environment(
            {"RAY_ADDRESS": None, **({"RAY_UP_enable_autoscaler_v2": "0"} if self.file.is_local else {})}
        )
        hint = "Check that the head can be reached by ssh; the same command goes on where it ended."
        return run_program(command, timeout_s=timeout_s, hint=hint, environment=environment, quiet=quiet)


def active_nodes(shown: str) -> int:
    """The number of active nodes in what `ray status` prints."""
    active = shown.partition("Active:")[2].partition("Pending:")[0]
    return sum(int(count) for count, _ in ALIVE.findall(active.replace("\r", "")))


def _values_of(path: Path) -> str:
    """The lines of an environment file without comments."""
    return "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith("#"))


def _missing_hint(local: str) -> str:
    if local.endswith("auth_token"):
        return " `ray get-auth-token --generate` makes one."
    if local.endswith("tandem.env"):
        return " Copy deploy/tandem.env.example to it, and fill it in."
    return ""

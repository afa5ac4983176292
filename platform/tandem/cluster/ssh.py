"""One SSH connection for many commands and forwarded ports, by the `ssh` command.

It is a master connection (`ControlMaster`): a password or a second factor is asked for once.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from tandem.cluster.ports import free_ports
from tandem.config.ssh import SshConfig
from tandem.errors import ClusterError
from tandem.private import make_temporary_folder, remove_private_folder

CONNECT_S = 60.0
"""Seconds for a master connection: a person may have to type a password and a code."""
ALIVE_S = 2
"""Seconds between ssh's probes of the connection, of which two without an answer end it."""


@dataclass(slots=True)
class SshConnection:
    """A master connection to a host; commands and forwarded ports go through it."""

    config: SshConfig
    folder: Path = field(default_factory=lambda: make_temporary_folder("tandem-ssh-"))

    @property
    def _socket(self) -> Path:
        return self.folder / "s"

    def options(self) -> list[str]:
        """Options that all calls of ssh share."""
        return [
            *self.config.options(),
            "-o",
            f"ControlPath={self._socket}",
            "-o",
            f"ServerAliveInterval={ALIVE_S}",
            "-o",
            "ServerAliveCountMax=2",
        ]

    def open(self) -> None:
        """Connect; ssh asks for a password or a code on the terminal where it needs one. ClusterError if it cannot."""
        command = [
            "ssh",
            *self.options(),
            "-M",
            "-N",
            "-f",
            "-o",
            "ControlPersist=yes",
            "-o",
            "ConnectTimeout=15",
            self.config.host,
        ]
        # Its questions and errors go to the terminal.
        done = subprocess.run(command, stdout=subprocess.DEVNULL, timeout=None, check=False)
        if done.returncode:
            raise ClusterError(
                f"`ssh {self.config.host}` failed; what it said is above. Check the host and the way to it."
            )

    def is_open(self) -> bool:
        """Whether the master connection is up."""
        return self._control("check") == 0

    def run(self, command: str) -> str:
        """Run a command on the host; ClusterError with its output if it fails."""
        words = ["ssh", *self.options(), self.config.host, command]
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=CONNECT_S, check=False
        )
        if done.returncode:
            raise ClusterError(f"`{command}` failed on {self.config.host}: {(done.stderr or done.stdout).strip()}")
        return done.stdout

    def forward(self, host: str, port: int) -> int:
        """A free port of this machine that leads to `host:port` as the host sees it."""
        (local,) = free_ports(1)
        status = self._control("forward", "-L", f"127.0.0.1:{local}:{host}:{port}")
        if status:
            raise ClusterError(f"ssh could not forward a port to {host}:{port} through {self.config.host}.")
        return local

    def close(self) -> None:
        """End the connection, and all that goes through it."""
        self._control("exit")
        remove_private_folder(self.folder)

    def _control(self, verb: str, *arguments: str) -> int:
        command = ["ssh", *self.options(), "-O", verb, *arguments, self.config.host]
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False
        ).returncode

"""One SSH connection for many commands and forwarded ports, by the `ssh` command.

It is a master connection (`ControlMaster`): a password or a second factor is asked for once.
"""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Self

from tandem.cluster.ports import free_ports
from tandem.cluster.process import run_program
from tandem.config.ssh import SshConfig
from tandem.errors import ClusterError
from tandem.private import make_temporary_folder, remove_private_folder

COMMAND_S = 60.0
"""Seconds that a command on the host may take, unless the caller says otherwise."""
CONTROL_S = 20.0
"""Seconds that the process of the master connection may take to answer; it is on this machine."""
CONNECT_S, CONNECT_AGAIN_S = 15, 5
"""Seconds for the connection itself: first, and again after it was lost. Then the host is known, and its network may come back
at any moment, which a new attempt notices sooner than one that waits."""
LINES_S = 1.0
"""Seconds after the end of an attempt for its last lines."""
ALIVE_S = 2
"""Seconds between ssh's probes of the connection, of which two without an answer end it."""


@dataclass(slots=True)
class SshConnection:
    """A master connection to a host; commands and forwarded ports go through it. As a context manager it opens and closes it."""

    config: SshConfig
    folder: Path = field(default_factory=lambda: make_temporary_folder("tandem-ssh-"))

    def __enter__(self) -> Self:
        try:
            self.open()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def _socket(self) -> Path:
        return self.folder / "s"

    def options(self) -> list[str]:
        """Options that all calls of ssh share."""
        settings = (f"ControlPath={self._socket}", f"ServerAliveInterval={ALIVE_S}", "ServerAliveCountMax=2")
        return [*self.config.options(), *(word for setting in settings for word in ("-o", setting))]

    def open(self) -> None:
        """Connect; ssh asks for a password or a code on the terminal where it needs one. ClusterError if it cannot."""
        # Its questions and errors go to the terminal; a person may take any time to answer.
        status = subprocess.run(self._master(CONNECT_S), stdout=subprocess.DEVNULL, check=False).returncode
        self._check(status)

    def open_again(self, on_line: Callable[[str], None]) -> None:
        """Connect after the connection was lost. `on_line` gets what ssh says, line by line; questions go to the terminal."""
        # Left by a process that was killed. ssh would connect all the same, without commands or forwarded ports.
        self._socket.unlink(missing_ok=True)
        process = subprocess.Popen(
            self._master(CONNECT_AGAIN_S), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        # In a thread, because the process of the connection may keep the pipe open.
        reading = threading.Thread(target=_pass_lines, args=(process.stderr, on_line), daemon=True)
        reading.start()
        status = process.wait()
        reading.join(LINES_S)
        self._check(status)

    def _master(self, connect_s: int) -> list[str]:
        options = ["-M", "-N", "-f", "-o", "ControlPersist=yes", "-o", f"ConnectTimeout={connect_s}"]
        return ["ssh", *self.options(), *options, self.config.host]

    def _check(self, status: int) -> None:
        if status:
            raise ClusterError(
                f"`ssh {self.config.host}` failed; what it said is above. Check the host and the way to it."
            )

    def is_open(self) -> bool:
        """Whether the master connection is up."""
        return self._control("check") == 0

    def words(self, command: str) -> list[str]:
        """The words that run a shell command on the host through this connection."""
        return ["ssh", *self.options(), self.config.host, command]

    def run(self, command: str, *, timeout_s: float = COMMAND_S) -> str:
        """Run a command on the host; ClusterError with its output if it fails, or does not end within `timeout_s`."""
        done = run_program(
            self.words(command),
            timeout_s=timeout_s,
            hint=f"`ssh {self.config.host}` shows whether the host answers; run the command there by hand.",
            name=f"`{command}` on {self.config.host}",
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
        with contextlib.suppress(ClusterError):
            self._control("exit")
        remove_private_folder(self.folder)

    def _control(self, verb: str, *arguments: str) -> int:
        command = ["ssh", *self.options(), "-O", verb, *arguments, self.config.host]
        hint = f"`ssh {self.config.host}` shows whether the host answers."
        return run_program(command, timeout_s=CONTROL_S, hint=hint).returncode


def connected(config: SshConfig | None) -> AbstractContextManager[SshConnection | None]:
    """A connection for the length of a block; None where there is nothing to connect to: this machine is the host."""
    return contextlib.nullcontext() if config is None else SshConnection(config)


def _pass_lines(stream: IO[str], on_line: Callable[[str], None]) -> None:
    with stream:
        for line in stream:
            if text := line.strip():
                on_line(text)

"""A local port that leads to the app of a Slurm job, by SSH through the login node.

Clients connect to a listener of this process, which opens a connection of its own through ssh for each of theirs. So the port
stays when ssh has to connect again, and new connections can go to a job's successor while old ones end on the job before.

All of ssh's work goes over one master connection (`ControlMaster`): a password or a second factor is asked for once.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tandem.cluster.ports import free_ports
from tandem.config.slurm import LoginConfig
from tandem.errors import ClusterError
from tandem.private import make_temporary_folder, remove_private_folder

CONNECT_S = 60.0
"""Seconds for a master connection: a person may have to type a password and a code."""
ALIVE_S = 2
"""Seconds between ssh's probes of the connection, of which two without an answer end it."""
RETRY_S = 0.5
CHUNK_BYTES = 64 * 1024


@dataclass(slots=True)
class SshConnection:
    """A master connection to the login node; commands and forwards go through it."""

    login: LoginConfig
    folder: Path = field(default_factory=lambda: make_temporary_folder("tandem-ssh-"))

    @property
    def _socket(self) -> Path:
        return self.folder / "s"

    def options(self) -> list[str]:
        """Options that all calls of ssh share."""
        found = [
            "-o",
            f"ControlPath={self._socket}",
            "-o",
            f"ServerAliveInterval={ALIVE_S}",
            "-o",
            "ServerAliveCountMax=2",
        ]
        if self.login.config is not None:
            found += ["-F", self.login.config]
        if self.login.port is not None:
            found += ["-p", str(self.login.port)]
        if self.login.jump:
            found += ["-J", ",".join(self.login.jump)]
        return found

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
            self.login.host,
        ]
        # Its questions and errors go to the terminal.
        done = subprocess.run(command, stdout=subprocess.DEVNULL, timeout=None, check=False)
        if done.returncode:
            raise ClusterError(
                f"`ssh {self.login.host}` failed; what it said is above. Check `login` in the site's config."
            )

    def is_open(self) -> bool:
        """Whether the master connection is up."""
        return self._control("check") == 0

    def run(self, command: str) -> str:
        """Run a command on the login node; ClusterError with its output if it fails."""
        words = ["ssh", *self.options(), self.login.host, command]
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=CONNECT_S, check=False
        )
        if done.returncode:
            raise ClusterError(f"`{command}` failed on {self.login.host}: {(done.stderr or done.stdout).strip()}")
        return done.stdout

    def forward(self, host: str, port: int) -> int:
        """A free port of this machine that leads to `host:port` as the login node sees it."""
        (local,) = free_ports(1)
        status = self._control("forward", "-L", f"127.0.0.1:{local}:{host}:{port}")
        if status:
            raise ClusterError(f"ssh could not forward a port to {host}:{port} through {self.login.host}.")
        return local

    def close(self) -> None:
        """End the connection, and all that goes through it."""
        self._control("exit")
        remove_private_folder(self.folder)

    def _control(self, verb: str, *arguments: str) -> int:
        command = ["ssh", *self.options(), "-O", verb, *arguments, self.login.host]
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False
        ).returncode


@dataclass(frozen=True, slots=True)
class Target:
    """An app that a tunnel leads to: Slurm's id of its job, and its node and port."""

    job_id: str
    host: str
    port: int


class Tunnel:
    """A listener on this machine whose connections lead to a job's app."""

    def __init__(
        self,
        ssh: SshConnection | None,
        target: Target,
        find_target: Callable[[], Target | None],
        on_message: Callable[[str], None] = lambda message: None,
    ) -> None:
        """`ssh`: None on a machine that reaches the nodes itself.

        `find_target`: the app that new connections are to reach now, None where that is not known; it blocks, and is called again
        and again. It raises JobEndedError where there is none any more.
        """
        self._ssh = ssh
        self._target = target
        self._find_target = find_target
        self._on_message = on_message
        self._entry: tuple[str, int] | None = None
        """Where connections to the target begin: a forwarded port of this machine, or the target itself."""
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._watch_task: asyncio.Task[None] | None = None

    async def start(self, port: int) -> int:
        """Listen on a `port` of loopback (0: a free one); returns it. ClusterError if it is taken."""
        await asyncio.to_thread(self._enter)
        try:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        except OSError as error:
            raise ClusterError(f"Port {port} of this machine is taken. Choose another one: --port.") from error
        self._watch_task = asyncio.create_task(self._watch())
        return int(self._server.sockets[0].getsockname()[1])

    async def wait(self) -> None:
        """Until the target's job has ended and nothing succeeds it."""
        assert self._watch_task is not None
        await self._watch_task

    async def stop(self) -> None:
        """Close the listener and all connections."""
        if self._watch_task is not None:
            self._watch_task.cancel()
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _enter(self) -> None:
        if self._ssh is None:
            self._entry = (self._target.host, self._target.port)
            return
        if not self._ssh.is_open():
            self._ssh.open()
        self._entry = ("127.0.0.1", self._ssh.forward(self._target.host, self._target.port))

    async def _watch(self) -> None:
        """Connect again where ssh has lost its connection, and follow the job to its successor."""
        while True:
            await asyncio.sleep(RETRY_S)
            try:
                if self._ssh is not None and not await asyncio.to_thread(self._ssh.is_open):
                    self._on_message("The connection to the login node is lost; connecting again.")
                    await asyncio.to_thread(self._enter)
                    self._on_message("Connected again.")
                target = await asyncio.to_thread(self._find_target)
                if target is not None and target != self._target:
                    self._target = target
                    await asyncio.to_thread(self._enter)
                    self._on_message(f"New connections go to job {target.job_id} now.")
            except JobEndedError:
                return
            except ClusterError as error:
                self._on_message(str(error))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None and self._entry is not None
        self._tasks.add(task)
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._entry)
            try:
                await asyncio.gather(_copy(reader, far_writer), _copy(far_reader, writer))
            finally:
                far_writer.close()
        except (OSError, asyncio.CancelledError):
            pass  # the client sees its connection end; tasks are cancelled by `stop` alone
        finally:
            self._tasks.discard(task)
            writer.close()


class JobEndedError(ClusterError):
    """The job has ended, and none succeeds it."""


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy one direction until its end, and pass the end on."""
    while chunk := await reader.read(CHUNK_BYTES):
        writer.write(chunk)
        await writer.drain()
    with contextlib.suppress(OSError):
        writer.write_eof()

"""A local port that leads to an app on a cluster, by SSH.

Clients connect to a listener of this process, which opens a connection of its own through ssh for each of theirs. So the port
stays when ssh has to connect again, and new connections can go to another app while old ones end on the one before.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from tandem.cluster.ssh import SshConnection
from tandem.errors import ClusterError

RETRY_S = 0.5
CHUNK_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Target:
    """An app that a tunnel leads to: its name for messages, and host and port as the far end of the SSH connection sees them."""

    name: str
    host: str
    port: int


class Tunnel:
    """A listener on this machine whose connections lead to an app."""

    def __init__(
        self,
        ssh: SshConnection | None,
        target: Target,
        find_target: Callable[[], Target | None],
        on_message: Callable[[str], None] = lambda message: None,
    ) -> None:
        """`ssh`: None on a machine that reaches the app itself.

        `find_target`: the app that new connections are to reach now, None where that is not known; it blocks, and is called again
        and again. It raises AppEndedError where there is none any more.
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
        """Until the app has ended and nothing succeeds it."""
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
        """Connect again where ssh has lost its connection, and follow the app to its successor."""
        while True:
            await asyncio.sleep(RETRY_S)
            try:
                if self._ssh is not None and not await asyncio.to_thread(self._ssh.is_open):
                    self._on_message("The SSH connection is lost; connecting again.")
                    await asyncio.to_thread(self._enter)
                    self._on_message("Connected again.")
                target = await asyncio.to_thread(self._find_target)
                if target is not None and target != self._target:
                    self._target = target
                    await asyncio.to_thread(self._enter)
                    self._on_message(f"New connections go to {target.name} now.")
            except AppEndedError:
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


class AppEndedError(ClusterError):
    """The app has ended, and none succeeds it."""


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy one direction until its end, and pass the end on."""
    while chunk := await reader.read(CHUNK_BYTES):
        writer.write(chunk)
        await writer.drain()
    with contextlib.suppress(OSError):
        writer.write_eof()

"""A local port that leads to an app on a cluster, by SSH.

Clients connect to a listener of this process, which opens a connection of its own through ssh for each of theirs. So the port
stays when ssh has to connect again, and new connections can go to another app while old ones end on the one before.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tandem.cluster.ssh import SshConnection
from tandem.errors import ClusterError

RETRY_S = 0.5
REMIND_S, REMIND_MOST_S = 30.0, 600.0
"""Seconds after which a message that is still true is given again: at first, and at most."""
CHUNK_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Target:
    """An app that a tunnel leads to: its name for messages, and host and port as the far end of the SSH connection sees them."""

    name: str
    host: str
    port: int


@dataclass(slots=True)
class Reminders:
    """Passes a message on once, and again at growing intervals for as long as it is repeated."""

    tell: Callable[[str], None]
    _due: dict[str, tuple[float, float]] = field(default_factory=dict)
    """When each message is due again, and the interval after that, in seconds."""

    def __call__(self, message: str) -> None:
        """Take one repetition of a message."""
        now = time.monotonic()
        due_at, interval_s = self._due.get(message, (now, REMIND_S))
        if now >= due_at:
            self._due[message] = (now + interval_s, min(2 * interval_s, REMIND_MOST_S))
            self.tell(message)

    def forget(self) -> None:
        """Take what comes next as new."""
        self._due.clear()


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
        self._remind = Reminders(on_message)
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

    async def run(self, port: int, on_open: Callable[[int], None]) -> None:
        """`start`, `wait` and `stop`; `on_open` gets the port."""
        on_open(await self.start(port))
        try:
            await self.wait()
        finally:
            await self.stop()

    async def wait(self) -> None:
        """Until the app has ended and nothing succeeds it."""
        assert self._watch_task is not None
        await self._watch_task

    async def stop(self) -> None:
        """Close the listener and all connections."""
        if self._server is not None:
            self._server.close()
        tasks = [*self._tasks, *([] if self._watch_task is None else [self._watch_task])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _enter(self) -> None:
        if self._ssh is None:
            self._entry = (self._target.host, self._target.port)
            return
        if not self._ssh.is_open():
            self._ssh.open_again(self._remind)
        self._entry = ("127.0.0.1", self._ssh.forward(self._target.host, self._target.port))

    async def _watch(self) -> None:
        """Connect again where ssh has lost its connection, and follow the app to its successor."""
        while True:
            await asyncio.sleep(RETRY_S)
            try:
                if self._ssh is not None and not await asyncio.to_thread(self._ssh.is_open):
                    self._remind("The SSH connection is lost; connecting again.")
                    await asyncio.to_thread(self._enter)
                    self._remind.forget()
                    self._on_message("Connected again.")
                target = await asyncio.to_thread(self._find_target)
                if target is not None and target != self._target:
                    self._target = target
                    await asyncio.to_thread(self._enter)
                    self._on_message(f"New connections go to {target.name} now.")
            except AppEndedError:
                # What listens at its address from now on is not known.
                if self._server is not None:
                    self._server.close()
                return
            except ClusterError as error:
                self._remind(str(error))

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


@contextlib.contextmanager
def in_background(tunnel: Tunnel, port: int = 0) -> Iterator[int]:
    """A tunnel for the length of a block, in a thread of its own; yields its port. ClusterError as `start` raises it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="tandem-tunnel", daemon=True)
    thread.start()
    try:
        yield asyncio.run_coroutine_threadsafe(tunnel.start(port), loop).result()
    finally:
        asyncio.run_coroutine_threadsafe(tunnel.stop(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy one direction until its end, and pass the end on."""
    while chunk := await reader.read(CHUNK_BYTES):
        writer.write(chunk)
        await writer.drain()
    with contextlib.suppress(OSError):
        writer.write_eof()

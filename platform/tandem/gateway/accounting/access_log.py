"""Access log: one JSON line for each request that a key or token was accepted for, without any of its content.

Lines are collected in the event loop and written by a thread. Where the disk is slower than the requests, lines are dropped and
counted, and the log says how many.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import time
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tandem.gateway.errors import masked_path, path_below, request_id
from tandem.gateway.identity.client_address import client_address
from tandem.private import make_private_folder
from tandem.tasks import stop

ENTRY_KEY = "tandem.access"
"""Key of a scope: the fields of the request's line."""
MAX_FILE_BYTES, KEPT_FILES = 64 * 2**20, 4
FILE_PATTERN = "access-*.jsonl*"
"""Files of all gateways in the folder."""
RETENTION_S = 7 * 86_400.0
"""Seconds for which files of ended gateways are kept after their last line."""
WRITE_INTERVAL_S = 0.5
REFUSED_INTERVAL_S = 1.0
"""Seconds between two lines with the number of refused requests."""
MAX_PENDING = 50_000
"""Lines that wait to be written."""
UNLOGGED_PATHS = frozenset({"/health", "/health/live", "/health/ready"})
"""Paths without lines: probes ask for them every second."""

log = logging.getLogger(__name__)


class AccessLog:
    """The file and the lines to be written. It is opened for each batch, so that other programs may move or remove it."""

    def __init__(self, path: Path) -> None:
        self.route_segments: frozenset[str] = frozenset()
        """The fixed parts of the app's routes; other parts of a path are masked in lines, since they may be a secret."""
        self._path = path
        self._lines: list[dict[str, Any]] = []
        self._num_dropped = 0
        self._num_refused = 0
        self._refused_written_at = -math.inf
        self._render = structlog.processors.JSONRenderer()
        self._writer_task: asyncio.Task[None] | None = None

    def add(self, line: dict[str, Any]) -> None:
        """Write a line soon."""
        if len(self._lines) >= MAX_PENDING:
            self._num_dropped += 1
        else:
            self._lines.append(line)

    def count_refused(self) -> None:
        """Count a request without a valid key. One line has the number of all within REFUSED_INTERVAL_S, so that a flood of them
        does not rotate the lines of others away. The audit log has their addresses.
        """
        self._num_refused += 1

    def start(self) -> None:
        """Begin to write; needs a running event loop."""
        self._writer_task = asyncio.create_task(self._write())

    async def stop(self) -> None:
        """Write the remaining lines."""
        await stop(self._writer_task)
        await asyncio.to_thread(self._flush, final=True)

    async def _write(self) -> None:
        await asyncio.to_thread(self._remove_old)
        while True:
            await asyncio.sleep(WRITE_INTERVAL_S)
            if self._lines or self._num_dropped or self._num_refused:
                await asyncio.to_thread(self._flush)

    def _flush(self, *, final: bool = False) -> None:
        lines, self._lines = self._lines, []
        num_dropped, self._num_dropped = self._num_dropped, 0
        if num_dropped:
            lines.append({"time": time.time(), "event": "dropped", "lines": num_dropped})
        now = time.monotonic()
        if self._num_refused and (final or now - self._refused_written_at >= REFUSED_INTERVAL_S):
            num_refused, self._num_refused, self._refused_written_at = self._num_refused, 0, now
            lines.append({"time": time.time(), "event": "refused", "requests": num_refused})
        if not lines:
            return
        try:
            self._append("".join(str(self._render(None, "", line)) + "\n" for line in lines).encode())
        except OSError as error:
            log.warning("The access log %s cannot be written: %s. %d lines are lost.", self._path, error, len(lines))

    def _append(self, batch: bytes) -> None:
        """Write a batch at once, into a new file if the present one would become too long."""
        make_private_folder(self._path.parent)
        with contextlib.suppress(FileNotFoundError):
            size = self._path.stat().st_size
            if size and size + len(batch) > MAX_FILE_BYTES:
                self._rotate()
        with open(self._path, "ab", opener=_open_private) as file:
            file.write(batch)

    def _rotate(self) -> None:
        names = [self._path, *(self._path.with_name(f"{self._path.name}.{age}") for age in range(1, KEPT_FILES + 1))]
        for older, newer in zip(reversed(names), reversed(names[:-1]), strict=False):
            with contextlib.suppress(FileNotFoundError):
                newer.replace(older)

    def _remove_old(self) -> None:
        """Remove files of other gateways, which have new names after each start, that nobody has written for RETENTION_S."""
        removed_before = time.time() - RETENTION_S
        for path in self._path.parent.glob(FILE_PATTERN):
            # Several gateways may do this at once.
            with contextlib.suppress(OSError):
                if not path.name.startswith(self._path.name) and path.lstat().st_mtime < removed_before:
                    path.unlink()


def _open_private(path: str, flags: int) -> int:
    """Open a file of mode 0600 from its first byte on: it names keys and models."""
    return os.open(path, flags, 0o600)


class LogAccess:
    """ASGI middleware that adds the line of each request."""

    def __init__(self, app: ASGIApp, access_log: AccessLog) -> None:
        self._app = app
        self._log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, and log it when it has ended."""
        if scope["type"] != "http" or (path := path_below(scope)) in UNLOGGED_PATHS:
            await self._app(scope, receive, send)
            return
        started_at, status = time.perf_counter(), 0
        entry: dict[str, Any] = {
            "time": round(time.time(), 3),
            "request_id": "",
            "method": scope["method"],
            "path": masked_path(path, self._log.route_segments),
        }
        scope[ENTRY_KEY] = entry

        async def send_and_record(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                entry["head_s"] = round(time.perf_counter() - started_at, 4)
            await send(message)

        try:
            await self._app(scope, receive, send_and_record)
        finally:
            entry["request_id"] = request_id(scope)[:200]
            entry["client"] = client_address(scope)
            # 499, as in nginx: the client has left before an answer.
            entry["status"] = status or 499
            entry["total_s"] = round(time.perf_counter() - started_at, 4)
            if "key_id" in entry:
                self._log.add(entry)
            else:
                self._log.count_refused()


def add_log_fields(scope: MutableMapping[str, Any], **fields: Any) -> None:
    """Add fields to the line of a request."""
    entry = scope.get(ENTRY_KEY)
    if entry is not None:
        entry.update(fields)

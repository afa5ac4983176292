"""Access log: one JSON line for each request, without any of its content.

Lines are collected in the event loop and written by a thread. Where the disk is slower than the requests, lines are dropped and
counted, and the log says how many.
"""

from __future__ import annotations

import asyncio
import logging
import logging.handlers
import os
import time
from collections.abc import MutableMapping
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tandem.gateway.errors import path_below, request_id
from tandem.gateway.identity.client_address import client_address
from tandem.private import make_private_folder
from tandem.tasks import stop

ENTRY = "tandem.access"
"""Key of a scope: the fields of the request's line."""
MAX_FILE_BYTES, KEPT_FILES = 64 * 2**20, 4
WRITE_S = 0.5
MAX_PENDING = 50_000
"""Lines that wait to be written."""
QUIET = frozenset({"/health", "/health/live", "/health/ready"})
"""Paths without lines: probes ask for them every second."""

log = logging.getLogger(__name__)


class AccessLog:
    """The file and the lines that wait for it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: list[dict[str, Any]] = []
        self._dropped = 0
        self._render = structlog.processors.JSONRenderer()
        self._handler: logging.Handler | None = None
        self._writing: asyncio.Task[None] | None = None

    def add(self, line: dict[str, Any]) -> None:
        """Write a line soon."""
        if len(self._lines) >= MAX_PENDING:
            self._dropped += 1
        else:
            self._lines.append(line)

    def start(self) -> None:
        """Begin to write; needs a running event loop."""
        self._writing = asyncio.create_task(self._write())

    async def stop(self) -> None:
        """Write what is left."""
        await stop(self._writing)
        await asyncio.to_thread(self._flush)

    async def _write(self) -> None:
        while True:
            await asyncio.sleep(WRITE_S)
            if self._lines or self._dropped:
                await asyncio.to_thread(self._flush)

    def _flush(self) -> None:
        lines, self._lines = self._lines, []
        dropped, self._dropped = self._dropped, 0
        if dropped:
            lines.append({"time": time.time(), "event": "dropped", "lines": dropped})
        try:
            handler = self._handler or self._open()
            for line in lines:
                text = str(self._render(None, "", line))
                handler.emit(logging.makeLogRecord({"msg": text, "levelno": logging.INFO}))
        except OSError as error:
            log.warning("The access log %s cannot be written: %s. %d lines are lost.", self._path, error, len(lines))

    def _open(self) -> logging.Handler:
        make_private_folder(self._path.parent)
        self._handler = PrivateFiles(self._path, maxBytes=MAX_FILE_BYTES, backupCount=KEPT_FILES, encoding="utf-8")
        return self._handler


class PrivateFiles(logging.handlers.RotatingFileHandler):
    """Files of mode 0600 from their first byte on: they name keys and models. Errors are raised, not printed."""

    def _open(self) -> TextIOWrapper:
        def opener(path: str, flags: int) -> int:
            return os.open(path, flags, 0o600)

        return open(self.baseFilename, "a", encoding=self.encoding, opener=opener)

    def handleError(self, record: logging.LogRecord) -> None:
        """Raise what `emit` met."""
        raise


class LogAccess:
    """ASGI middleware that adds the line of each request."""

    def __init__(self, app: ASGIApp, access_log: AccessLog) -> None:
        self._app = app
        self._log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, and log it when it has ended."""
        if scope["type"] != "http" or (path := path_below(scope)) in QUIET:
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0
        entry: dict[str, Any] = {
            "time": round(time.time(), 3),
            "request_id": "",
            "method": scope["method"],
            "path": path[:200],
        }
        scope[ENTRY] = entry

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                entry["head_s"] = round(time.perf_counter() - began, 4)
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        finally:
            entry["request_id"] = request_id(scope)[:200]
            entry["client"] = client_address(scope)
            # 499, as in nginx: the client has left before an answer.
            entry["status"] = status or 499
            entry["total_s"] = round(time.perf_counter() - began, 4)
            self._log.add(entry)


def note(scope: MutableMapping[str, Any], **fields: Any) -> None:
    """Add fields to the line of a request."""
    entry = scope.get(ENTRY)
    if entry is not None:
        entry.update(fields)

"""An engine's own server on a real port."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn

from tandem.engine.echo.engine import EchoEngine


@pytest.fixture
def engine() -> EchoEngine:
    """What is served; modules of tests put others in its place."""
    return EchoEngine()


@pytest.fixture
def url(engine: EchoEngine) -> Iterator[str]:
    """The address of a server of the engine's app."""
    sock = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(engine.app, lifespan="off", log_level="critical"))
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    server.should_exit = True
    thread.join()

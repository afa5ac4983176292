"""Protection of Serve's log handlers in a replica's process while an engine's libraries are imported."""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
from collections.abc import Iterator

SERVE_LOGGER = "ray.serve"


@contextlib.contextmanager
def serve_log_kept() -> Iterator[None]:
    """Restore the targets of Serve's log handlers after a block that closes them, as vLLM's import does.

    A restarted Serve controller asks each replica for its log file. A replica whose handler has lost its target fails that call,
    and Serve replaces it: without this, all engines were replaced whenever the controller restarted.
    """
    handlers = [
        handler
        for handler in logging.getLogger(SERVE_LOGGER).handlers
        if isinstance(handler, logging.handlers.MemoryHandler)
    ]
    targets = [(handler, handler.target) for handler in handlers]
    try:
        yield
    finally:
        for handler, target in targets:
            handler.setTarget(target)

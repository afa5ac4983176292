"""Keeps the log of Serve's that a replica's process has, while an engine's libraries are loaded into it."""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
from collections.abc import Iterator

SERVE = "ray.serve"


@contextlib.contextmanager
def serve_log_kept() -> Iterator[None]:
    """For the length of a block whatever configures logging may close all handlers, as vLLM does when it is imported.

    A new controller of Serve asks each replica for the file of its log. One whose handler has lost its target cannot say, and
    Serve takes it for broken: all engines were replaced at once whenever the controller was.
    """
    handlers = [h for h in logging.getLogger(SERVE).handlers if isinstance(h, logging.handlers.MemoryHandler)]
    held = [(handler, handler.target) for handler in handlers]
    try:
        yield
    finally:
        for handler, target in held:
            handler.setTarget(target)

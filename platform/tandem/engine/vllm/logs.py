"""Log filter for vLLM: no traceback for a refused request, whose error is in the client's answer."""

from __future__ import annotations

import logging

ANTHROPIC_LOGGER = "vllm.entrypoints.anthropic.api_router"
"""Logs a traceback for each request that it refuses, where vLLM's other routes log none."""
REFUSALS = frozenset({"VLLMClientError", "ValueError", "TypeError", "NotImplementedError", "TemplateError"})
"""Exceptions that vLLM answers with a status below 500, or 501."""


def quiet_refusals() -> None:
    """Leave tracebacks of refused requests out of vLLM's log."""
    log = logging.getLogger(ANTHROPIC_LOGGER)
    if _is_not_a_refusal not in log.filters:
        log.addFilter(_is_not_a_refusal)


def _is_not_a_refusal(record: logging.LogRecord) -> bool:
    exception_class = record.exc_info[0] if record.exc_info else None
    return exception_class is None or not REFUSALS & {base_class.__name__ for base_class in exception_class.__mro__}

"""Reads TandemErrors out of tracebacks that Ray hands over as text. Pure."""

from __future__ import annotations

import re

TANDEM_ERROR = re.compile(
    r"^tandem\.errors\.\w+: (.+?)(?=\n\n|\nFailed to apply|\nTraceback |\x1b|\Z)", re.MULTILINE | re.DOTALL
)
"""A TandemError in a traceback; errors that it caused, and Ray Data's advice, may follow it."""


def tandem_error_in(traceback: str) -> str | None:
    """The message of the last TandemError in a traceback; None: there is none."""
    messages = TANDEM_ERROR.findall(traceback)
    return str(messages[-1]).strip() if messages else None

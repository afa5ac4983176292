"""Reads TandemErrors out of tracebacks that Ray hands over as text. Pure."""

from __future__ import annotations

import re

TANDEM_ERROR = re.compile(
    r"^tandem\.errors\.\w+: (.+?)(?=\n\n|\nFailed to apply|\nTraceback |\x1b|\Z)", re.MULTILINE | re.DOTALL
)
"""A TandemError at the end of a traceback; what it caused, and what Ray Data advises, comes after it."""


def tandem_error_in(text: str) -> str | None:
    """The message of the last TandemError in a traceback; None: there is none."""
    found = TANDEM_ERROR.findall(text)
    return str(found[-1]).strip() if found else None

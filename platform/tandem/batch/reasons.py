"""Explanation of Ray Data failures in terms of the worker that failed. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

import ray.exceptions

from tandem.errors import EngineError

OURS = re.compile(r"^tandem\.errors\.\w+: (.+?)(?=\n\n|\nFailed to apply|\Z)", re.MULTILINE | re.DOTALL)
"""A TandemError at the end of a traceback; what it caused, and what Ray Data advises, comes after it."""
GOES_ON = "What is published stays; the same command goes on."


def explained(name: str, error: Exception, crashes: Sequence[str], max_failures: int) -> EngineError:
    """Why engines of the model `name` do not go on; `crashes` is what workers said before they ended."""
    if isinstance(error, ray.exceptions.RayActorError) and "creation task" not in str(error):
        why = (
            crashes[-1] if crashes else "it was killed, by the kernel for want of memory perhaps, or its node is gone."
        )
        times = f"{max_failures + 1} times" if max_failures else "once"
        return EngineError(
            f"A replica of {name} died {times}; max_failures is {max_failures}. At last: {why} {GOES_ON}"
        )
    reason = said(str(error)) or said(str(getattr(error, "cause", None) or "")) or _last_line(error)
    # A model that cannot be loaded will not be loaded by the same command either.
    after = f" {GOES_ON}" if isinstance(error, ray.exceptions.RayTaskError) else ""
    return EngineError(f"{name} cannot answer: {reason}{after}")


def said(text: str) -> str | None:
    """The message of the last TandemError in a traceback."""
    found = OURS.findall(text)
    return str(found[-1]).strip() if found else None


def _last_line(error: Exception) -> str:
    return str(getattr(error, "cause", None) or error).strip().rpartition("\n")[2]

"""Explanation of Ray Data failures in terms of the worker that failed. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import ray.exceptions

from tandem.errors import EngineError
from tandem.observability.tracebacks import tandem_error_in

RESUMES = "What is published stays; the same command resumes."


def explained(name: str, error: Exception, crashes: Sequence[str], max_failures: int) -> EngineError:
    """The reason why engines of the model `name` failed; `crashes`: last messages of workers that died."""
    if isinstance(error, ray.exceptions.RayActorError) and "creation task" not in str(error):
        why = (
            crashes[-1] if crashes else "it was killed, by the kernel for want of memory perhaps, or its node is gone."
        )
        times = f"{max_failures + 1} times" if max_failures else "once"
        return EngineError(
            f"A replica of {name} died {times}; max_failures is {max_failures}. At last: {why} {RESUMES}"
        )
    reason = (
        tandem_error_in(str(error)) or tandem_error_in(str(getattr(error, "cause", None) or "")) or _last_line(error)
    )
    # A model that cannot be loaded will not be loaded by the same command either.
    after = f" {RESUMES}" if isinstance(error, ray.exceptions.RayTaskError) else ""
    return EngineError(f"{name} cannot answer: {reason}{after}")


def _last_line(error: Exception) -> str:
    return str(getattr(error, "cause", None) or error).strip().rpartition("\n")[2]

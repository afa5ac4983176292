"""Requests to Ray's dashboard, sent again where it closes the connection or is not ready."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import TypeVar

from tandem.errors import ClusterError

T = TypeVar("T")

ANSWERS_WITHIN_S = 30.0
"""Seconds for which a dashboard that does not answer is asked again."""
PAUSE_S = 0.5
"""Seconds between two requests."""
# Ray's clients raise a RuntimeError with the status. A 500 of the web server itself, which has this text, comes from a part of
# the dashboard that has not started; one with another text is the answer to the request.
_NOT_READY = re.compile(r"status code (50[234]\b|500\b.*Server got itself in trouble)", re.DOTALL)


def ask_dashboard(url: str, request: Callable[[], T], within_s: float = ANSWERS_WITHIN_S) -> T:
    """What `request` returns; called again while the connection fails or the dashboard is starting.

    `request` may be called after the dashboard has acted on an earlier call whose answer was lost. ClusterError if the
    dashboard does not answer within `within_s`.
    """
    deadline = time.monotonic() + within_s
    while True:
        try:
            return request()
        except (OSError, RuntimeError) as error:  # OSError: those of `requests` too
            if isinstance(error, RuntimeError) and not _NOT_READY.search(str(error)):
                raise
            if time.monotonic() > deadline:
                raise ClusterError(f"Ray's dashboard at {url} does not answer: {error}.") from error
            time.sleep(PAUSE_S)

"""Requests to Ray's dashboard, sent again where it closes the connection."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from tandem.errors import ClusterError

T = TypeVar("T")

ANSWERS_WITHIN_S = 30.0
"""Seconds for which a dashboard that does not answer is asked again."""
PAUSE_S = 0.5
"""Seconds between two requests."""


def ask_dashboard(url: str, request: Callable[[], T], within_s: float = ANSWERS_WITHIN_S) -> T:
    """What `request` returns; called again while the connection fails, as a dashboard that starts or is busy lets it.

    `request` may be called after the dashboard has acted on an earlier call whose answer was lost. ClusterError if the
    dashboard does not answer within `within_s`.
    """
    deadline = time.monotonic() + within_s
    while True:
        try:
            return request()
        except OSError as error:  # those of `requests` too
            if time.monotonic() > deadline:
                raise ClusterError(f"Ray's dashboard at {url} does not answer: {error}.") from error
            time.sleep(PAUSE_S)

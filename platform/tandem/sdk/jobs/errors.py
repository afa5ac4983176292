"""Errors of the native job routes as TandemErrors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tandem.errors import (
    ClusterError,
    ConfigError,
    IllegalTransitionError,
    JobError,
    TandemError,
    UnknownJobError,
    UnknownLogError,
)
from tandem.sdk.talk import message_of

if TYPE_CHECKING:
    from openai import OpenAIError

BY_CODE: dict[str, type[TandemError]] = {
    "job_not_found": UnknownJobError,
    "log_not_found": UnknownLogError,
    "illegal_state": IllegalTransitionError,
    "cluster_unavailable": ClusterError,
    "registry_unavailable": ClusterError,
}
"""Kinds of errors by the `code` of the answer."""


def explained(error: OpenAIError, base_url: str) -> TandemError:
    """The error of a request to the app at `base_url`."""
    import openai

    said, code = message_of(error), str(getattr(error, "code", None) or "")
    if code in BY_CODE:
        return BY_CODE[code](said)
    match error:
        case openai.APIConnectionError():
            return ClusterError(
                f"No server answers at {base_url}. Start one with `tandem serve up`, or say where it is: --api-url or "
                "TANDEM_API_URL."
            )
        case openai.AuthenticationError() | openai.PermissionDeniedError():
            return ConfigError(f"{base_url} refused the key: {said} Set it with --api-key or TANDEM_API_KEY.")
        case openai.NotFoundError():
            return ConfigError(
                f"{base_url} has no routes for jobs: it answered 404 ({said}) Its address usually ends with /v1, and its Tandem "
                "must be of this version."
            )
        case openai.APIStatusError(status_code=429 | 503):
            return ClusterError(f"The server is busy ({error.status_code}): {said}")
        case openai.APIStatusError():
            return JobError(f"{base_url} answered {error.status_code}: {said}")
    return JobError(f"The request failed: {said}")


def is_temporary(error: OpenAIError) -> bool:
    """Whether a stream that ended so can be asked for again."""
    import openai

    if isinstance(error, openai.APIStatusError):
        return error.status_code in (429, 502, 503, 504)
    return isinstance(error, openai.APIConnectionError) or getattr(error, "code", None) in (
        "registry_unavailable",
        "cluster_unavailable",
    )

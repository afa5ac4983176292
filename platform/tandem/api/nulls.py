"""Removal of null fields from requests: OpenAI's API treats null as absent, vLLM's only for some fields. Pure."""

from __future__ import annotations

from typing import Any


def drop_nulls(body: dict[str, Any]) -> None:
    """Remove the null fields of a request, and those of its messages except `content`, as answers have that SDKs send back.

    Changes `body` itself and no value inside it.
    """
    for key in [key for key, value in body.items() if value is None]:
        del body[key]
    if isinstance(body.get("messages"), list):
        body["messages"] = [_without_nulls(message) for message in body["messages"]]


def _without_nulls(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    return {key: value for key, value in message.items() if value is not None or key == "content"}

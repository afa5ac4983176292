"""Content of requests that is refused unless the config allows it: templates, tensors, media that an engine would fetch. Pure.

A chat template and its arguments are programs that run in the engine's process for every request; tensors are read by its
deserialiser; a URL makes the engine a client inside the operator's network.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from tandem.api.walks import dotted, path_to
from tandem.config.serving.app import GUARDED_FIELDS
from tandem.gateway.errors import ApiError

EMBEDS_FIELDS = ("prompt_embeds", "image_embeds", "audio_embeds", "video_embeds")
"""Guarded fields that are parts of a message, too."""
CONTENT_FIELDS = (
    *("messages", "input", "system", "instructions", "tools", "prompt", "query", "queries", "documents", "items"),
    *("text_1", "text_2", "data_1", "data_2"),
)
"""Fields in which media are looked for."""
EMBEDS_KEYS = frozenset(EMBEDS_FIELDS)
URL_KEYS = frozenset({"image_url", "audio_url", "video_url", "file_url", "server_url"})
"""Keys of a URL, or of an object with one under `url`."""
MEDIA_KEYS = URL_KEYS | {"source"}
MEDIA_MARKERS = (b"url", b"_embeds", b"\\u")
"""A body without these has no media that is fetched and no tensor; `\\u` may write any of the others in another form."""
SEARCHED_BYTES = 256
"""Bytes for each entry (message, document, token id) up to which a body is searched for MEDIA_MARKERS. The search takes 2 ns a
byte, the walk about 0.5 us for each message, however long its text is."""
PLAIN_URL = re.compile(r"(https?)://([a-z0-9.-]+|\[[0-9a-f:.]+\])(?::(\d{1,5}))?(?:[/?#][!-\[\]-~]*)?", re.IGNORECASE)
"""URLs that every reader splits in the same way: no user, no backslash, no space, ASCII only."""
PORTS = {"http": "80", "https": "443"}


def check_content(body: Mapping[str, Any], raw: bytes, allowed: Collection[str], media_hosts: Collection[str]) -> None:
    """ApiError 400 for a guarded field that is not in `allowed`, and for a URL whose host is not in `media_hosts`.

    `raw`: the body as it came, which makes the search for URLs cheap. `data:` URLs pass.
    """
    for name in GUARDED_FIELDS:
        if body.get(name) and name not in allowed:
            raise _guarded_field_error(name, name)
    content = {name: body[name] for name in CONTENT_FIELDS if isinstance(body.get(name), list | dict)}
    entries = sum(map(len, content.values()))
    if content and (len(raw) > SEARCHED_BYTES * entries or any(marker in raw for marker in MEDIA_MARKERS)):
        for name, value in content.items():
            _check(name, value, allowed, media_hosts)


def _check(name: str, content: Any, allowed: Collection[str], media_hosts: Collection[str]) -> None:
    """`check_content` for the value of one field of a body. Paths are computed for errors only."""

    def param_of(part: Any, key: str) -> str:
        return dotted((name, *path_to(part, content), key))

    stack: list[Any] = [content]
    while stack:
        part = stack.pop()
        if isinstance(part, dict):
            for key, value in part.items():
                url = _url(key, value) if key in MEDIA_KEYS else None
                if url is not None and not is_allowed(url, media_hosts):
                    raise _media_error(param_of(part, key))
                if type(value) in (dict, list):
                    stack.append(value)
            if part.get("type") in EMBEDS_FIELDS or not EMBEDS_KEYS.isdisjoint(part):
                for key in _tensors(part):
                    if key not in allowed:
                        raise _guarded_field_error(key, param_of(part, key))
        else:
            stack += [value for value in part if type(value) in (dict, list)]


def is_allowed(url: str, hosts: Collection[str]) -> bool:
    """Whether an engine may read a URL: its data is in it, or its host, with its port unless that is the scheme's, is listed."""
    if url[:5].lower() == "data:":
        return True
    parts = PLAIN_URL.fullmatch(url)
    if parts is None:
        return False
    scheme, host, port = parts[1].lower(), parts[2].lower(), parts[3]
    return (host if port in (None, PORTS[scheme]) else f"{host}:{port}") in hosts


def _url(key: str, value: Any) -> str | None:
    """The URL of media in a field of a part: OpenAI's and vLLM's `image_url`, Anthropic's `source`."""
    if key in URL_KEYS and isinstance(value, str):
        return value
    if (key in URL_KEYS or key == "source") and isinstance(value, dict) and isinstance(value.get("url"), str):
        return str(value["url"])
    return None


def _tensors(part: Mapping[str, Any]) -> Iterator[str]:
    """Fields of a message's part that hold a tensor."""
    return (key for key in EMBEDS_FIELDS if part.get(key) or part.get("type") == key)


def _guarded_field_error(name: str, param: str) -> ApiError:
    return ApiError(
        400,
        f"`{param}` is not taken here. Its operator can allow it: gateway.allow: [{name}].",
        code="unsupported_parameter",
        param=param,
    )


def _media_error(param: str) -> ApiError:
    return ApiError(
        400,
        f"`{param}` is no data: URL and of no host in gateway.media_hosts. Send the data itself: data:image/png;base64,...",
        code="media_not_allowed",
        param=param,
    )

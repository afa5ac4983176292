"""Checks a request against the configured caps (`gateway.caps`) before it is admitted. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic_core import to_json

from tandem.api.fan_out import fan_out, prompts, to_integer, width
from tandem.api.request_values import GENERATE_ROUTES
from tandem.config.serving.caps import RequestCaps
from tandem.engine.routes import EngineRoute
from tandem.gateway.errors import ApiError

LIGHT_SLOT_BYTES = 64 * 1024
"""Bytes that take one slot at a route that counts or converts tokens: some 10 ms of an engine's tokenizer."""
LOGPROBS = ("logprobs", "top_logprobs", "prompt_logprobs")
STOPS = ("stop", "stop_sequences")
LISTED = ("stop_token_ids", "bad_words", "logit_bias", "logprob_token_ids")
CONSTRAINTS = ("structured_outputs", "response_format", "text", "output_config")
"""Fields that hold a grammar or a schema."""
TOO_LARGE, TOO_MANY, TOO_LONG = "integer_above_max_value", "array_above_max_length", "string_above_max_length"
"""Codes of OpenAI's API."""
BYTES_INPUTS = 256
"""Texts of a request for embeddings as raw bytes: vLLM describes each in a header of the answer, by about 110 bytes, and a header
of more than 32 KiB does not pass every proxy."""


def check_caps(route: EngineRoute, body: Mapping[str, Any], caps: RequestCaps, size: int) -> int:
    """The number of admission slots of a request: its sequences, or at a `light` route 1 + size // LIGHT_SLOT_BYTES.

    `size`: bytes of the body, whose values have been checked. ApiError 400 with field, value and cap for a request above
    `caps`, 413 for a body too long for a light route.
    """
    if route.light and size > caps.light_bytes:
        raise ApiError(
            413,
            f"The request body has {size:,} bytes; {route.path} takes {caps.light_bytes:,} at most (gateway.caps.light_bytes). "
            "Count a longer text in parts.",
        )
    for problem in _problems(route.path, body, caps, size):
        raise problem
    return 1 + size // LIGHT_SLOT_BYTES if route.light else fan_out(route.path, body)


def _problems(path: str, body: Mapping[str, Any], caps: RequestCaps, size: int) -> Iterator[ApiError]:
    sequences = fan_out(path, body)
    if path in GENERATE_ROUTES:
        for name in ("n", "best_of"):
            if to_integer(body.get(name)) > caps.n:
                yield above_cap_error(name, f"is {to_integer(body[name]):,}", caps.n, "n", TOO_LARGE)
        if sequences > caps.sequences:
            per_prompt = f" x {width(path, body)} (n)" if width(path, body) > 1 else ""
            description = f"starts {sequences:,} sequences, {prompts(path, body):,} prompts{per_prompt}"
            name = "prompt" if prompts(path, body) > 1 else "n"
            yield above_cap_error(name, description, caps.sequences, "sequences", TOO_MANY)
        yield from _sampling(body, caps)
        yield from _constraints(body, caps, size)
    elif sequences > caps.inputs:
        name = next((field for field in ("input", "documents") if field in body), "text_2")
        yield above_cap_error(
            name, f"has {sequences:,} texts with all others of the request", caps.inputs, "inputs", TOO_MANY
        )
    elif path == "/v1/embeddings" and body.get("encoding_format") == "bytes" and sequences > BYTES_INPUTS:
        yield ApiError(
            400,
            f"`input` has {sequences:,} texts; with `encoding_format` bytes, which describes each in a header of the answer, at "
            f"most {BYTES_INPUTS} are taken. Use base64 or bytes_only.",
            code=TOO_MANY,
            param="input",
        )
    for name in ("messages", "input"):
        value = body.get(name)
        if isinstance(value, list) and path != "/v1/embeddings" and len(value) > caps.messages:
            yield above_cap_error(name, f"has {len(value):,} entries", caps.messages, "messages", TOO_MANY)


def _sampling(body: Mapping[str, Any], caps: RequestCaps) -> Iterator[ApiError]:
    for name in LOGPROBS:
        value = to_integer(body.get(name))
        if caps.logprobs >= 0 and (value > caps.logprobs or value < 0):
            description = f"is {value:,}" + (", which means the whole vocabulary" if value < 0 else "")
            yield above_cap_error(name, description, caps.logprobs, "logprobs", TOO_LARGE)
    for name in STOPS:
        texts = body.get(name)
        texts = [texts] if isinstance(texts, str) else texts if isinstance(texts, list) else []
        if len(texts) > caps.stop:
            yield above_cap_error(name, f"has {len(texts):,} texts", caps.stop, "stop", TOO_MANY)
        longest = max((len(text) for text in texts if isinstance(text, str)), default=0)
        if longest > caps.stop_chars:
            yield above_cap_error(
                name, f"has a text of {longest:,} characters", caps.stop_chars, "stop_chars", TOO_LONG
            )
    for name in LISTED:
        entries = body.get(name)
        if isinstance(entries, list | dict) and len(entries) > caps.listed:
            yield above_cap_error(name, f"has {len(entries):,} entries", caps.listed, "listed", TOO_MANY)


def _constraints(body: Mapping[str, Any], caps: RequestCaps, size: int) -> Iterator[ApiError]:
    tools = [body.get(name) for name in ("tools", "functions")]
    for name, value in zip(("tools", "functions"), tools, strict=True):
        if isinstance(value, list) and len(value) > caps.tools:
            yield above_cap_error(name, f"has {len(value):,} tools", caps.tools, "tools", TOO_MANY)
    if size <= caps.schema_bytes:
        return
    parts = [(name, body[name]) for name in CONSTRAINTS if name in body]
    parts += [
        (f"tools.{index}", tool) for value in tools if isinstance(value, list) for index, tool in enumerate(value)
    ]
    for name, value in parts:
        length = len(to_json(value))
        if length > caps.schema_bytes:
            yield above_cap_error(name, f"has {length:,} bytes as JSON", caps.schema_bytes, "schema_bytes", TOO_LONG)


def above_cap_error(param: str, description: str, cap: int, key: str, code: str) -> ApiError:
    """400 for a field above a cap."""
    message = f"`{param}` {description}; at most {cap:,} here (gateway.caps.{key})."
    return ApiError(400, message, code=code, param=param)

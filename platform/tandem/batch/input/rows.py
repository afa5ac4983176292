"""Parsing of input rows into requests, or into the reason why a row has none. Pure.

A row is OpenAI's batch format ({"custom_id", "method", "url", "body"}), or plain: {"prompt": ...}, {"messages": [...]} or
{"input": ...}, with whatever fields the request may have beside it, `model` and `custom_id` among them.
Other columns of a plain row are not sent, unless one looks like a misspelt field: then the row is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json, to_json

from tandem.api.nulls import drop_nulls
from tandem.api.request_values import value_problems
from tandem.api.unknown_fields import describe, misspelt_fields, unknown_fields
from tandem.engine.routes import ENGINE_ROUTES
from tandem.errors import DataError, did_you_mean, sentence

PATHS = tuple(route.path for route in ENGINE_ROUTES)
PLAIN = {"messages": "/v1/chat/completions", "prompt": "/v1/completions", "input": "/v1/embeddings"}
"""The route of a plain row, by the field that it has."""
TEXTS = "text"
"""Another name for `prompt` in a plain row: a corpus has it, and a WebDataset's .txt."""


class BadRowError(DataError):
    """A row that no engine can be asked about; the message is the reason."""


class UnknownFieldError(BadRowError):
    """A row with a field that no request has: a misspelt one would change nothing, in any row."""


@dataclass(frozen=True, slots=True)
class RowRequest:
    """A request for an engine."""

    path: str
    body: dict[str, Any]
    """Without `model`: whoever asks says it by the engine's name."""
    model: str | None
    """Who shall answer; None: the run's default."""
    custom_id: str | None
    plain: bool
    """Whether the row was no request in OpenAI's format; then its answer has its text beside the response."""

    @property
    def is_bare_prompt(self) -> bool:
        """Whether it is a plain row's prompt, which no chat template is applied to."""
        return self.plain and self.path == PLAIN["prompt"]


def parse(raw: bytes) -> dict[str, Any]:
    """The row's JSON object."""
    try:
        value = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise BadRowError(f"It is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise BadRowError(f"It is a {type(value).__name__}; a row is a JSON object.")
    return value


def read_row(
    row: Mapping[str, Any], defaults: Mapping[str, Any], *, chat: bool = False, check_values: bool = True
) -> RowRequest:
    """The request in a row, with `defaults` for fields that it lacks.

    With `chat` the `prompt` of a plain row is a user's message. Null fields count as absent, except without `check_values`, as
    runs of older releases have it. Raises BadRowError with the reason if there is no request in it.
    """
    custom_id = row.get("custom_id")
    if isinstance(custom_id, int) and not isinstance(custom_id, bool):
        custom_id = str(custom_id)  # a column of numbers is as good a name
    if custom_id is not None and not isinstance(custom_id, str):
        raise BadRowError(f"custom_id is {custom_id!r}; it must be text.")
    if "body" in row or "url" in row:
        path, body, plain = _path(row), row.get("body"), False
        if not isinstance(body, dict):
            raise BadRowError(f"body is {_named(body)}; it must be the request, a JSON object.")
    else:
        path, body = _plain(row, chat)
        plain = True
    # A plain row may be a table's, with columns that are nobody's fields; they are not sent.
    unknown = unknown_fields(path, body)
    if wrong := misspelt_fields(path, unknown) if plain else unknown:
        raise UnknownFieldError(f"{sentence(f'It has an {describe(path, wrong)}')} Rename it, or leave it out.")
    body = {key: value for key, value in body.items() if key not in unknown}
    asked = {**defaults, **body}
    if check_values:
        # A null field is an absent one, so that the run's default applies.
        asked |= {key: defaults[key] for key in defaults.keys() & body.keys() if body[key] is None}
        drop_nulls(asked)
    model = asked.pop("model", None)
    if model is not None and (not isinstance(model, str) or not model):
        raise BadRowError(f"model is {model!r}; it must be the name of a model or adapter.")
    if asked.pop("stream", None):
        raise BadRowError("stream is on; the answers of a batch are written when they are whole. Leave it out.")
    for key in ("stream_options", "kv_transfer_params", "ec_transfer_params"):
        asked.pop(key, None)
    if check_values and (problems := value_problems(path, asked)):
        raise BadRowError(" ".join(map(str, problems)))
    return RowRequest(path, asked, model, custom_id, plain)


def request_bytes(ask: RowRequest, model: str) -> bytes:
    """The body that an engine takes."""
    return to_json({**ask.body, "model": model})


def _path(row: Mapping[str, Any]) -> str:
    method, url = row.get("method", "POST"), row.get("url")
    if method != "POST":
        raise BadRowError(f"method is {method!r}; it must be POST.")
    if url not in PATHS:
        near = did_you_mean(url, PATHS) if isinstance(url, str) else ""
        raise BadRowError(f"url is {url!r}, which no engine answers.{near}")
    return str(url)


def _plain(row: Mapping[str, Any], chat: bool) -> tuple[str, dict[str, Any]]:
    fields = {key: value for key, value in row.items() if key != "custom_id"}
    if TEXTS in fields and not fields.keys() & PLAIN.keys():
        fields["prompt"] = fields.pop(TEXTS)
    found = [key for key in PLAIN if fields.get(key) is not None]
    if not found:
        has = ", ".join(map(str, row)) or "nothing"
        raise BadRowError(f"It has {has}; a row has prompt, messages or input, or url and body as OpenAI's batches.")
    if len(found) > 1:
        raise BadRowError(f"It has {' and '.join(found)}; a row asks for one thing.")
    if chat and found == ["prompt"]:
        prompt = fields.pop("prompt")
        if not isinstance(prompt, str):
            raise BadRowError(f"prompt is {_named(prompt)}; as a message (`chat`) it must be text.")
        fields["messages"] = [{"role": "user", "content": prompt}]
        return PLAIN["messages"], fields
    return PLAIN[found[0]], fields


def _named(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"

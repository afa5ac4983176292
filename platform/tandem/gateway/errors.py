"""Errors that the gateway answers, in the shape of the requested API (`dialect`)."""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Mapping
from typing import Any

from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from tandem.engine.engines import ENGINES
from tandem.gateway.dialect import Dialect, dialect_of
from tandem.routing.records import ServedModel

REQUEST_ID = "tandem.request_id"
"""Key of an ASGI scope: the request's id."""


VALID_ID = re.compile(r"[!-~]{1,128}")
"""Request ids that are accepted from clients."""
LONGEST_MESSAGE, LONGEST_PARAM = 1000, 200
"""Characters of an answer's message and of the name of a field: some engines repeat a request's values in their errors."""


class ApiError(Exception):
    """An answer with a status of 400 or above."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = shortened(message, LONGEST_MESSAGE)
        self.code = code
        self.param = None if param is None else shortened(param, LONGEST_PARAM)
        self.headers = dict(headers or {})

    def response(self, dialect: Dialect, scope: Scope) -> Response:
        """The HTTP response to the request of an ASGI scope."""
        body = dialect.error(self.status, self.message, code=self.code, param=self.param, request=request_id(scope))
        # An error is of one moment and one client.
        headers = {"Cache-Control": "no-store", **self.headers, **id_headers(scope)}
        return JSONResponse(body, status_code=dialect.status(self.status), headers=headers)


def shortened(text: str, limit: int) -> str:
    """A text of at most `limit` characters; a longer one is cut and ends in its length."""
    if len(text) <= limit:
        return text
    suffix = f"... ({len(text):,} characters)"
    return text[: limit - len(suffix)] + suffix


def unknown_model(message: str) -> ApiError:
    """404 for a model that does not exist or is not served."""
    return ApiError(404, message, code="model_not_found", param="model")


def no_replica(reason: str, retry_after_s: int) -> ApiError:
    """503 with Retry-After for a request that no replica took; the SDKs wait and retry by themselves."""
    message = f"{reason.rstrip('.')}. Try again in {retry_after_s} s."
    return ApiError(503, message, code="engine_unavailable", headers={"Retry-After": str(retry_after_s)})


def no_registry(reason: str, retry_after_s: int) -> ApiError:
    """503 for a request that needs the registry while it does not answer."""
    message = f"{reason.rstrip('.')}. Try again in {retry_after_s} s."
    return ApiError(503, message, code="registry_unavailable", headers={"Retry-After": str(retry_after_s)})


def engine_timeout(model: str, silent_s: float) -> ApiError:
    """504 for a request on which an engine was silent for too long; neither the gateway nor an SDK retries it."""
    return ApiError(
        504,
        f"{model} said nothing on this request for {silent_s:g} s (gateway.request_timeout_s). Stream the answer, ask "
        "for a shorter one, or give the request more time (`timeout`).",
        code="engine_timeout",
        headers={"x-should-retry": "false"},
    )


def invalid_engine_answer(model: str) -> ApiError:
    """502 for an engine's answer that is not valid HTTP; neither the gateway nor an SDK retries it."""
    return ApiError(
        502,
        f"The answer of {model} could not be read: it breaks the HTTP protocol, or a header in it is too long.",
        code="engine_protocol_error",
        headers={"x-should-retry": "false"},
    )


def request_quarantined(lost_replicas: int, seconds: float) -> ApiError:
    """422 for a request on which engines died; an SDK does not retry it."""
    return ApiError(
        422,
        f"{lost_replicas} replicas were lost while they had this request, so it is sent to no other one for {seconds:g} s "
        "(gateway.quarantine_s). Change the request, and tell the operator.",
        code="request_quarantined",
        headers={"x-should-retry": "false"},
    )


def from_engine(status: int, body: bytes, model: ServedModel) -> ApiError:
    """The error in an engine's answer for `model`; a body of any shape."""
    rules = ENGINES[model.config.engine].requests
    message, param, code = f"The engine answered {status}.", None, None
    try:
        value = from_json(body)
        error = value.get("error", value)
        message = str(error.get("message") or message)
        param = rules.explain_param(error.get("param"))
        code = error.get("code") if isinstance(error.get("code"), str) else None
    except (ValueError, AttributeError):
        text = body.decode(errors="replace").strip()
        message = text[:2000] or message
    message = rules.explain_error(message, model.name)
    if status == 400 and (
        "context length" in message or "max_model_len" in message or "maximum model length" in message
    ):
        code = "context_length_exceeded"
        if model.max_length and str(model.max_length) not in message:
            message += f" The model takes {model.max_length} tokens."
    return ApiError(status, message, code=code, param=param)


def request_id(scope: Scope) -> str:
    """The id of a request: the one in its headers, or a new one, which stays the same for the request.

    A given one that does not match VALID_ID is replaced: ids go into logs.
    """
    if REQUEST_ID not in scope:
        client_ids = [value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"]
        is_valid = bool(client_ids) and VALID_ID.fullmatch(client_ids[0]) is not None
        scope[REQUEST_ID] = client_ids[0] if is_valid else f"req_{random.getrandbits(128):032x}"
    return str(scope[REQUEST_ID])


def id_headers(scope: Scope) -> dict[str, str]:
    """Response headers with the request's id: `request-id` for Anthropic's SDK, `x-request-id` for OpenAI's.

    The latter is left to the server in front of the app where `app.state.server_adds_request_id` is set.
    """
    headers = {"request-id": request_id(scope)}
    if not getattr(scope["app"].state, "server_adds_request_id", False):
        headers["x-request-id"] = headers["request-id"]
    return headers


def path_below(scope: Scope) -> str:
    """The path below the app, wherever Serve has mounted it; as Starlette's router reads it."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    if not root or not path.startswith(root):
        return path
    suffix = path[len(root) :]
    return suffix if not suffix or suffix.startswith("/") else path


def masked_path(path: str, route_segments: Collection[str]) -> str:
    """A path as logs have it: its first six parts, with `*` for those that are in no route. They may be a secret."""
    return "/" + "/".join(part if part in route_segments or not part else "*" for part in path.split("/")[1:7])


async def answer_api_error(request: Request, error: Exception) -> Response:
    """Starlette's handler for ApiError."""
    if not isinstance(error, ApiError):
        raise error
    return error.response(dialect_of(path_below(request.scope)), request.scope)


async def answer_http_error(request: Request, error: Exception) -> Response:
    """Starlette's handler for its own HTTPException (unknown route, wrong method)."""
    status = int(getattr(error, "status_code", 500))
    message = f"{request.method} {request.url.path}: {getattr(error, 'detail', error)}."
    return await answer_api_error(request, ApiError(status, message, headers=getattr(error, "headers", None)))


async def answer_unexpected(request: Request, error: Exception) -> Response:
    """Starlette's handler for unexpected exceptions; the log has the traceback."""
    return await answer_api_error(request, ApiError(500, "The gateway failed on this request; its log says why."))


EXCEPTION_HANDLERS: dict[Any, Any] = {
    ApiError: answer_api_error,
    HTTPException: answer_http_error,
    Exception: answer_unexpected,
}
"""Handlers of a Starlette app."""

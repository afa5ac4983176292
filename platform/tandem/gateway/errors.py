"""Errors that the gateway answers, in the shape of the requested API (`dialect`)."""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Mapping

from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from tandem.engine.engines import ENGINES
from tandem.gateway.dialect import Dialect, dialect_of
from tandem.routing.records import ServedModel

REQUEST_ID = "tandem.request_id"
"""Key of an ASGI scope: the request's id."""


VISIBLE = re.compile(r"[!-~]{1,128}")
"""Ids of requests that are taken from clients."""
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
    """A text of at most `limit` characters; what is left of a longer one ends in how much of it is not shown."""
    if len(text) <= limit:
        return text
    note = f"... ({len(text):,} characters)"
    return text[: limit - len(note)] + note


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


def too_slow(model: str, silent_s: float) -> ApiError:
    """504 for a request on which an engine was silent for too long; neither the gateway nor an SDK retries it."""
    return ApiError(
        504,
        f"{model} said nothing on this request for {silent_s:g} s (gateway.request_timeout_s). Stream the answer, ask "
        "for a shorter one, or give the request more time (`timeout`).",
        code="engine_timeout",
        headers={"x-should-retry": "false"},
    )


def unreadable(model: str) -> ApiError:
    """502 for an answer of an engine that is no HTTP that can be read; neither the gateway nor an SDK retries it."""
    return ApiError(
        502,
        f"The answer of {model} could not be read: it breaks the HTTP protocol, or a header in it is too long.",
        code="engine_protocol_error",
        headers={"x-should-retry": "false"},
    )


def quarantined(lost: int, seconds: float) -> ApiError:
    """422 for a request on which engines died; an SDK does not retry it."""
    return ApiError(
        422,
        f"{lost} replicas were lost while they had this request, so it is sent to no other one for {seconds:g} s "
        "(gateway.quarantine_s). Change the request, and tell the operator.",
        code="request_quarantined",
        headers={"x-should-retry": "false"},
    )


def from_engine(status: int, body: bytes, model: ServedModel) -> ApiError:
    """The error in an engine's answer for `model`; a body of any shape."""
    rules = ENGINES[model.config.engine].requests
    message, param, code = f"The engine answered {status}.", None, None
    try:
        answer = from_json(body)
        error = answer.get("error", answer)
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
    """The id of a request: that which the client or a proxy gave it, or a new one, which stays the same for the request.

    A given one that is not VISIBLE is not taken: it goes into logs.
    """
    if REQUEST_ID not in scope:
        given = [value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"]
        fits = bool(given) and VISIBLE.fullmatch(given[0]) is not None
        scope[REQUEST_ID] = given[0] if fits else f"req_{random.getrandbits(128):032x}"
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
    rest = path[len(root) :]
    return rest if not rest or rest.startswith("/") else path


def masked_path(path: str, words: Collection[str]) -> str:
    """A path as logs have it: its first six parts, with `*` for those that are in no route. They may be a secret."""
    return "/" + "/".join(part if part in words or not part else "*" for part in path.split("/")[1:7])


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

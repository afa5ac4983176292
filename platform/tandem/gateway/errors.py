"""Errors as OpenAI's API shapes them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import JSONResponse, Response


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
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON that the client gets."""
        return shape(self.status, self.message, code=self.code, param=self.param)


def shape(status: int, message: str, *, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """An error object as OpenAI's API has it."""
    return {"error": {"message": message, "type": _kind(status), "param": param, "code": code}}


def unknown_model(message: str) -> ApiError:
    """404 for a model that does not exist or is not served."""
    return ApiError(404, message, code="model_not_found", param="model")


def no_replica(message: str, retry_after_s: int) -> ApiError:
    """503 with Retry-After, which OpenAI's SDK heeds by itself."""
    return ApiError(503, message, code="engine_unavailable", headers={"Retry-After": str(retry_after_s)})


def from_engine(status: int, body: bytes, max_length: int | None) -> bytes:
    """An engine's error in OpenAI's shape, whatever shape it came in."""
    message, param, code = f"The engine answered {status}.", None, None
    try:
        said = from_json(body)
        error = said.get("error", said)
        message = str(error.get("message") or message)
        param = error.get("param")
        code = error.get("code") if isinstance(error.get("code"), str) else None
    except (ValueError, AttributeError):
        text = body.decode(errors="replace").strip()
        message = text[:2000] or message
    if status == 400 and (
        "context length" in message or "max_model_len" in message or "maximum model length" in message
    ):
        code = "context_length_exceeded"
        if max_length and str(max_length) not in message:
            message += f" The model takes {max_length} tokens."
    return json.dumps(shape(status, message, code=code, param=param)).encode()


async def answer_api_error(request: Request, error: Exception) -> Response:
    """Starlette's handler for ApiError."""
    if not isinstance(error, ApiError):
        raise error
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


async def answer_http_error(request: Request, error: Exception) -> Response:
    """Starlette's handler for its own HTTPException (unknown route, wrong method)."""
    status = int(getattr(error, "status_code", 500))
    message = f"{request.method} {request.url.path}: {getattr(error, 'detail', error)}."
    return JSONResponse(shape(status, message), status_code=status, headers=getattr(error, "headers", None))


async def answer_unexpected(request: Request, error: Exception) -> Response:
    """Starlette's handler for what nobody expected; the log has the traceback."""
    return JSONResponse(shape(500, "The gateway failed on this request; its log says why."), status_code=500)


def _kind(status: int) -> str:
    if status == 401:
        return "authentication_error"
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"

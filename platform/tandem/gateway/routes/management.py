"""FastAPI app of JSON management routes, with bounded JSON bodies and the gateway's error shape.

FastAPI takes a body of any size, so a route class reads it first. `Authentication` has checked the caller before. Requests to
models do not pass here.
"""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from datetime import UTC, datetime
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from tandem.api.adapters import ErrorAnswer
from tandem.errors import (
    AuthError,
    ChangedMeanwhileError,
    ConfigError,
    JobError,
    KeyMadeBeforeError,
    RegistryError,
    RegistryUnreachableError,
    StorageError,
    UnknownKeyError,
    UnknownModelError,
    did_you_mean,
    sentence,
)
from tandem.gateway.errors import ApiError, answer_api_error, answer_http_error, answer_unexpected, no_registry
from tandem.gateway.identity.authentication import check_admin, principal_of
from tandem.gateway.identity.client_address import client_address
from tandem.gateway.requests.request_body import parse_body, read_body

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

PREFIX = "/admin"
MAX_BODY_BYTES = 64 * 1024
UPLOAD_TIMEOUT_S = 30.0
WORK_TIMEOUT_S = 120.0
"""Seconds that a change may take: registering fetches an adapter from its store."""
TYPE_NAMES = {"string_type": "str", "bool_type": "bool", "int_type": "int"}
"""Expected type by pydantic's kind of error."""


def management_app(prefix: str, title: str) -> FastAPI:
    """An app to mount at `prefix`.

    The document of its routes is at `openapi.json` below it.
    """
    app = FastAPI(
        title=title,
        servers=[{"url": prefix}],
        openapi_url="/openapi.json",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        # In place of FastAPI's 422 with a shape of its own.
        responses={"4XX": {"model": ErrorAnswer}, "5XX": {"model": ErrorAnswer}},
        exception_handlers={
            ApiError: answer_api_error,
            RequestValidationError: answer_invalid,
            HTTPException: answer_http_error,
            Exception: answer_unexpected,
        },
    )
    app.router.route_class = BoundedRoute
    return app


class BoundedRoute(APIRoute):
    """A route for admins, whose body has at most `MAX_BODY_BYTES`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, after the body has been read."""
        handler = super().get_route_handler()

        async def bounded(request: Request) -> Response:
            check_admin(principal_of(request.scope))
            if self.body_field is not None and (self.body_field.field_info.is_required() or _has_body(request)):
                request = JsonRequest(request, await read_body(request, MAX_BODY_BYTES, UPLOAD_TIMEOUT_S))
            return await handler(request)

        return bounded


def _has_body(request: Request) -> bool:
    return request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers


async def run_blocking(
    work: Callable[..., T], *args: Any, retry_after_s: int, threads: Executor | None = None, **options: Any
) -> T:
    """Blocking work in a thread of `threads`, or of asyncio's own; its errors as ApiErrors.

    504 after `WORK_TIMEOUT_S`: work that has begun goes on, and work that waits for a thread is given up.
    """
    call = functools.partial(work, *args, **options)
    try:
        async with asyncio.timeout(WORK_TIMEOUT_S):
            return await asyncio.get_running_loop().run_in_executor(threads, call)
    except TimeoutError:
        raise ApiError(
            504,
            f"This did not end within {WORK_TIMEOUT_S:g} s, and goes on if it had begun. Look at its result before the request "
            "is sent again.",
            code="timeout",
        ) from None
    except UnknownModelError as error:
        raise ApiError(404, str(error), code="model_not_found", param="name") from None
    except KeyMadeBeforeError as error:
        headers = {"x-should-retry": "false"}
        raise ApiError(409, str(error), code="idempotency_conflict", param="Idempotency-Key", headers=headers) from None
    except UnknownKeyError as error:
        raise ApiError(404, str(error), code="key_not_found", param="id") from None
    except RegistryUnreachableError as error:
        raise no_registry(str(error), retry_after_s) from None
    except ChangedMeanwhileError as error:
        raise ApiError(412, str(error), code="precondition_failed", param="If-Match") from None
    except (RegistryError, ConfigError, JobError, AuthError) as error:
        raise ApiError(400, str(error)) from None
    except StorageError as error:
        raise ApiError(503, str(error)) from None


def actor(request: Request) -> dict[str, Any]:
    """The caller's key id and address, for the audit log."""
    return {"by": principal_of(request.scope).key_id, "address": client_address(request.scope)}


def with_timezone(time: datetime | None, param: str) -> datetime | None:
    """A time of the query parameter `param`, in UTC; without a zone it is that. ApiError 400 for one that no calendar has."""
    if time is None:
        return None
    try:
        return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except OverflowError:
        raise ApiError(400, f"`{param}` is before the year 1 or after 9999 in UTC.", param=param) from None


class JsonRequest(Request):
    """A request whose body has been read."""

    def __init__(self, request: Request, body: bytes) -> None:
        super().__init__(request.scope)
        self._value = parse_body(body)
        self._raw = body

    async def body(self) -> bytes:
        """The body."""
        return self._raw

    async def json(self) -> dict[str, Any]:
        """The object in it."""
        return self._value


async def answer_invalid(request: Request, error: Exception) -> Response:
    """Handler for values that do not fit a route's model: 400 for the first of them, in the gateway's shape."""
    assert isinstance(error, RequestValidationError)
    route = request.scope.get("route")
    model = getattr(getattr(route, "body_field", None), "field_info", None)
    return await answer_api_error(request, invalid_value_error(error.errors()[0], getattr(model, "annotation", None)))


def validated(model: type[M], values: dict[str, Any]) -> M:
    """The values as a model; ApiError 400 for the first that does not fit."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        raise invalid_value_error({**problem, "loc": ("body", *problem["loc"])}, model) from None


def invalid_value_error(problem: dict[str, Any], model: Any) -> ApiError:
    """The answer to one of pydantic's problems; `model` is the class of the body."""
    fields = getattr(model, "model_fields", {})
    param = ".".join(str(part) for part in problem["loc"][1:])
    kind, value = problem["type"], _description_of(problem.get("input"))
    if kind == "extra_forbidden":
        message = f"{param!r} is not known here.{did_you_mean(param, fields)}"
    elif kind in ("missing", "string_too_short"):
        description = getattr(fields.get(param), "description", None)
        message = f"`{param}` is missing: {description}" if description else f"`{param}` is missing"
    elif kind in TYPE_NAMES:
        message = f"`{param}` is {value}; it must be of type {TYPE_NAMES[kind]}"
    else:
        detail = str(problem["msg"])
        message = f"`{param}` is {value}: {detail[:1].lower()}{detail[1:]}"
    return ApiError(400, sentence(message), param=param)


def _description_of(value: Any) -> str:
    """A wrong value, for an error: numbers as they are, of all else the kind and the length."""
    match value:
        case None | bool() | int() | float():
            return json.dumps(value)[:40]
        case str():
            return f"a text of {len(value)} characters"
        case list():
            return f"a list of {len(value)}"
        case _:
            return "an object"

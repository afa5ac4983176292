"""What clients ask: the models there are, every route of an engine (serve.routes), and whether all of it is up."""

from __future__ import annotations

import functools
import time
from collections.abc import Awaitable, Callable
from typing import Any

from pydantic_core import from_json, to_json
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from tandem.api.messages import drop_null_fields
from tandem.api.request_values import value_problems
from tandem.api.unknown_fields import describe, unknown_fields
from tandem.config.serve import GatewayConfig, ServedModelConfig
from tandem.engine.parsers import without_tools
from tandem.gateway.catalog import PAGE, Catalog
from tandem.gateway.dialect import dialect_of
from tandem.gateway.errors import ApiError
from tandem.gateway.fleet import Fleet
from tandem.gateway.forward import Forwarded
from tandem.gateway.latency import Stopwatch
from tandem.gateway.prefill import prefilled
from tandem.gateway.proxy import Call, Proxy
from tandem.gateway.reading import read_ask, take_wish
from tandem.gateway.routes import stored
from tandem.serve.records import ServedModel
from tandem.serve.routes import ENGINE_ROUTES, EngineRoute

HEADERS_IN = ("x-request-id", "traceparent", "tracestate")
"""Request headers that an engine gets; a client's own key is not among them."""
STRICT_HEADER = "x-tandem-strict"
"""`true`: unknown fields of this request are an error, whatever `gateway.strict` says."""
WARNING_HEADER = "x-tandem-warning"
"""Header of an answer: what was wrong with its request and did not matter."""


class OpenAIRoutes:
    """The route handlers, around what they need."""

    def __init__(self, catalog: Catalog, fleet: Fleet, proxy: Proxy, config: GatewayConfig) -> None:
        self._catalog = catalog
        self._fleet = fleet
        self._proxy = proxy
        self._config = config

    def routes(self) -> list[BaseRoute]:
        """What Starlette mounts."""
        return [
            Route("/v1/models", self.list_models),
            Route("/v1/models/{name:path}", self.get_model),
            *(Route(route.path, self._handler(route), methods=["POST"]) for route in ENGINE_ROUTES),
            *stored.routes(),
            Route("/health", self.health),
        ]

    async def list_models(self, request: Request) -> Response:
        """What `model` may name: at most `limit` adapters (1 to 1000), by name, after the one that `after` names."""
        limit = number(request, "limit", PAGE, PAGE)
        page = await self._catalog.page(request.query_params.get("after"), limit)
        data = [card.wire() for card in page.cards]
        return JSONResponse({"object": "list", "data": data, "has_more": page.next is not None, "last_id": page.next})

    async def get_model(self, request: Request) -> Response:
        """One model, by name or id."""
        return JSONResponse((await self._catalog.card(request.path_params["name"])).wire())

    def _handler(self, route: EngineRoute) -> Callable[[Request], Awaitable[Response]]:
        dialect = dialect_of(route.path)

        async def handle(request: Request) -> Response:
            """Find out who answers, and hand the bytes on."""
            raw = await read_body(request, self._config.max_body_bytes)
            watch, arrived = Stopwatch(), time.monotonic()
            body = parse_body(raw)
            name = body.get("model")
            if not isinstance(name, str) or not name:
                found = "missing or empty" if not name else f"of type {type(name).__name__}"
                raise ApiError(400, f"`model` must be the name of a model; it is {found}.", param="model")
            said = self._check_fields(route.path, body, request)
            target = await self._catalog.resolve(name)
            check_task(name, route, self._fleet.tasks(target.base.id))
            check_tools(name, body, target.base)
            check_prompt_logprobs(name, body, target.base.config)
            if route.path == stored.PATH:
                stored.check(body)
            drop_nulls(body)
            check_values(route.path, body, raw)
            by_priority = target.base.config.engine_args.get("scheduling_policy") == "priority"
            wish = take_wish(body, request.headers, arrived, pass_on=by_priority)
            body["model"] = target.engine_name
            drop_transfers(body)
            headers = {key: request.headers[key] for key in HEADERS_IN if key in request.headers}
            call = Call(
                path=route.path,
                body=to_json(body),
                target=target,
                headers=headers,
                dialect=dialect,
                ask=read_ask(target, body, request.headers),
                wish=wish,
                light=route.light,
                watch=watch,
                said=said,
            )
            prefills = target.base.config.prefill is not None
            return Forwarded(self._proxy, call, functools.partial(prefilled, self._proxy, body) if prefills else None)

        return handle

    def _check_fields(self, path: str, body: dict[str, Any], request: Request) -> dict[str, str]:
        """A warning header for fields that no request to `path` has; where that is strict, ApiError 400 instead."""
        unknown = unknown_fields(path, body)
        if not unknown:
            return {}
        said = describe(path, unknown)
        if self._config.strict or request.headers.get(STRICT_HEADER, "").lower() in ("1", "true"):
            raise ApiError(400, f"The request has an {said}.", code="unknown_field", param=unknown[0])
        return {WARNING_HEADER: said}

    async def health(self, request: Request) -> Response:
        """200 once every model has a ready replica, or may be without; 503 with the counts before."""
        ready = {model.name: len(self._fleet.ready(model.id, suspects=True)) for model in self._catalog.models}
        whole = all(ready[model.name] or model.sleeps for model in self._catalog.models)
        headers = {} if whole else {"Retry-After": str(self._config.retry_after_s)}
        status = {"status": "ok" if whole else "unavailable", "ready_replicas": ready}
        return JSONResponse(status, status_code=200 if whole else 503, headers=headers)


def check_task(name: str, route: EngineRoute, tasks: tuple[str, ...]) -> None:
    """ApiError 400 if a model's engines, which do `tasks`, lack a route; one that has not said what it does is asked."""
    if route.task and tasks and route.task not in tasks:
        offered = ", ".join(r.path for r in ENGINE_ROUTES if r.task is None or r.task in tasks)
        raise ApiError(
            400,
            f"The model {name!r} has no {route.path}: that takes a model served to {route.task}, and this one is served to "
            f"{', '.join(tasks)}. It has {offered}.",
            code="unsupported_route",
            param="model",
        )


def number(request: Request, name: str, default: int, most: int) -> int:
    """A count in the query string, from 1 to `most`; ApiError 400 for anything else."""
    text = request.query_params.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and 1 <= int(text) <= most):
        raise ApiError(400, f"`{name}` is {text!r}; it must be a number from 1 to {most}.", param=name)
    return int(text)


def drop_nulls(body: dict[str, Any]) -> None:
    """Take out fields that are null, in messages too: OpenAI's API takes null for absent, vLLM's does only for some fields."""
    for key in [key for key, value in body.items() if value is None]:
        del body[key]
    drop_null_fields(body.get("messages"))


def check_values(path: str, body: dict[str, Any], raw: bytes) -> None:
    """ApiError 400 for values that an engine would fail on, or tell of in words about its own classes."""
    problems = value_problems(path, body, raw)
    if problems:
        raise ApiError(400, " ".join(map(str, problems)), param=problems[0].field)


def drop_transfers(body: dict[str, Any]) -> None:
    """Take out what says from which host an engine fetches a cache: the gateway's to say, never a client's."""
    inner = body.get("vllm_xargs")
    for holder in (body, inner if isinstance(inner, dict) else {}):
        for key in ("kv_transfer_params", "ec_transfer_params"):
            holder.pop(key, None)


def check_tools(name: str, body: dict[str, Any], model: ServedModel) -> None:
    """ApiError 400 for tools at a model that takes none: some of vLLM's routes would leave them out without a word."""
    choice = body.get("tool_choice")
    none = choice == "none" or (isinstance(choice, dict) and choice.get("type") == "none")
    if body.get("tools") and not none and not model.tools:
        raise ApiError(400, without_tools(name), code="unsupported_parameter", param="tools")


def check_prompt_logprobs(name: str, body: dict[str, Any], config: ServedModelConfig) -> None:
    """ApiError 400 for a request that would end the engine.

    On a CPU, with adapters on, vLLM 0.29 multiplies the adapters of the tokens to be sampled with the rows of the whole prompt;
    where more than one request runs, these are not of one size, and the engine's process dies.
    """
    # 0 asks for the logprob of each token itself, so it is not the same as false.
    told = any(body.get(key) is not None and body.get(key) is not False for key in ("logprobs", "top_logprobs"))
    asked = body.get("prompt_logprobs") is not None or (body.get("echo") and told)
    if asked and config.max_adapters and not config.gpus_per_replica:
        raise ApiError(
            400,
            f"The model {name!r} is served on CPUs with adapters, where vLLM has no logprobs of a prompt (`prompt_logprobs`, or "
            "`echo` with `logprobs`). Serve it with max_adapters: 0, or on a GPU.",
            code="unsupported_parameter",
            param="prompt_logprobs" if "prompt_logprobs" in body else "echo",
        )


async def read_body(request: Request, limit: int) -> bytes:
    """The request's body; ApiError 413 as soon as it is known to be larger than `limit` bytes, 415 if it is compressed."""
    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        raise ApiError(
            415,
            f"The request body is compressed (Content-Encoding: {encoding[:40]!a}); only plain bodies are taken.",
            code="unsupported_encoding",
            headers={"Accept-Encoding": "identity"},
        )
    declared = request.headers.get("content-length", "")
    parts, size = [], int(declared) if declared.isdigit() else 0
    if size <= limit:
        size = 0
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            if size > limit:
                break
    if size > limit:
        raise ApiError(
            413, f"The request body has {size if declared else f'more than {limit}'} bytes; at most {limit} are taken."
        )
    return parts[0] if len(parts) == 1 else b"".join(parts)


def parse_body(body: bytes) -> dict[str, Any]:
    """The JSON object in a body; ApiError 400 for anything else."""
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"The request body is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"The request body must be a JSON object; it is of type {type(value).__name__}.")
    return value

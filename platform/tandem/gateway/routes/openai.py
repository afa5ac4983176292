"""Routes for clients: list of models, every route of an engine (`engine.routes`), health."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from tandem.api.nulls import drop_nulls
from tandem.api.request_values import missing_fields, value_problems
from tandem.api.unknown_fields import describe, unknown_fields
from tandem.config.serving.app import GatewayConfig
from tandem.engine.descriptor import EngineDescriptor, UnsupportedRequestError
from tandem.engine.routes import ENGINE_ROUTES, EngineRoute
from tandem.errors import sentence
from tandem.gateway.accounting.account import Accounting, expected_tokens
from tandem.gateway.dialect import dialect_of
from tandem.gateway.errors import ApiError, request_id
from tandem.gateway.identity.authentication import PRINCIPAL, principal_of
from tandem.gateway.latency import Stopwatch
from tandem.gateway.models.catalog import PAGE, Catalog
from tandem.gateway.prefill import with_prefill
from tandem.gateway.relay import Relay, RelayedResponse
from tandem.gateway.replicas.fleet import Fleet
from tandem.gateway.replicas.upstream import EngineRequest
from tandem.gateway.requests.held_bytes import HeldBody
from tandem.gateway.requests.large_bodies import LargeBodies
from tandem.gateway.requests.quarantine import body_digest
from tandem.gateway.requests.query import page_limit
from tandem.gateway.requests.request_body import parse_in_turns, read_body
from tandem.gateway.requests.request_caps import check_caps
from tandem.gateway.requests.request_content import check_content
from tandem.gateway.requests.request_hints import read_routing_request, salt_cache, take_scheduling_hints
from tandem.gateway.routes import responses
from tandem.gateway.stored.service import KINDS, StoredAnswerService, StoredRequest
from tandem.gateway.work.calls import once_of
from tandem.routing.records import ServedModel
from tandem.usage import UsageLabels

ENGINE_HEADERS = ("traceparent", "tracestate")
"""Request headers passed to the engine beside a given id of the request; a client's API key is not among them."""
STRICT_HEADER = "x-tandem-strict"
"""`true`: unknown fields of this request are an error, whatever `gateway.strict` says."""
REPEATED_HEADER = "idempotent-replayed"
"""Response header: `true` for the stored answer to a request that was sent before with the same `Idempotency-Key`."""
HEALTH_CACHE_S = 1.0
"""Seconds for which `/health` without a key repeats its answer."""
WARNING_HEADER = "x-tandem-warning"
"""Response header that names unknown fields of the request."""


class OpenAIRoutes:
    """The route handlers."""

    def __init__(
        self,
        catalog: Catalog,
        fleet: Fleet,
        relay: Relay,
        config: GatewayConfig,
        accounting: Accounting,
        stored: StoredAnswerService,
    ) -> None:
        self._accounting = accounting
        self._catalog = catalog
        self._fleet = fleet
        self._relay = relay
        self._stored = stored
        self._config = config
        self._large_bodies = LargeBodies()
        self._healthy, self._healthy_until = False, -math.inf
        """Whether every model can answer, and the monotonic time until which this value is cached."""

    def routes(self) -> list[BaseRoute]:
        """The routes for Starlette."""
        return [
            Route("/v1/models", self.list_models),
            Route("/v1/models/{name:path}", self.get_model),
            *(Route(route.path, self._handler(route), methods=["POST"]) for route in ENGINE_ROUTES),
            Route("/health", self.health),
            Route("/health/live", self.live),
            Route("/health/ready", self.ready),
        ]

    async def list_models(self, request: Request) -> Response:
        """The models, and at most `limit` adapters (1 to 1000) by name, after the name `after`."""
        limit = page_limit(request, PAGE, PAGE)
        page = await self._catalog.page(principal_of(request.scope), request.query_params.get("after"), limit)
        data = [card.to_json() for card in page.cards]
        return JSONResponse({"object": "list", "data": data, "has_more": page.next is not None, "last_id": page.next})

    async def get_model(self, request: Request) -> Response:
        """One model, by name or id."""
        card = await self._catalog.card(request.path_params["name"], principal_of(request.scope))
        return JSONResponse(card.to_json())

    def _handler(self, route: EngineRoute) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            """Read the body within the gateway's byte budget, and relay the request."""
            principal = principal_of(request.scope)
            self._accounting.check_rate(principal)
            held_body = self._relay.held_bytes.body(principal.tenant)
            try:
                raw = await read_body(request, self._config.max_body_bytes, self._config.upload_timeout_s, held_body)
                return await self._relay_request(route, request, raw, held_body)
            except BaseException as error:
                held_body.release()
                if isinstance(error, ApiError):
                    # Requests that are wrong count as requests.
                    await self._accounting.count(principal)
                raise

        return handle

    async def _relay_request(self, route: EngineRoute, request: Request, raw: bytes, held_body: HeldBody) -> Response:
        """Resolve the model, check the request and relay it."""
        stopwatch, arrived = Stopwatch(), time.monotonic()
        size, large_bodies = len(raw), self._large_bodies
        body = await parse_in_turns(raw, large_bodies)
        name = model_name_of(body)
        warnings = self._check_fields(route.path, body, request)
        principal = principal_of(request.scope)
        model = await self._catalog.resolve(name, principal)
        engine, config = model.engine, model.base.config
        check_route(name, route, engine, self._fleet.tasks.get(model.base.id, ()))
        client_raw = raw
        stored, raw = await self._prepare_stored(route.path, body, raw, request)
        if stored.repeated is not None:
            held_body.release()
            await self._accounting.count(principal)
            answer = await self._stored.encoded(to_json, dict(stored.repeated.answer))
            answer.headers[REPEATED_HEADER] = "true"
            return answer
        size = len(raw)
        held_body.grow_to(size)
        try:
            engine.requests.check(name, body, config, model.base.supports_tools)
        except UnsupportedRequestError as error:
            raise ApiError(400, str(error), code="unsupported_parameter", param=error.param) from None
        drop_nulls(body)
        await large_bodies.run(size, check_values, route.path, body, raw, self._config.caps.schema_bytes)
        await large_bodies.run(size, check_content, body, raw, self._config.allow, self._config.media_hosts)
        sequences = await large_bodies.run(size, check_caps, route, body, self._config.caps, size)
        hints = take_scheduling_hints(
            body,
            request.headers,
            arrived,
            keep_priority=engine.requests.keeps_priority(config.engine_args),
            sequences=sequences,
            highest_priority=self._accounting.highest_priority(principal),
            tenant=principal.tenant,
        )
        body["model"] = model.engine_name
        if route.task is not None and not route.light:
            salt_cache(body, principal.tenant)
        drop_kv_transfer(body)
        adapter = model.adapter.id if model.adapter else ""
        labels = UsageLabels(principal.key_id, principal.tenant, model.base.id, adapter, route.path)
        expected_counts = expected_tokens(route, body, size, sequences, model.base.max_length)
        account = self._accounting.open(principal, labels, expected_counts)
        engine_request = EngineRequest(
            path=route.path,
            body=await large_bodies.run(size, to_json, body),
            labels=labels,
            digest=await large_bodies.run_in_thread(size, body_digest, f"{route.path} {model.engine_name}", raw),
            model=model,
            headers=engine_headers(request),
            dialect=dialect_of(route.path),
            routing=read_routing_request(model, body, request.headers, principal.tenant),
            hints=hints,
            light=route.light,
            stopwatch=stopwatch,
            warnings=warnings,
        )
        prepare = functools.partial(with_prefill, self._relay) if config.prefill else None
        recording, warning = self._stored.record(stored.labels, client_raw)
        add_warning(warnings, warning)
        return RelayedResponse(self._relay, engine_request, account, prepare, held_body, recording)

    async def _prepare_stored(
        self, path: str, body: dict[str, Any], raw: bytes, request: Request
    ) -> tuple[StoredRequest, bytes]:
        """Take what concerns stored answers out of a body; what that was, and the engine's body.

        That has the whole conversation where the request goes on from a stored response.
        """
        if path not in KINDS:
            return StoredRequest(labels=None), raw
        if path == responses.PATH:
            responses.check(body, can_store=self._stored.config.enabled)
        key = once_of(request) if "idempotency-key" in request.headers else None
        stored = await self._stored.prepare(path, body, principal_of(request.scope), key)
        if path == responses.PATH:
            # Left out it would be true.
            body["store"] = False
        if stored.conversation is not None:
            body["input"] = stored.conversation
            raw = await self._large_bodies.run(stored.num_bytes, to_json, body)
        return stored, raw

    def _check_fields(self, path: str, body: dict[str, Any], request: Request) -> dict[str, str]:
        """A warning header for unknown fields of a request to `path`; in strict mode ApiError 400 instead."""
        unknown = unknown_fields(path, body)
        if not unknown:
            return {}
        warnings = describe(path, unknown)
        if self._config.strict or request.headers.get(STRICT_HEADER, "").lower() in ("1", "true"):
            raise ApiError(400, sentence(f"The request has an {warnings}"), code="unknown_field", param=unknown[0])
        return {WARNING_HEADER: warnings}

    async def health(self, request: Request) -> Response:
        """200 if every model has a ready replica or may scale to zero, otherwise 503.

        With a key it also tells the numbers of ready replicas of the models that the key may use. Without one anybody may ask, as
        often as they like: the answer is computed once in HEALTH_CACHE_S.
        """
        has_key = PRINCIPAL in request.scope
        now = time.monotonic()
        if has_key or now >= self._healthy_until:
            self._healthy = all(model.scales_to_zero or self._ready(model) for model in self._catalog.models)
            self._healthy_until = now + HEALTH_CACHE_S
        headers = {} if self._healthy else {"Retry-After": str(self._config.retry_after_s)}
        status: dict[str, Any] = {"status": "ok" if self._healthy else "unavailable"}
        if has_key:
            usable = self._catalog.usable(principal_of(request.scope))
            status["ready_replicas"] = {model.name: self._ready(model) for model in usable}
        return JSONResponse(status, status_code=200 if self._healthy else 503, headers=headers)

    def _ready(self, model: ServedModel) -> int:
        return len(self._fleet.ready(model.id, suspects=True))

    async def live(self, request: Request) -> Response:
        """200: this gateway answers."""
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """200 while this gateway knows the replicas from the directory; 503 before, and once its copy is stale."""
        ready = self._fleet.fresh
        return JSONResponse({"status": "ok" if ready else "unavailable"}, status_code=200 if ready else 503)


def model_name_of(body: dict[str, Any]) -> str:
    """The name of the model that a request is for; ApiError 400 if there is none."""
    name = body.get("model")
    if not isinstance(name, str) or not name:
        problem = "missing or empty" if not name else f"of type {type(name).__name__}"
        raise ApiError(400, f"`model` must be the name of a model; it is {problem}.", param="model")
    return name


def add_warning(headers: dict[str, str], warning: str) -> None:
    """Add a warning, unless it is empty, to the response header of warnings."""
    if warning:
        headers[WARNING_HEADER] = "; ".join(filter(None, (headers.get(WARNING_HEADER), warning)))


def check_route(name: str, route: EngineRoute, engine: EngineDescriptor, tasks: tuple[str, ...]) -> None:
    """ApiError 400 if an engine lacks a route, or its replicas a task; `tasks` is empty until a replica has reported."""

    def has(candidate: EngineRoute) -> bool:
        return candidate in engine.routes and (candidate.task is None or not tasks or candidate.task in tasks)

    if not has(route):
        raise ApiError(
            400,
            f"The model {name!r} has no {route.path}: that takes a model served to {route.task}, and this one is served to "
            f"{', '.join(tasks or engine.tasks)}. It has {', '.join(other.path for other in engine.routes if has(other))}.",
            code="unsupported_route",
            param="model",
        )


def engine_headers(request: Request) -> dict[str, str]:
    """The request's headers that are passed to the engine."""
    headers = {key: request.headers[key] for key in ENGINE_HEADERS if key in request.headers}
    return headers | ({"x-request-id": request_id(request.scope)} if "x-request-id" in request.headers else {})


def check_values(path: str, body: dict[str, Any], raw: bytes, max_schema_chars: int) -> None:
    """ApiError 400 for missing fields, and for values that an engine fails on or describes in terms of its own classes."""
    problems = value_problems(path, body, raw, max_schema_chars) or missing_fields(path, body)
    if problems:
        raise ApiError(400, " ".join(map(str, problems)), param=problems[0].field)


def drop_kv_transfer(body: dict[str, Any]) -> None:
    """Remove fields that name a host from which an engine fetches a KV cache: only the gateway may set them."""
    extra_args = body.get("vllm_xargs")
    for fields in (body, extra_args if isinstance(extra_args, dict) else {}):
        for key in ("kv_transfer_params", "ec_transfer_params"):
            fields.pop(key, None)

"""ASGI app of the gateway: routes, background tasks, error handlers. Imports neither torch, vllm nor transformers."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Protocol

from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import BaseRoute, Mount

from tandem.auth import KeyStore
from tandem.config.serving.app import GatewayConfig, RouterConfig
from tandem.engine.routes import ENGINE_ROUTES
from tandem.files.content import ContentStore
from tandem.files.uploads import UploadStore
from tandem.gateway.accounting.access_log import AccessLog, LogAccess
from tandem.gateway.accounting.account import Accounting
from tandem.gateway.accounting.day_usage import DayUsage
from tandem.gateway.accounting.limiter import ApplyLimits, Limiter
from tandem.gateway.admission.control import Admission, QueueMetrics
from tandem.gateway.admission.demand import DemandReport, ReportDemand
from tandem.gateway.errors import EXCEPTION_HANDLERS
from tandem.gateway.files.service import FileService
from tandem.gateway.files.upkeep import Upkeep
from tandem.gateway.identity.parts import Identity
from tandem.gateway.latency import RecordLatency, ignore_latency
from tandem.gateway.models.catalog import Catalog
from tandem.gateway.relay import Relay
from tandem.gateway.replicas.fleet import Fleet, WatchReplicas
from tandem.gateway.replicas.replica_probe import ReplicaProbe
from tandem.gateway.replicas.upstream import Upstream
from tandem.gateway.response_headers import browser_middleware
from tandem.gateway.routes.admin import AdminRoutes
from tandem.gateway.routes.audit import AuditRoutes
from tandem.gateway.routes.chat_completions import ChatCompletionRoutes
from tandem.gateway.routes.files import FileRoutes
from tandem.gateway.routes.keys import KeyRoutes
from tandem.gateway.routes.management import PREFIX, management_app
from tandem.gateway.routes.openai import OpenAIRoutes
from tandem.gateway.routes.openapi.document import document_route
from tandem.gateway.routes.responses import ResponseRoutes
from tandem.gateway.routes.uploads import UploadRoutes
from tandem.gateway.routes.usage import UsageRoutes
from tandem.gateway.stored.service import StoredAnswerService
from tandem.gateway.work.parts import Work
from tandem.jobs.adapters import Adapters
from tandem.jobs.tracking.logs import LogSource
from tandem.registry import Registry
from tandem.routing.records import ServedModel
from tandem.routing.router import Router
from tandem.serve.app_tls import ClientTls
from tandem.usage import UsageStore, UsageWriter


def create_app(
    *,
    models: Iterable[ServedModel],
    watch: WatchReplicas,
    registry: Registry,
    config: GatewayConfig | None = None,
    record_latency: RecordLatency = ignore_latency,
    router: RouterConfig | None = None,
    admin: str | None = None,
    require_keys: bool = False,
    metrics: QueueMetrics | None = None,
    report_demand: ReportDemand | None = None,
    apply_limits: ApplyLimits | None = None,
    access_log: Path | None = None,
    name: str = "gateway",
    server_adds_request_id: bool = False,
    proxy_secret: str | None = None,
    engine_tls: ClientTls | None = None,
    run_logs: Callable[[], LogSource] | None = None,
) -> Starlette:
    """The gateway's app for `models`.

    `watch` returns the directory's next update, `router` configures the choice among them. `record_latency` gets the milliseconds
    added to each request, `metrics` the queue lengths, `report_demand` the waiting requests of models that scale.
    `apply_limits` reaches the ledger of limits that all gateways of the app share; None: this one has a ledger of its own.
    `access_log`: the file of the access log; None: there is none. `name`: the gateway's id in response headers.
    `app.state.admission` holds the queues.
    `admin`: fingerprint of TANDEM_ADMIN_TOKEN, which is accepted as an admin's key. `require_keys`: whether every request needs
    an API key even before the first one is made.
    `server_adds_request_id`: whether the server that runs the app adds `x-request-id` to every response, as Ray Serve does.
    `proxy_secret`: by which requests of this node's HAProxy are known; it tells their clients' addresses.
    `engine_tls`: the TLS context for engines whose URL has the scheme https.
    `run_logs`: the logs of runs on this app's cluster; None: it has no cluster, and only logs that were kept are read.
    """
    config = config or GatewayConfig()
    catalog = Catalog(models, registry, config.retry_after_s)
    fleet = Fleet(watch, Router(router, gateways=config.replicas), models=catalog.models)
    admission = Admission(catalog.models, fleet, config, metrics)
    demand_report = DemandReport(catalog.models, admission.waiting, report_demand) if report_demand else None
    upstream = Upstream(config, engine_tls)
    relay = Relay(fleet, admission, upstream, config, record_latency=record_latency, name=name)
    identity = Identity(registry.address, config.oidc)
    usage = UsageStore.at(registry.address)
    accounting, day_usage = _accounting(identity, usage, config, name, apply_limits)
    request_log = AccessLog(access_log) if access_log else None
    probe = ReplicaProbe(upstream, fleet)
    fleet.on_lost, fleet.probe = probe.start, probe.is_ready
    stored = StoredAnswerService(registry.address, config)
    model_routes = OpenAIRoutes(catalog, fleet, relay, config, accounting, stored).routes()
    work = Work(registry.address, catalog, admission, fleet, identity, accounting, config, name, model_routes, run_logs)
    files = _file_service(registry, config, accounting, relay)
    administration, key_routes = _administration(registry, catalog, fleet, identity, usage, config)

    # Answers that the relay still sends are stored too: the recorder stops after it.
    services = (request_log, identity, accounting, catalog, stored.recorder, relay, fleet, files.upkeep, demand_report)
    closeables = (usage, day_usage, key_routes, files, work, stored)
    groups = (ResponseRoutes(stored), ChatCompletionRoutes(stored), FileRoutes(files), UploadRoutes(files), work)
    authentication = identity.middleware(require_keys=require_keys, admin=admin, proxy_secret=proxy_secret)
    app = Starlette(
        routes=[*model_routes, *_other_routes(groups, administration)],
        middleware=[*_log_middleware(request_log), *browser_middleware(config.cors_origins), authentication],
        lifespan=lambda app: _run_services((*services, work.model_answers, work.worker, work.webhooks), closeables),
        exception_handlers=EXCEPTION_HANDLERS,
    )
    # A path with a trailing slash is 404, not a redirect.
    app.router.redirect_slashes = False
    parts = {"admission": admission, "fleet": fleet, "upstream": upstream, "identity": identity, "catalog": catalog}
    for part, value in (parts | {"relay": relay, "files": files, "stored": stored, "work": work}).items():
        setattr(app.state, part, value)
    _set_route_segments(route_segments([*app.routes, *administration.routes]), identity, request_log)
    for closeable in (app, administration):
        closeable.state.server_adds_request_id = server_adds_request_id
    return app


class RouteGroup(Protocol):
    """Routes of one kind of resource."""

    def routes(self) -> list[BaseRoute]:
        """The routes for Starlette."""
        ...


def _other_routes(groups: Iterable[RouteGroup], administration: FastAPI) -> list[BaseRoute]:
    """The routes beside those of models: of the groups, the OpenAPI document and administration."""
    return [
        *(route for group in groups for route in group.routes()),
        document_route(ENGINE_ROUTES, administration, PREFIX),
        Mount(PREFIX, administration),
    ]


def _administration(
    registry: Registry, catalog: Catalog, fleet: Fleet, identity: Identity, usage: UsageStore, config: GatewayConfig
) -> tuple[FastAPI, KeyRoutes]:
    """The app of admin routes, and those of its routes that have threads to end."""
    app = management_app(PREFIX, "Tandem admin")
    keys = KeyStore.at(registry.address)
    key_routes = KeyRoutes(keys, registry, catalog.names, config.retry_after_s)
    AdminRoutes(Adapters(registry), fleet, identity.audit, config).add_to(app)
    AuditRoutes(identity.audit, config.retry_after_s).add_to(app)
    UsageRoutes(usage, keys, config.retry_after_s).add_to(app)
    key_routes.add_to(app)
    return app, key_routes


def _log_middleware(request_log: AccessLog | None) -> list[Middleware]:
    return [Middleware(LogAccess, access_log=request_log)] if request_log else []


def _file_service(registry: Registry, config: GatewayConfig, accounting: Accounting, relay: Relay) -> FileService:
    """Uploaded files, with connections of their own to the database."""
    contents = ContentStore.open(registry.identity, config.files.location)
    upkeep = Upkeep(UploadStore.at(registry.address), contents)
    return FileService(UploadStore.at(registry.address), contents, config, accounting, relay.held_bytes, upkeep)


def _accounting(
    identity: Identity, usage: UsageStore, config: GatewayConfig, name: str, apply_limits: ApplyLimits | None
) -> tuple[Accounting, DayUsage]:
    """Limits and usage of a gateway, with connections of their own to the database of `usage`; the reads have to be closed."""
    day_usage = DayUsage(usage.impatient(), lambda: identity.keys.budgets)
    limiter = Limiter(name, gateways=config.replicas, apply=apply_limits, totals=day_usage.read)
    writer = UsageWriter(UsageStore.at(usage.address))
    return Accounting(limiter, writer, identity.keys.tenant_limits), day_usage


class BackgroundService(Protocol):
    """A part of the app with background tasks."""

    def start(self) -> Awaitable[None] | None:
        """Begin."""
        ...

    def stop(self) -> Awaitable[None] | None:
        """End."""
        ...


class Closeable(Protocol):
    """A part of the app with threads or connections to end."""

    def close(self) -> None:
        """End them."""
        ...


@contextlib.asynccontextmanager
async def _run_services(
    services: Iterable[BackgroundService | None], closeables: Iterable[Closeable]
) -> AsyncIterator[None]:
    """Start the services in this order, stop them in the reverse one, and close what has threads."""
    async with contextlib.AsyncExitStack() as stack:
        for closeable in closeables:
            stack.callback(closeable.close)
        for service in services:
            if service is not None:
                stack.push_async_callback(_call, service.stop)
                await _call(service.start)
        yield


async def _call(hook: Callable[[], Awaitable[None] | None]) -> None:
    result = hook()
    if result is not None:
        await result


def _set_route_segments(segments: frozenset[str], identity: Identity, request_log: AccessLog | None) -> None:
    """Set the parts of a path that both logs may keep; all others are masked."""
    identity.audit.route_segments = segments
    if request_log is not None:
        request_log.route_segments = segments


def route_segments(routes: Iterable[BaseRoute]) -> frozenset[str]:
    """The fixed parts of routes' paths, such as `v1` and `completions`."""
    segments = {part for route in routes for part in str(getattr(route, "path", "")).split("/")}
    return frozenset(part for part in segments if part and "{" not in part)

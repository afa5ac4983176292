"""ASGI app of the gateway: routes, background tasks, error handlers. Imports neither torch, vllm nor transformers."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Mount

from tandem.auth import KeyStore
from tandem.auth.key_table import KeyTable
from tandem.config.serving.app import GatewayConfig, RouterConfig
from tandem.gateway.admission.control import Admission, QueueMetrics
from tandem.gateway.admission.demand import DemandReport, ReportDemand
from tandem.gateway.authentication import Authentication
from tandem.gateway.catalog import Catalog
from tandem.gateway.errors import ApiError, answer_api_error, answer_http_error, answer_unexpected
from tandem.gateway.fleet import Fleet, WatchReplicas
from tandem.gateway.latency import RecordLatency, ignore_latency
from tandem.gateway.relay import Relay
from tandem.gateway.replica_probe import ReplicaProbe
from tandem.gateway.response_headers import browser_middleware
from tandem.gateway.routes.admin import PREFIX, AdminRoutes
from tandem.gateway.routes.openai import OpenAIRoutes
from tandem.gateway.upstream import Upstream
from tandem.jobs.adapters import Adapters
from tandem.registry import Registry
from tandem.routing.records import ServedModel
from tandem.routing.router import Router


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
    name: str = "gateway",
    server_adds_request_id: bool = False,
) -> Starlette:
    """The gateway's app for `models`.

    `watch` returns snapshots of the replicas, `router` configures the choice among them. `record_latency` gets the milliseconds
    added to each request, `metrics` the queue lengths, `report_demand` the waiting requests of models that scale.
    `name`: the gateway's id in response headers. `app.state.admission` holds the queues.
    `admin`: fingerprint of TANDEM_ADMIN_TOKEN, which is accepted as an admin's key. `require_keys`: whether every request needs
    an API key even before the first one is made.
    `server_adds_request_id`: whether the server that runs the app adds `x-request-id` to every response, as Ray Serve does.
    """
    config = config or GatewayConfig()
    catalog = Catalog(models, registry, config.retry_after_s)
    fleet = Fleet(watch, Router(router, gateways=config.replicas), models=catalog.models)
    admission = Admission(catalog.models, fleet, config, metrics)
    report = DemandReport(catalog.models, admission.waiting, report_demand) if report_demand else None
    upstream = Upstream(config)
    relay = Relay(fleet, admission, upstream, config, record_latency=record_latency, name=name)
    keys = KeyTable(KeyStore.at(registry.address))
    fleet.on_lost = ReplicaProbe(upstream, fleet).start

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await keys.start()
        relay.start()
        await fleet.start()
        if report is not None:
            report.start()
        try:
            yield
        finally:
            if report is not None:
                await report.stop()
            await fleet.stop()
            await relay.stop()
            await keys.stop()
            catalog.close()

    administration = AdminRoutes(Adapters(registry), fleet, config).app()
    app = Starlette(
        routes=[
            *OpenAIRoutes(catalog, fleet, relay, config).routes(),
            Mount(PREFIX, administration),
        ],
        middleware=[
            *browser_middleware(config.cors_origins),
            Middleware(Authentication, keys=keys, required=require_keys, admin=admin),
        ],
        lifespan=lifespan,
        exception_handlers={
            ApiError: answer_api_error,
            HTTPException: answer_http_error,
            Exception: answer_unexpected,
        },
    )
    # A path with a trailing slash is 404, not a redirect.
    app.router.redirect_slashes = False
    app.state.admission, app.state.keys, app.state.relay = admission, keys, relay
    for each in (app, administration):
        each.state.server_adds_request_id = server_adds_request_id
    return app

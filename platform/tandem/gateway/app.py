"""The gateway's ASGI app. Starts in about a second: neither torch nor vllm nor transformers is imported here."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException

from tandem.config.serving.app import GatewayConfig, RouterConfig
from tandem.gateway.admission.control import Admission, Meter
from tandem.gateway.admission.demand import DemandReport, Tell
from tandem.gateway.catalog import Catalog
from tandem.gateway.errors import ApiError, answer_api_error, answer_http_error, answer_unexpected
from tandem.gateway.fleet import Fleet, Watch
from tandem.gateway.latency import Record, forget
from tandem.gateway.routes.admin import AdminRoutes
from tandem.gateway.routes.openai import OpenAIRoutes
from tandem.gateway.upstream import Proxy
from tandem.jobs.adapters import Adapters
from tandem.registry import Registry
from tandem.routing.records import ServedModel
from tandem.routing.router import Router


def create_app(
    *,
    models: Iterable[ServedModel],
    watch: Watch,
    registry: Registry,
    config: GatewayConfig | None = None,
    record: Record = forget,
    router: RouterConfig | None = None,
    admin: str | None = None,
    meter: Meter | None = None,
    tell: Tell | None = None,
    name: str = "gateway",
) -> Starlette:
    """The app that answers for `models`.

    `watch` tells it of the replicas and `router` how to choose among them; `record` hears what it adds to each request,
    `meter` how many wait, and `tell` how many of these are for models that scale. `app.state.admission` is what they wait in.
    `name`: what its answers call it.
    `admin`: the fingerprint of the token that opens the operator's routes; None keeps them closed.
    """
    config = config or GatewayConfig()
    catalog = Catalog(models, registry, config.retry_after_s)
    fleet = Fleet(watch, Router(router, gateways=config.replicas), models=catalog.models)
    admission = Admission(catalog.models, fleet, config, meter)
    report = DemandReport(catalog.models, admission.waiting, tell) if tell else None
    proxy = Proxy(fleet, admission, config, record, name)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        proxy.start()
        await fleet.start()
        if report is not None:
            report.start()
        try:
            yield
        finally:
            if report is not None:
                await report.stop()
            await fleet.stop()
            await proxy.stop()
            catalog.close()

    app = Starlette(
        routes=[
            *OpenAIRoutes(catalog, fleet, proxy, config).routes(),
            *AdminRoutes(Adapters(registry), fleet, admin, config.retry_after_s).routes(),
        ],
        lifespan=lifespan,
        exception_handlers={
            ApiError: answer_api_error,
            HTTPException: answer_http_error,
            Exception: answer_unexpected,
        },
    )
    # A path that only looks like a route is not there, rather than somewhere else.
    app.router.redirect_slashes = False
    app.state.admission = admission
    return app

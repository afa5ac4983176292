"""Routes of OpenAI's batches: create, list, show, cancel."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from tandem.api.openai.batches import BatchCreation
from tandem.config.serving.batches import BatchesConfig
from tandem.gateway.errors import ApiError
from tandem.gateway.identity.authentication import principal_of, tenant_of
from tandem.gateway.requests.query import page_limit
from tandem.gateway.work.calls import WorkCalls, once_of, read_model
from tandem.jobs.batches.service import BatchService

PATH = "/v1/batches"


class BatchRoutes:
    """The route handlers."""

    def __init__(self, service: BatchService, calls: WorkCalls, config: BatchesConfig) -> None:
        self._service = service
        self._calls = calls
        self._config = config

    def routes(self) -> list[BaseRoute]:
        """The routes for Starlette."""
        batch = f"{PATH}/{{batch_id}}"
        return [
            Route(PATH, self.list_batches),
            Route(PATH, self.create, methods=["POST"]),
            Route(batch, self.show),
            Route(f"{batch}/cancel", self.cancel, methods=["POST"]),
        ]

    async def create(self, request: Request) -> Response:
        """Create a batch of the requests in an uploaded file."""
        if not self._config.enabled:
            raise ApiError(403, "Batches are switched off here (gateway.batches.enabled).", code="batches_disabled")
        principal = principal_of(request.scope)
        batch = await self._calls(
            self._service.create,
            await read_model(request, BatchCreation),
            tenant=tenant_of(principal),
            key_id=principal.key_id,
            models=principal.models,
            idempotency_key=once_of(request),
        )
        return JSONResponse(batch.model_dump())

    async def list_batches(self, request: Request) -> Response:
        """Batches of the caller's tenant, newest first, at most `limit` after the id `after`."""
        page = await self._calls(
            self._service.page,
            tenant_of(principal_of(request.scope)),
            after=request.query_params.get("after"),
            limit=page_limit(request, 20, 100),
        )
        return JSONResponse(page.model_dump())

    async def show(self, request: Request) -> Response:
        """One batch."""
        batch = await self._calls(self._service.get, *self._target(request))
        return JSONResponse(batch.model_dump())

    async def cancel(self, request: Request) -> Response:
        """Cancel a batch; what is answered by then is in its output."""
        batch = await self._calls(self._service.cancel, *self._target(request))
        return JSONResponse(batch.model_dump())

    def _target(self, request: Request) -> tuple[str, str]:
        return request.path_params["batch_id"], tenant_of(principal_of(request.scope))

"""Routes of OpenAI's fine-tuning jobs: create, list, show, cancel, pause, resume, events (paged or streamed), checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from tandem.api.openai.fine_tuning import (
    FineTuningCheckpointList,
    FineTuningCreation,
    FineTuningEventList,
)
from tandem.config.serving.fine_tuning import FineTuningConfig
from tandem.gateway.errors import ApiError
from tandem.gateway.identity.authentication import principal_of, tenant_of
from tandem.gateway.models.catalog import Catalog
from tandem.gateway.requests.query import metadata_pairs, page_limit
from tandem.gateway.work.calls import WorkCalls, check_trainer, once_of, read_model
from tandem.gateway.work.streams import LineStream, OpenStreams
from tandem.jobs.fine_tuning.service import Base, FineTuningService
from tandem.jobs.work.states import Action

PATH = "/v1/fine_tuning/jobs"


class Identified(Protocol):
    """An object of a list."""

    id: str


T = TypeVar("T", bound=Identified)


class FineTuningRoutes:
    """The route handlers."""

    def __init__(
        self,
        service: FineTuningService,
        catalog: Catalog,
        calls: WorkCalls,
        platform: FineTuningConfig,
        streams: OpenStreams,
    ) -> None:
        self._service = service
        self._catalog = catalog
        self._calls = calls
        self._platform = platform
        self._streams = streams

    def routes(self) -> list[BaseRoute]:
        """The routes for Starlette."""
        job = f"{PATH}/{{job_id}}"
        actions = (Action.CANCEL, Action.PAUSE, Action.RESUME)
        return [
            Route(PATH, self.list_jobs),
            Route(PATH, self.create, methods=["POST"]),
            Route(job, self.show),
            *(Route(f"{job}/{action}", self._changer(action), methods=["POST"]) for action in actions),
            Route(f"{job}/events", self.events),
            Route(f"{job}/checkpoints", self.checkpoints),
        ]

    async def create(self, request: Request) -> Response:
        """Create a job for a base model that the app serves."""
        principal = principal_of(request.scope)
        check_trainer(principal)
        if not self._platform.enabled:
            raise ApiError(
                403, "Fine-tuning is switched off here (gateway.fine_tuning.enabled).", code="fine_tuning_disabled"
            )
        creation = await read_model(request, FineTuningCreation)
        model = await self._catalog.resolve(creation.model, principal)
        if model.adapter is not None:
            raise ApiError(
                400,
                f"{creation.model} is an adapter of {model.base.name}. Fine-tune that model; an adapter cannot be adapted again.",
                code="model_not_fine_tunable",
                param="model",
            )
        served = model.base
        if not served.config.max_adapters:
            raise ApiError(
                400,
                f"{creation.model} is served without adapters (models[].max_adapters is 0), so a result could not be called.",
                code="model_not_fine_tunable",
                param="model",
            )
        base = Base(
            name=creation.model,
            id=served.id if served.created else served.path,
            max_rank=served.config.max_lora_rank,
        )
        job = await self._calls(
            self._service.create,
            creation,
            base,
            tenant=tenant_of(principal),
            key_id=principal.key_id,
            idempotency_key=once_of(request),
        )
        return JSONResponse(job.model_dump())

    async def list_jobs(self, request: Request) -> Response:
        """Jobs of the caller's tenant, newest first; `metadata[KEY]=VALUE` keeps those that have the pair."""
        page = await self._calls(
            self._service.page,
            tenant_of(principal_of(request.scope)),
            after=request.query_params.get("after"),
            limit=page_limit(request, 20, 100),
            metadata=metadata_pairs(request),
        )
        return JSONResponse(page.model_dump())

    async def show(self, request: Request) -> Response:
        """One job."""
        job = await self._calls(self._service.get, *self._target(request))
        return JSONResponse(job.model_dump())

    def _changer(self, action: Action) -> Callable[[Request], object]:
        async def change(request: Request) -> Response:
            """Cancel, pause or resume a job."""
            check_trainer(principal_of(request.scope))
            job = await self._calls(self._service.change, *self._target(request), action)
            return JSONResponse(job.model_dump())

        return change

    async def events(self, request: Request) -> Response:
        """Events of a job, newest first; with `stream=true` as server-sent events from the oldest on, until the job ends."""
        target = self._target(request)
        if request.query_params.get("stream", "").lower() in ("true", "1"):
            feed = await self._calls(self._service.event_feed, *target)
            return await LineStream(feed, self._calls, self._streams, lambda event: event.id).response(request)
        events = await self._calls(self._service.events, *target)
        data, has_more = _page(events[::-1], request, default=20)
        return JSONResponse(FineTuningEventList(data=data, has_more=has_more).model_dump())

    async def checkpoints(self, request: Request) -> Response:
        """Checkpoints of a job that can be called as models, newest first."""
        found = await self._calls(self._service.checkpoints, *self._target(request))
        data, has_more = _page(found, request, default=10)
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        page = FineTuningCheckpointList(data=data, first_id=first, last_id=last, has_more=has_more)
        return JSONResponse(page.model_dump())

    def _target(self, request: Request) -> tuple[str, str]:
        return request.path_params["job_id"], tenant_of(principal_of(request.scope))


def _page(found: Sequence[T], request: Request, *, default: int) -> tuple[list[T], bool]:
    """The page of a list that `after` and `limit` name, and whether there are more."""
    limit, after = page_limit(request, default, 100), request.query_params.get("after")
    start = 0
    if after is not None:
        start = next((number for number, one in enumerate(found, 1) if one.id == after), -1)
        if start < 0:
            raise ApiError(400, "`after` is no id of this list.", param="after")
    return list(found[start : start + limit]), len(found) > start + limit

"""Durable work at a gateway: routes of batches, fine-tuning and all other jobs, and the worker that sends batches' requests."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from tandem.config.serving.app import GatewayConfig
from tandem.files.store import FileStore
from tandem.gateway.accounting.account import Accounting
from tandem.gateway.admission.control import Admission
from tandem.gateway.errors import EXCEPTION_HANDLERS
from tandem.gateway.identity.authentication import principal_of
from tandem.gateway.identity.parts import Identity
from tandem.gateway.models.catalog import Catalog
from tandem.gateway.replicas.fleet import Fleet
from tandem.gateway.routes.batches import BatchRoutes
from tandem.gateway.routes.consumption import ConsumptionRoutes
from tandem.gateway.routes.fine_tuning import FineTuningRoutes
from tandem.gateway.routes.jobs import JobRoutes
from tandem.gateway.work.batch_sender import BatchSender
from tandem.gateway.work.batch_worker import BatchWorker
from tandem.gateway.work.callers import Callers, PoolLoads
from tandem.gateway.work.calls import WorkCalls
from tandem.gateway.work.model_answers import ModelAnswers
from tandem.gateway.work.streams import OpenStreams
from tandem.gateway.work.webhooks import WebhookSender
from tandem.jobs.batches.model_checks import ModelChecks
from tandem.jobs.batches.service import BatchService
from tandem.jobs.fine_tuning.service import FineTuningService
from tandem.jobs.tracking.capacity import CapacityRecords
from tandem.jobs.tracking.logs import LogSource
from tandem.jobs.tracking.queue_state import QueueState
from tandem.jobs.tracking.service import JobTracking
from tandem.jobs.webhooks.deliveries import Deliveries
from tandem.jobs.work.queue import ItemQueue
from tandem.jobs.work.store import JobStore
from tandem.registry import RegistryAddress
from tandem.usage import UsageStore


class Work:
    """What one gateway has for durable work."""

    def __init__(
        self,
        address: RegistryAddress,
        catalog: Catalog,
        admission: Admission,
        fleet: Fleet,
        identity: Identity,
        accounting: Accounting,
        config: GatewayConfig,
        name: str,
        model_routes: Sequence[BaseRoute],
        run_logs: Callable[[], LogSource] | None,
    ) -> None:
        """`name`: the gateway's. `model_routes`: by which requests of batches are answered. `run_logs`: see `create_app`."""
        self._store, self._queue, self._files = JobStore.at(address), ItemQueue.at(address), FileStore.at(address)
        self._queue_state = QueueState.at(address)
        self._usage, self._capacity = UsageStore.at(address), CapacityRecords.at(address)
        self._calls = WorkCalls(config.retry_after_s)
        # Threads of their own: a cluster's dashboard may take long to answer.
        self._log_calls = WorkCalls(config.retry_after_s, "run-logs")
        self._run_logs = run_logs
        self._config = config
        self._catalog = catalog
        self._accounting = accounting
        self.webhooks = WebhookSender(Deliveries.at(address), config.webhooks)
        callers = Callers(identity.keys)
        self.worker = BatchWorker(
            ItemQueue.at(address),
            BatchSender(
                Starlette(routes=list(model_routes), exception_handlers=EXCEPTION_HANDLERS),
                callers,
                config.max_body_bytes,
            ),
            PoolLoads(catalog, admission),
            config.batches,
            name,
        )
        answers = ModelAnswers(ModelChecks.at(address), catalog, fleet.tasks, callers, self.worker.expect)
        self.model_answers = answers if config.batches.enabled else None

    def routes(self) -> list[BaseRoute]:
        """The routes for Starlette."""
        batches = BatchService(self._store, self._queue, self._files, self._config.batches)
        fine_tuning = FineTuningService(self._store, self._files, self._config.fine_tuning)
        tracking = JobTracking(self._store, self._queue_state, self._files, self._run_logs)
        streams = OpenStreams(self._config.max_job_streams, self._config.retry_after_s)
        routes = [
            *BatchRoutes(batches, self._calls, self._config.batches).routes(),
            *FineTuningRoutes(fine_tuning, self._catalog, self._calls, self._config.fine_tuning, streams).routes(),
            *JobRoutes(tracking, self._calls, self._log_calls, streams).routes(),
            *ConsumptionRoutes(self._usage, self._capacity, self._calls).routes(),
        ]
        return [counted(route, self._accounting) for route in routes]

    def close(self) -> None:
        """End threads and connections."""
        stores = (self._store, self._queue, self._queue_state, self._files, self._usage, self._capacity)
        for closeable in (self._calls, self._log_calls, *stores):
            closeable.close()


def counted(route: BaseRoute, accounting: Accounting) -> BaseRoute:
    """The route; a POST counts as a request for limits and usage, as one of files does."""
    if not isinstance(route, Route) or "POST" not in (route.methods or ()):
        return route
    endpoint, collection = route.endpoint, route.path.partition("/{")[0]

    @functools.wraps(endpoint)
    async def count(request: Request) -> Response:
        async with accounting.counted(principal_of(request.scope), collection):
            response: Response = await endpoint(request)
            return response

    return Route(route.path, count, methods=["POST"])

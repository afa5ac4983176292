"""Answers to the dispatcher's questions about models: whether a batch's key may use a model here, by the batch's route."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from tandem.engine.routes import ENGINE_ROUTES
from tandem.errors import TandemError
from tandem.gateway.errors import ApiError
from tandem.gateway.models.catalog import Catalog
from tandem.gateway.routes.openai import check_route
from tandem.gateway.work.batch_sender import PrincipalOf
from tandem.jobs.batches.model_checks import ModelChecks, ModelQuestion, Refusal
from tandem.registry.timed_calls import TimedCalls
from tandem.tasks import stop

POLL_S, DATABASE_S = 0.5, 10.0
"""Seconds between two looks, and that the database may take to answer."""
ROUTES = {route.path: route for route in ENGINE_ROUTES}

log = logging.getLogger(__name__)


class ModelAnswers:
    """A background service of one gateway."""

    def __init__(
        self,
        checks: ModelChecks,
        catalog: Catalog,
        tasks: Mapping[str, tuple[str, ...]],
        principal_of: PrincipalOf,
        expect: Callable[[], None],
    ) -> None:
        """`checks`: connections of its own. `tasks`: of the replicas of each base model, as far as they are known.

        `expect` is called when a model was found usable: requests for it will be queued.
        """
        self._checks = checks
        self._catalog = catalog
        self._tasks = tasks
        self._principal_of = principal_of
        self._expect = expect
        self._answered: set[ModelQuestion] = set()
        """Of the questions at the last look, those that this gateway has answered."""
        self._calls = TimedCalls(checks, "batch-models")
        self._service: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin; needs a running event loop."""
        self._service = asyncio.create_task(self._answer_all())

    async def stop(self) -> None:
        """End, and close the connections."""
        await stop(self._service)
        self._calls.close()

    async def _answer_all(self) -> None:
        while True:
            try:
                await self.answer_open()
            except (TandemError, TimeoutError) as error:
                log.warning("Models of batches: %s", error)
            except Exception:
                log.exception("Models of batches: a fault. It is tried again.")
            await asyncio.sleep(POLL_S)

    async def answer_open(self) -> None:
        """Answer the questions that are new."""
        questions = await self._calls.run(DATABASE_S, self._checks.unanswered)
        self._answered.intersection_update(questions)
        for question in questions:
            if question in self._answered:
                continue
            try:
                refusal = await self._refusal(question)
            except ApiError:  # the registry does not answer
                continue
            await self._calls.run(DATABASE_S, self._checks.answer, question, refusal)
            self._answered.add(question)
            if refusal is None:
                self._expect()

    async def _refusal(self, question: ModelQuestion) -> Refusal | None:
        """Why a batch cannot use a model here; None: it can. ApiError 503 where that is not known."""
        principal = self._principal_of(question.key_id, question.tenant, question.allowed)
        if principal is None:
            return None  # its requests say that the key has ended
        try:
            model = await self._catalog.resolve(question.model, principal)
            check_route(question.model, ROUTES[question.endpoint], model.engine, self._tasks.get(model.base.id, ()))
        except ApiError as error:
            if error.status >= 500:
                raise
            return Refusal(error.code or "invalid_model", error.message)
        return None

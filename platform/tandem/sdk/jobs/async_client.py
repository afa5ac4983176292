"""Client of the native job routes for event loops: list, show, change and follow jobs of every kind."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel

from tandem.api import jobs as wire
from tandem.sdk.jobs import requests
from tandem.sdk.jobs.errors import explained, is_temporary
from tandem.sdk.jobs.requests import JobRequest

if TYPE_CHECKING:
    from openai import AsyncOpenAI

M = TypeVar("M", bound=BaseModel)


class AsyncJobs:
    """`Jobs` for event loops.

    Every method raises a TandemError: UnknownJobError, IllegalTransitionError, ConfigError for a key that may not, ClusterError
    where nobody answers.
    """

    def __init__(self, base_url: str, api_key: str) -> None:
        """`base_url`: with `/v1`."""
        self._base_url = base_url
        self._api_key = api_key
        self._opened: AsyncOpenAI | None = None

    async def close(self) -> None:
        """Close the connections."""
        if self._opened is not None:
            await self._opened.close()
            self._opened = None

    async def list(
        self,
        *,
        kinds: Sequence[wire.JobKind] = (),
        states: Sequence[wire.JobState] = (),
        parent: str | None = None,
        tenant: str | None = None,
    ) -> AsyncIterator[wire.TandemJob]:
        """Jobs, newest first, in pages as they are read. `tenant`: of one alone, with an admin's key."""
        after = None
        while True:
            page = await self.ask(
                requests.page_request(
                    kinds=kinds, states=states, parent=parent, tenant=tenant, after=after, limit=requests.PAGE
                )
            )
            for each in page.data:
                yield each
            if not page.has_more:
                return
            after = page.last_id

    async def get(self, job_id: str) -> wire.TandemJob:
        """One job."""
        return await self.ask(requests.job_request(job_id))

    async def cancel(self, job_id: str) -> wire.TandemJob:
        """End a job: at once where it waits, else as soon as nothing of it runs. One that has ended stays as it is."""
        return await self.ask(requests.action_request(job_id, "cancel"))

    async def pause(self, job_id: str) -> wire.TandemJob:
        """Let a job save and leave, until it is resumed."""
        return await self.ask(requests.action_request(job_id, "pause"))

    async def resume(self, job_id: str) -> wire.TandemJob:
        """Put a paused job into the queue again."""
        return await self.ask(requests.action_request(job_id, "resume"))

    async def requeue(self, job_id: str) -> wire.TandemJob:
        """Run a job again that ended without success; its failures are counted anew."""
        return await self.ask(requests.action_request(job_id, "requeue"))

    async def hold(self, job_id: str) -> wire.TandemJob:
        """Keep a job that waits from starting."""
        return await self.ask(requests.action_request(job_id, "hold"))

    async def release(self, job_id: str) -> wire.TandemJob:
        """Let a held job start."""
        return await self.ask(requests.action_request(job_id, "release"))

    async def events(
        self, job_id: str, *, after: str | None = None, follow: bool = False
    ) -> AsyncIterator[wire.TandemJobEvent]:
        """Events after the one with the id `after`, oldest first; with `follow` until the job ends, across lost connections."""
        if follow:
            async for event in self._stream(
                lambda last: requests.event_stream_request(job_id, after if last is None else last.id)
            ):
                yield event
            return
        while True:
            page = await self.ask(requests.events_request(job_id, after))
            for each in page.data:
                yield each
            if not page.has_more:
                return
            after = page.last_id

    async def logs(
        self, job_id: str, *, attempt: int | None = None, line: int = 1, follow: bool = False
    ) -> AsyncIterator[wire.TandemLogLine]:
        """The log of an attempt, the newest one without `attempt`, from `line` (1 is the first) on.

        With `follow` until the attempt ends, across lost connections. UnknownLogError where none is kept.
        """

        def request(last: wire.TandemLogLine | None) -> JobRequest[wire.TandemLogLine]:
            if last is None:
                return requests.log_request(job_id, attempt, line, follow=follow)
            return requests.log_request(job_id, last.attempt, last.line + 1, follow=follow)

        if follow:
            async for each in self._stream(request):
                yield each
            return
        with self._errors():
            text = await self._client().get(request(None).target, cast_to=str)
        for content in filter(None, text.split("\n")):
            yield wire.TandemLogLine.model_validate_json(content)

    async def metrics(
        self, job_id: str, *, names: Sequence[str] = (), after_step: int | None = None
    ) -> wire.TandemJobMetrics:
        """Metric series of a training job; `names`: of these alone, `after_step`: of later steps alone."""
        return await self.ask(requests.metrics_request(job_id, names, after_step))

    async def lineage(self, job_id: str) -> wire.TandemLineage:
        """What a job was made from, and what was made of it."""
        return await self.ask(requests.lineage_request(job_id))

    async def queue(self, *, tenant: str | None = None) -> wire.TandemQueue:
        """Jobs and requests by state, and the jobs that wait. `tenant`: of one alone, with an admin's key."""
        return await self.ask(requests.queue_request(tenant))

    async def ask(self, request: JobRequest[M]) -> M:
        """The answer to one request of the native routes."""
        with self._errors():
            send = self._client().get if request.method == "get" else self._client().post
            return request.model.model_validate(await send(request.target, cast_to=object))

    async def _stream(self, request: Callable[[M | None], JobRequest[M]]) -> AsyncIterator[M]:
        """Items of a stream, which is asked for again after the last item where the connection is lost."""
        from openai import AsyncStream, OpenAIError

        last: M | None = None
        failures = 0
        while True:
            asked = request(last)
            try:
                stream = await self._client().get(
                    asked.target, cast_to=object, stream=True, stream_cls=AsyncStream[object]
                )
                async with stream:
                    async for item in stream:
                        last, failures = asked.model.model_validate(item), 0
                        yield last
                return
            except OpenAIError as error:
                failures += 1
                if failures > requests.RECONNECTIONS or not is_temporary(error):
                    raise explained(error, self._base_url) from error
            await asyncio.sleep(requests.RECONNECT_AFTER_S)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        from openai import OpenAIError

        try:
            yield
        except OpenAIError as error:
            raise explained(error, self._base_url) from error

    def _client(self) -> AsyncOpenAI:
        if self._opened is None:
            # Imported here: a third of a second that `tandem --help` need not wait.
            from openai import AsyncOpenAI, Timeout

            timeout = Timeout(requests.ANSWER_TIMEOUT_S, connect=requests.CONNECT_TIMEOUT_S)
            self._opened = AsyncOpenAI(base_url=self._base_url, api_key=self._api_key, timeout=timeout, max_retries=2)
        return self._opened

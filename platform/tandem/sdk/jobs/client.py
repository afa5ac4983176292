"""Client of the native job routes: list, show, change and follow jobs of every kind."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel

from tandem.api import jobs as wire
from tandem.sdk.jobs import requests
from tandem.sdk.jobs.errors import explained, is_temporary
from tandem.sdk.jobs.requests import JobRequest

if TYPE_CHECKING:
    from openai import OpenAI

M = TypeVar("M", bound=BaseModel)


class Jobs:
    """Jobs of a served app: those of the key's tenant, with an admin's key those of all.

    Every method raises a TandemError: UnknownJobError, IllegalTransitionError, ConfigError for a key that may not, ClusterError
    where nobody answers.
    """

    def __init__(self, base_url: str, api_key: str) -> None:
        """`base_url`: with `/v1`."""
        self._base_url = base_url
        self._api_key = api_key
        self._opened: OpenAI | None = None

    def close(self) -> None:
        """Close the connections."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def list(
        self,
        *,
        kinds: Sequence[wire.JobKind] = (),
        states: Sequence[wire.JobState] = (),
        parent: str | None = None,
        tenant: str | None = None,
    ) -> Iterator[wire.TandemJob]:
        """Jobs, newest first, in pages as they are read. `tenant`: of one alone, with an admin's key."""
        after = None
        while True:
            page = self.ask(
                requests.page_request(
                    kinds=kinds, states=states, parent=parent, tenant=tenant, after=after, limit=requests.PAGE
                )
            )
            yield from page.data
            if not page.has_more:
                return
            after = page.last_id

    def get(self, job_id: str) -> wire.TandemJob:
        """One job."""
        return self.ask(requests.job_request(job_id))

    def cancel(self, job_id: str) -> wire.TandemJob:
        """End a job: at once where it waits, else as soon as nothing of it runs. One that has ended stays as it is."""
        return self.ask(requests.action_request(job_id, "cancel"))

    def pause(self, job_id: str) -> wire.TandemJob:
        """Let a job save and leave, until it is resumed."""
        return self.ask(requests.action_request(job_id, "pause"))

    def resume(self, job_id: str) -> wire.TandemJob:
        """Put a paused job into the queue again."""
        return self.ask(requests.action_request(job_id, "resume"))

    def requeue(self, job_id: str) -> wire.TandemJob:
        """Run a job again that ended without success; its failures are counted anew."""
        return self.ask(requests.action_request(job_id, "requeue"))

    def hold(self, job_id: str) -> wire.TandemJob:
        """Keep a job that waits from starting."""
        return self.ask(requests.action_request(job_id, "hold"))

    def release(self, job_id: str) -> wire.TandemJob:
        """Let a held job start."""
        return self.ask(requests.action_request(job_id, "release"))

    def events(self, job_id: str, *, after: str | None = None, follow: bool = False) -> Iterator[wire.TandemJobEvent]:
        """Events after the one with the id `after`, oldest first; with `follow` until the job ends, across lost connections."""
        if follow:
            yield from self._stream(
                lambda last: requests.event_stream_request(job_id, after if last is None else last.id)
            )
            return
        while True:
            page = self.ask(requests.events_request(job_id, after))
            yield from page.data
            if not page.has_more:
                return
            after = page.last_id

    def logs(
        self, job_id: str, *, attempt: int | None = None, line: int = 1, follow: bool = False
    ) -> Iterator[wire.TandemLogLine]:
        """The log of an attempt, the newest one without `attempt`, from `line` (1 is the first) on.

        With `follow` until the attempt ends, across lost connections. UnknownLogError where none is kept.
        """

        def request(last: wire.TandemLogLine | None) -> JobRequest[wire.TandemLogLine]:
            if last is None:
                return requests.log_request(job_id, attempt, line, follow=follow)
            return requests.log_request(job_id, last.attempt, last.line + 1, follow=follow)

        if follow:
            yield from self._stream(request)
            return
        with self._errors():
            text = self._client().get(request(None).target, cast_to=str)
        yield from map(wire.TandemLogLine.model_validate_json, filter(None, text.split("\n")))

    def metrics(
        self, job_id: str, *, names: Sequence[str] = (), after_step: int | None = None
    ) -> wire.TandemJobMetrics:
        """Metric series of a training job; `names`: of these alone, `after_step`: of later steps alone."""
        return self.ask(requests.metrics_request(job_id, names, after_step))

    def lineage(self, job_id: str) -> wire.TandemLineage:
        """What a job was made from, and what was made of it."""
        return self.ask(requests.lineage_request(job_id))

    def queue(self, *, tenant: str | None = None) -> wire.TandemQueue:
        """Jobs and requests by state, and the jobs that wait. `tenant`: of one alone, with an admin's key."""
        return self.ask(requests.queue_request(tenant))

    def ask(self, request: JobRequest[M]) -> M:
        """The answer to one request of the native routes."""
        with self._errors():
            send = self._client().get if request.method == "get" else self._client().post
            return request.model.model_validate(send(request.target, cast_to=object))

    def _stream(self, request: Callable[[M | None], JobRequest[M]]) -> Iterator[M]:
        """Items of a stream, which is asked for again after the last item where the connection is lost."""
        from openai import OpenAIError, Stream

        last: M | None = None
        failures = 0
        while True:
            asked = request(last)
            try:
                with self._client().get(asked.target, cast_to=object, stream=True, stream_cls=Stream[object]) as stream:
                    for item in stream:
                        last, failures = asked.model.model_validate(item), 0
                        yield last
                return
            except OpenAIError as error:
                failures += 1
                if failures > requests.RECONNECTIONS or not is_temporary(error):
                    raise explained(error, self._base_url) from error
            time.sleep(requests.RECONNECT_AFTER_S)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        from openai import OpenAIError

        try:
            yield
        except OpenAIError as error:
            raise explained(error, self._base_url) from error

    def _client(self) -> OpenAI:
        if self._opened is None:
            # Imported here: a third of a second that `tandem --help` need not wait.
            from openai import OpenAI, Timeout

            timeout = Timeout(requests.ANSWER_TIMEOUT_S, connect=requests.CONNECT_TIMEOUT_S)
            self._opened = OpenAI(base_url=self._base_url, api_key=self._api_key, timeout=timeout, max_retries=2)
        return self._opened

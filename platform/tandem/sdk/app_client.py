"""Client of one served app: answers, streams of answers, and many prompts at once.

with tandem.Client.from_slurm("1234") as client:
    print(client.chat("What does os.path.join do?"))
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tandem.api.jobs import TandemCapacity
from tandem.sdk.address import find_api_url
from tandem.sdk.client import Prompt, RemoteLLM, RequestOutput, SamplingParams
from tandem.sdk.jobs import requests
from tandem.sdk.jobs.client import Jobs
from tandem.sdk.talk import Talker, the_only
from tandem.settings import settings

if TYPE_CHECKING:
    from openai import OpenAI

Messages = str | Sequence[Mapping[str, str]]
"""A question, or the messages of a conversation: {"role": ..., "content": ...}."""


class Client:
    """A client of one app; `close`, the end of a `with` block or of the program closes what it has opened.

    `jobs` has the app's jobs of every kind. Every method raises a TandemError where the app does not answer as asked.
    """

    def __init__(self, base_url: str | None = None, *, api_key: str | None = None) -> None:
        """`base_url`: with or without `/v1`; unset: TANDEM_API_URL, else the app of this home. `api_key`: else TANDEM_API_KEY."""
        self.base_url = find_api_url(base_url)
        self.api_key = api_key or settings().sent_key
        self.jobs = Jobs(self.base_url, self.api_key)
        self._opened = contextlib.ExitStack()
        self._opened.callback(self.jobs.close)
        self._close = weakref.finalize(self, self._opened.close)

    @classmethod
    def from_slurm(cls, job: str = "latest", *, site: str | Path | None = None) -> Self:
        """A client of a Slurm job's app, with the job's own address and key.

        `site`: the site's config; unset: slurm.yaml of TANDEM_HOME. With its login node the app is reached through a tunnel
        where this machine does not reach the job's node itself, and later the apps that succeed the job.
        """
        # Imported here: a client of another app needs neither ssh nor Slurm's files.
        from tandem.sdk.slurm import job_app, read_site

        with contextlib.ExitStack() as stack:
            base_url, api_key = stack.enter_context(job_app(job, read_site(None if site is None else Path(site))))
            client = cls(base_url, api_key=api_key)
            client._opened.push(stack.pop_all())
        return client

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close connections, and the tunnel if there is one."""
        self._close()

    def openai(self) -> OpenAI:
        """The `openai` SDK's client of this app."""
        from openai import OpenAI

        return OpenAI(base_url=self.base_url, api_key=self.api_key)

    def models(self) -> list[str]:
        """Names of the models and adapters that are served."""
        return self._talker().models()

    def chat(
        self,
        messages: Messages,
        *,
        model: str | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
    ) -> str:
        """The answer. `model`: unset: the only one that is served."""
        return "".join(self.stream(messages, model=model, temperature=temperature, max_tokens=max_tokens))

    def stream(
        self,
        messages: Messages,
        *,
        model: str | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
    ) -> Generator[str, None, None]:
        """The pieces of the answer as they come; closing the generator ends the generation."""
        asked = [{"role": "user", "content": messages}] if isinstance(messages, str) else [dict(m) for m in messages]
        return self._talker(temperature, max_tokens).ask(model or self._only_model(), asked)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        model: str | None = None,
        max_concurrency: int = 64,
    ) -> list[RequestOutput]:
        """Completions of many prompts, in their order; `max_concurrency` requests are open at once."""
        llm = RemoteLLM(
            model or self._only_model(), self.base_url, api_key=self.api_key, max_concurrency=max_concurrency
        )
        return llm.generate(prompts, sampling_params, use_tqdm=False)

    def capacity(self, *, tenant: str | None = None) -> TandemCapacity:
        """CPUs and GPUs of the app's cluster: total, used, free, with the age of the figures; quota and share of the tenant."""
        return self.jobs.ask(requests.capacity_request(tenant))

    def usage(
        self,
        by: Sequence[str] = ("hour", "key_id", "model"),
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        tenant: str | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Sums of requests and tokens by the columns `by`, one after the other; by default of the last 30 days.

        Columns: hour, day, tenant, key_id, model, adapter, route. `tenant`: of one alone, with an admin's key.
        """
        offset = 0
        while True:
            page = self.jobs.ask(requests.usage_request(by, since=since, until=until, tenant=tenant, offset=offset))
            yield from page.data
            if not page.has_more:
                return
            offset += len(page.data)

    def _talker(self, temperature: float | None = None, max_tokens: int | None = None) -> Talker:
        return Talker(api_url=self.base_url, api_key=self.api_key, temperature=temperature, max_tokens=max_tokens)

    def _only_model(self) -> str:
        return the_only(self.models())

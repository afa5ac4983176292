"""Batches and files of a served app by the `openai` SDK, as a batch run uses them."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from typing import IO, Any, Self, cast

import httpx
from openai import OpenAI, OpenAIError, Timeout

from tandem.api.openai.batches import Batch
from tandem.errors import ClusterError
from tandem.sdk.client import RemoteLLM
from tandem.sdk.jobs.errors import explained

RETRIES = 8
CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S = 5.0, 300.0
"""The latter also for what an app does after the last byte of a file."""
INPUT_LIFETIME_S, OUTPUT_LIFETIME_S = 7 * 86_400, 30 * 86_400
"""Seconds after which files expire of a run that nobody goes on with. Input files outlive the window of their batch."""


class OpenAIBatches:
    """See `tandem.batch.app.api.BatchApi`; closed by a `with` block."""

    def __init__(self, base_url: str, api_key: str) -> None:
        """`base_url`: with `/v1`."""
        timeout = Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        self._client = OpenAI(base_url=base_url, api_key=api_key, timeout=timeout, max_retries=RETRIES)
        self._base_url = base_url
        self._api_key = api_key

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._client.close()

    def check_model(self, name: str) -> None:
        """See `BatchApi`."""
        RemoteLLM(name, self._base_url, api_key=self._api_key).check_served()

    def upload(self, requests: IO[bytes]) -> str:
        """See `BatchApi`."""
        with self._errors():
            file = self._client.files.create(
                file=("batch-run.jsonl", requests),
                purpose="batch",
                expires_after={"anchor": "created_at", "seconds": INPUT_LIFETIME_S},
                # For retries of this client; the app forgets it after minutes.
                extra_headers={"Idempotency-Key": uuid.uuid4().hex},
            )
            return file.id

    def create(self, file_id: str, endpoint: str, idempotency_key: str) -> str:
        """See `BatchApi`."""
        with self._errors():
            batch = self._client.batches.create(
                input_file_id=file_id,
                endpoint=cast(Any, endpoint),
                completion_window="24h",
                output_expires_after={"anchor": "created_at", "seconds": OUTPUT_LIFETIME_S},
                extra_headers={"Idempotency-Key": idempotency_key},
            )
            return batch.id

    def get(self, batch_id: str) -> Batch:
        """See `BatchApi`."""
        with self._errors():
            return Batch.model_validate(self._client.batches.retrieve(batch_id).model_dump())

    def cancel(self, batch_id: str) -> None:
        """See `BatchApi`."""
        with self._errors():
            self._client.batches.cancel(batch_id)

    def download(self, file_id: str, into: IO[bytes]) -> None:
        """See `BatchApi`."""
        with self._errors(), self._client.files.with_streaming_response.content(file_id) as answer:
            for part in answer.iter_bytes(1 << 20):
                into.write(part)

    def delete(self, file_id: str) -> None:
        """See `BatchApi`. A file that its job still holds is not asked for again: it expires."""
        with self._errors():
            self._client.with_options(max_retries=0).files.delete(file_id)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OpenAIError as error:
            raise explained(error, self._base_url) from error
        except httpx.TransportError as error:  # while a content is streamed
            raise ClusterError(f"The connection to {self._base_url} was lost: {error}.") from error

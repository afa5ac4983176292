"""Output and error file of a batch, written once its requests have ended."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tandem.files.content import ContentStore
from tandem.files.outputs import write_output
from tandem.files.records import Purpose
from tandem.files.store import FileStore
from tandem.ids import fingerprint
from tandem.jobs.batches.answers import AnswerPlace, Ended, OutputLines, SegmentReader
from tandem.jobs.batches.stored import answers_folder
from tandem.jobs.work.queue import ItemQueue
from tandem.jobs.work.records import Item, Job
from tandem.jobs.work.states import State
from tandem.registry.conditions import Condition

PAGE = 1000
"""Queue items that are read at once."""
ENDINGS = {
    State.CANCELLED: ("batch_cancelled", "The batch was cancelled before this request was answered."),
    State.EXPIRED: ("batch_expired", "The batch's window ended before this request was answered."),
}
"""Code and message of requests without an answer, by their state."""


class BatchOutputs:
    """Writes the files of batches."""

    def __init__(self, queue: ItemQueue, files: FileStore, contents: ContentStore, tenant_bytes: int) -> None:
        """`tenant_bytes`: of the files of one tenant at most."""
        self._queue = queue
        self._files = files
        self._contents = contents
        self._tenant_bytes = tenant_bytes

    def write(self, job: Job) -> Mapping[str, Any]:
        """Write both files; the result of the job. FileQuotaError where its tenant has no bytes left for them."""
        reader = SegmentReader(answers_folder(job.id))
        lines = OutputLines(lambda: self._ended(job), reader)
        try:
            output_id = self._write(job, "output", lines.answers())
            error_id = self._write(job, "error", lines.errors())
        finally:
            reader.close()
        return {
            "output_file_id": output_id,
            "error_file_id": error_id,
            "completed": lines.num_answers,
            "failed": lines.num_errors,
        }

    def _write(self, job: Job, kind: str, lines: Iterator[bytes]) -> str | None:
        """The id of a file with these lines; None where there are none."""
        first = next(lines, None)
        if first is None:
            return None
        record = write_output(
            self._files,
            self._contents,
            itertools.chain([first], lines),
            tenant=job.tenant,
            purpose=Purpose.BATCH_OUTPUT,
            filename=f"{job.id}_{kind}.jsonl",
            quota_bytes=self._tenant_bytes,
            lifetime_s=job.spec.get("output_lifetime_s"),
            # Of the attempt: a batch that runs again has more answers than before.
            once=Condition(once=fingerprint(f"{kind} of {job.run_name}")),
        )
        return record.id

    def _ended(self, job: Job) -> Iterable[Ended]:
        """The requests that have ended, in the order of the input."""
        after = -1
        while page := self._queue.items(job.id, after=after, limit=PAGE):
            after = page[-1].position if page[-1].position is not None else after
            yield from (_ended(item) for item in page)


def _ended(item: Item) -> Ended:
    custom_id = str((item.payload or {}).get("custom_id", ""))
    if item.result_reference is not None:
        return Ended(item_id=item.id, custom_id=custom_id, place=AnswerPlace.parse(item.result_reference))
    # One that is not marked as ended yet was cancelled or has expired with its batch.
    code, message = ENDINGS.get(item.state, ("request_failed", item.error or ENDINGS[State.CANCELLED][1]))
    return Ended(item_id=item.id, custom_id=custom_id, error_code=code, error=message)

"""Execution of a batch run on an app: few batches at a time are created, followed, and published when they end.

What has been sent is in the run's manifest before it is sent, so that another start asks no row twice.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace

from tandem.api.openai.batches import Batch, BatchError
from tandem.batch.app.answers import BatchAnswers
from tandem.batch.app.api import BatchApi
from tandem.batch.app.input_file import RunRows, file_sha256, fill
from tandem.batch.app.lines import line_of, refused_line, route_of_group
from tandem.batch.finish import finish, finished, rows_in
from tandem.batch.input.plan import WorkUnit, left
from tandem.batch.input.unit_rows import NumberedRow
from tandem.batch.output.lines import Line, has_failed
from tandem.batch.output.manifest import AppBatch
from tandem.batch.prepare import PreparedRun
from tandem.batch.progress import Progress, Summary
from tandem.errors import ClusterError, JobError, TandemError, UnknownJobError
from tandem.ids import digest

AT_ONCE = 4
"""Batches that are under way together: the next is checked and queued while the last requests of another are answered."""
POLL_S = 2.0
AWAY_S = 600.0
"""Seconds for which the app may not answer while its batches are followed."""
ENDED = ("completed", "failed", "expired", "cancelled")


class AppRun:
    """One start of a run on an app."""

    def __init__(
        self,
        run: PreparedRun,
        api: BatchApi,
        tell: Callable[[Progress], None] = lambda progress: None,
        *,
        poll_s: float = POLL_S,
    ) -> None:
        self._run = run
        self._api = api
        self._tell = tell
        self._poll_s = poll_s
        self._rows = RunRows(run)
        self._units = {unit.name: unit for unit in run.units}
        self._batches = list(run.manifest.app_batches)
        self._found = {batch.id for batch in self._batches}
        """Ids of batches of an earlier start: that one may have cancelled them."""
        self._under_way: dict[str, Batch] = {}
        """Batches as they were at the last look."""
        self._free: list[WorkUnit] = []
        self._kept: dict[str, dict[int, bytes]] = {}
        """Lines of units that are not published, by name and row."""
        self._done = self._failed = self._tokens = self._prompt_tokens = 0
        """Of the rows whose lines are here, and of the lines that this start has fetched."""
        self._heard_at = 0.0

    def answer(self) -> Summary:
        """Answer what is left, and write the two files.

        Raises JobError if a batch failed or somebody cancelled it, ClusterError if the app does not answer for `AWAY_S`.
        """
        began = self._heard_at = time.monotonic()
        if (whole := finished(self._run)) is not None:
            return whole
        found = self._begin()
        self._say(found, 0.0)
        self._submit()
        while self._batches:
            time.sleep(self._poll_s)
            self._advance()
            self._say(found, time.monotonic() - began)
        summary = finish(self._run, found=found, began=began)
        return replace(
            summary, tokens=self._tokens, prompt_tokens=self._prompt_tokens, answering_s=time.monotonic() - began
        )

    def cancel(self) -> None:
        """Cancel the batches under way. Where the app does not answer they go on, and another start publishes their answers."""
        for batch in self._batches:
            with contextlib.suppress(TandemError):
                if batch.id is not None:
                    self._api.cancel(batch.id)

    def _begin(self) -> int:
        """Prepare the output, and see what earlier starts left; the number of rows that have lines."""
        run, output = self._run, self._run.output
        self._record()
        output.refuse(run.survey.refused)
        published = output.published()
        todo = left(run.units, published)
        sent = {name for batch in self._batches for name in batch.units}
        self._free = [unit for unit in todo if unit.name not in sent]
        self._kept = {unit.name: output.kept(unit.name) for unit in todo}
        found = rows_in(run, published) + sum(map(len, self._kept.values()))
        self._failed = len(run.survey.refused)
        self._done = self._failed + found
        return found

    def _record(self) -> None:
        """Write down which batches there are."""
        self._run.output.begin(replace(self._run.manifest, app_batches=tuple(self._batches)).plain())

    # ---- sending ----

    def _submit(self) -> None:
        """Create batches until enough are under way."""
        for batch in self._batches:
            if batch.id is None:
                # A start that ended meanwhile may have created it: under its key it is the same one.
                self._create(batch)
        while self._free and len(self._batches) < AT_ONCE:
            with tempfile.TemporaryFile() as file:
                units = fill(file, self._rows, self._free, self._kept)
                key = digest([uuid.uuid4().hex, file_sha256(file)])
                uploaded = self._api.upload(file)
            batch = AppBatch(units=tuple(unit.name for unit in units), key=key, file=uploaded)
            self._batches.append(batch)
            self._free = self._free[len(units) :]
            self._record()
            self._create(batch)

    def _create(self, batch: AppBatch) -> None:
        route = route_of_group(self._run.survey.bases[self._units[batch.units[0]].base])
        created = replace(batch, id=self._api.create(batch.file, route, batch.key))
        self._batches[self._batches.index(batch)] = created
        self._record()

    # ---- following ----

    def _advance(self) -> None:
        """Look at each batch, publish those that have ended, and create others."""
        try:
            for batch in list(self._batches):
                if batch.id is not None:
                    self._look(batch, batch.id)
            self._submit()
            self._heard_at = time.monotonic()
        except UnknownJobError as error:
            raise JobError(
                f"{error} The run in {self._run.output.run} has sent it: give the URL and the key of that app, or choose another "
                "output."
            ) from error
        except ClusterError as error:
            if time.monotonic() - self._heard_at > AWAY_S:
                raise ClusterError(f"{error} The batches may go on there; the same command resumes.") from error

    def _look(self, batch: AppBatch, batch_id: str) -> None:
        now = self._under_way[batch_id] = self._api.get(batch_id)
        if now.status in ENDED:
            self._end(batch, now)

    def _end(self, batch: AppBatch, now: Batch) -> None:
        """Publish the answers of a batch that has ended; rows that it did not answer are asked by another one."""
        units = [self._units[name] for name in batch.units]
        refusal = _refusal_of_model(now)
        # A batch that failed has no files: all of its rows are left.
        with BatchAnswers(self._api, now) as answers:
            unfinished = [
                unit for unit, rows in self._rows.of_units(units) if not self._publish(unit, rows, answers, refusal)
            ]
        self._batches.remove(batch)
        self._under_way.pop(now.id, None)
        self._free = sorted([*unfinished, *self._free], key=lambda unit: (unit.base, unit.chunk.number))
        self._record()
        for file_id in (now.output_file_id, now.error_file_id, now.input_file_id):
            # What remains expires.
            with contextlib.suppress(TandemError):
                if file_id is not None:
                    self._api.delete(file_id)
        if now.status == "failed" and refusal is None:
            reason = now.errors.data[0].message if now.errors and now.errors.data else "The app does not say why."
            raise JobError(f"The batch {now.id} failed: {reason} The same command sends its rows again.")
        if now.status == "cancelled" and now.id not in self._found:
            raise JobError(f"Somebody cancelled the batch {now.id}. The same command asks the rows that are left.")

    def _publish(
        self, unit: WorkUnit, rows: Sequence[NumberedRow], answers: BatchAnswers, refusal: BatchError | None
    ) -> bool:
        """Publish a unit; False if rows of it have no answer yet: the others are put aside.

        `refusal`: why none of its rows can be answered, as their model cannot be used.
        """
        if self._run.output.is_published(unit.name):
            return True
        lines = self._kept.get(unit.name, {})
        for row in rows:
            if row.number not in lines and (line := self._line(row, answers, refusal)) is not None:
                lines[row.number] = line.text
                self._count(line)
        if len(lines) < len(rows):
            self._run.output.keep(unit.name, lines)
            self._kept[unit.name] = lines
            return False
        self._run.output.publish(unit.name, [lines[number] for number in sorted(lines)])
        self._kept.pop(unit.name, None)
        return True

    def _line(self, row: NumberedRow, answers: BatchAnswers, refusal: BatchError | None) -> Line | None:
        """The line of a row; None if it has no answer yet."""
        if refusal is not None:
            return refused_line(row, refusal)
        answer = answers.get(row.number)
        return None if answer is None else line_of(row, self._rows.request_of(row.raw), answer)

    def _count(self, line: Line) -> None:
        self._done += 1
        self._failed += has_failed(line.text)
        self._tokens += line.completion_tokens
        self._prompt_tokens += line.prompt_tokens

    def _say(self, found: int, answering_s: float) -> None:
        counts = [batch.request_counts for batch in self._under_way.values()]
        self._tell(
            Progress(
                rows=self._run.survey.rows,
                done=self._done + sum(each.completed + each.failed for each in counts),
                failed=self._failed + sum(each.failed for each in counts),
                found=found,
                tokens=self._tokens,
                answering_s=answering_s,
            )
        )


def _refusal_of_model(batch: Batch) -> BatchError | None:
    """Why the app cannot use the model of a batch, which all of its rows are for; None: it can, or the batch failed otherwise."""
    errors = batch.errors.data if batch.status == "failed" and batch.errors else []
    return errors[0] if errors and all(error.param == "body.model" for error in errors) else None

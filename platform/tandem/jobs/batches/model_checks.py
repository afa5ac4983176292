"""Models that a batch names: the dispatcher asks whether they can be used, and any gateway of any app on the database answers.

Gateways know the models that are served, the keys and the routes; the dispatcher knows none of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

from sqlalchemy import delete, select, update

from tandem.db.inserts import insert_into
from tandem.db.schema import BatchModelRow, JobRow
from tandem.jobs.work.connection import WorkConnection

SETTLE = timedelta(seconds=5)
"""Time for which a refusal may be corrected by a gateway of another app, which serves the model."""
MOST_OPEN = 256
"""Models that are handed to a gateway at once."""


class ModelQuestion(NamedTuple):
    """Whether a batch can use a model."""

    job: str
    model: str
    endpoint: str
    tenant: str
    key_id: str
    allowed: tuple[str, ...]
    """The models that the token of its creator allowed; empty: all."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a model cannot be used."""

    code: str
    message: str


class ModelChecks(WorkConnection):
    """The questions in the database."""

    def ask(self, job_id: str, models: Iterable[str]) -> None:
        """Ask for the models of a batch; those that were asked for are left as they are."""
        rows = [{"job": job_id, "model": model, "is_usable": False} for model in models]
        if not rows:
            return
        with self._transaction() as (session, _):
            session.execute(insert_into(session, BatchModelRow).values(rows).on_conflict_do_nothing())

    def unanswered(self) -> list[ModelQuestion]:
        """Questions that no gateway has answered with yes."""
        columns = (JobRow.id, BatchModelRow.model, JobRow.spec, JobRow.tenant, JobRow.key_id)
        query = select(*columns).join(JobRow, JobRow.id == BatchModelRow.job).where(BatchModelRow.is_usable.is_(False))
        with self._reading() as session:
            return [
                ModelQuestion(job, model, spec["endpoint"], tenant, key_id, tuple(spec.get("models", ())))
                for job, model, spec, tenant, key_id in session.execute(query.limit(MOST_OPEN))
            ]

    def answer(self, question: ModelQuestion, refusal: Refusal | None) -> None:
        """Record a gateway's answer; None: the model can be used. The first refusal is kept until a gateway finds it usable."""
        row = (BatchModelRow.job == question.job, BatchModelRow.model == question.model)
        with self._transaction() as (session, now):
            if refusal is None:
                session.execute(update(BatchModelRow).where(*row).values(is_usable=True))
            else:
                error = {"code": refusal.code, "message": refusal.message}
                first = update(BatchModelRow).where(*row, BatchModelRow.refused_at.is_(None))
                session.execute(first.values(error=error, refused_at=now))

    def refusals(self, job_id: str) -> Mapping[str, Refusal] | None:
        """The models of a batch that cannot be used, with the reasons; None while that is not known of all of them."""
        query = select(BatchModelRow).where(BatchModelRow.job == job_id, BatchModelRow.is_usable.is_(False))
        with self._reading() as session:
            now = self.clock.now(session.connection())
            open_rows = session.scalars(query).all()
        if any(row.refused_at is None or now - row.refused_at < SETTLE for row in open_rows):
            return None
        return {row.model: Refusal(**row.error) for row in open_rows if row.error is not None}

    def forget(self, job_id: str) -> None:
        """Remove the questions of a batch."""
        with self._transaction() as (session, _):
            session.execute(delete(BatchModelRow).where(BatchModelRow.job == job_id))

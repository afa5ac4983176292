"""The API key of a Slurm job's app: made when the app starts, revoked when it ends."""

from __future__ import annotations

import contextlib
import logging
from datetime import UTC, datetime, timedelta

from sqlalchemy.exc import SQLAlchemyError

from tandem.auth import KeyStore, NewKey
from tandem.auth.expiry import postpone
from tandem.cluster.slurm import commands
from tandem.cluster.slurm.folder import Connection, Submission
from tandem.config.slurm import time_limit
from tandem.errors import TandemError
from tandem.sdk.keys import operator
from tandem.settings import variable

KEY_OUTLIVES = timedelta(days=1)
"""How long after the job's end its key expires, if nothing has revoked it: a successor's users keep theirs."""
LONGEST_KEY_LIFE = timedelta(days=30)
"""Longest life of a new key, however long the job may run."""
log = logging.getLogger(__name__)


def job_end(job: commands.JobState | None, submission: Submission) -> datetime | None:
    """When Slurm ends the job: as Slurm says, or from the time limit that was asked for; None: no limit is known.

    Containers have no `scontrol`, but the variables of the job.
    """
    if job is not None and job.ends_at is not None:
        return job.ends_at
    with contextlib.suppress(ValueError, OverflowError, OSError):
        return datetime.fromtimestamp(int(variable("SLURM_JOB_END_TIME") or ""), UTC)
    limit = time_limit(submission.time) if submission.time else None
    return None if limit is None else datetime.now(UTC) + limit


def key_life(end: datetime | None, now: datetime) -> timedelta:
    """How long the key of a job that ends then is accepted, unless it is revoked before."""
    if end is None:
        return LONGEST_KEY_LIFE
    return min(max(end - now, timedelta(0)) + KEY_OUTLIVES, LONGEST_KEY_LIFE)


def make_key(job_id: str, end: datetime | None) -> NewKey:
    """A key for the users of a job's app."""
    return KeyStore.open().create(f"slurm-{job_id}", expires_in=key_life(end, datetime.now(UTC)), by=operator())


def revoke_key(connection: Connection) -> None:
    """Revoke the key of a job that has ended, if the database answers. With a successor it stays: tunnels lead on to that."""
    if not connection.api_key_id or connection.successor:
        return
    try:
        KeyStore.open().revoke(connection.api_key_id, by=operator())
    except (TandemError, SQLAlchemyError, OSError) as error:
        log.warning("The key %s of the job could not be revoked: %s", connection.api_key_id, error)


def extend_key(connection: Connection, minutes: int) -> None:
    """Let the key of a job that has got more time expire later, too."""
    if connection.api_key_id:
        postpone(KeyStore.open(), connection.api_key_id, timedelta(minutes=minutes), by=operator())

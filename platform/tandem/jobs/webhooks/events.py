"""Webhook events: types by the end of a job, and signed requests by the Standard Webhooks specification. Pure."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType

from tandem.errors import ConfigError
from tandem.jobs.batches.view import PREFIX as BATCH
from tandem.jobs.batches.view import STATUSES as BATCH_STATUSES
from tandem.jobs.fine_tuning.view import PREFIX as FINE_TUNING
from tandem.jobs.fine_tuning.view import STATUSES as FINE_TUNING_STATUSES
from tandem.jobs.work.states import State

FAMILIES = MappingProxyType({BATCH: ("batch", BATCH_STATUSES), FINE_TUNING: ("fine_tuning.job", FINE_TUNING_STATUSES)})
"""First part of an event's type, and last parts by the state of the job, by the prefix of the job's id."""
SECRET_PREFIX = "whsec_"


@dataclass(frozen=True, kw_only=True, slots=True)
class WebhookEvent:
    """One event for one endpoint."""

    id: str
    type: str
    job: str
    occurred_at: datetime


def event_type(job_id: str, state: State) -> str | None:
    """The type of the event that a job of this id has ended so; None if nobody is told."""
    family = next((family for prefix, family in FAMILIES.items() if job_id.startswith(prefix)), None)
    return f"{family[0]}.{family[1][state]}" if family is not None and state.ended else None


def event_id(endpoint: str, job_id: str, type_: str, occurred_at: datetime) -> str:
    """The id of an event: the same at each gateway and attempt, another for each endpoint."""
    text = "\0".join((endpoint, job_id, type_, occurred_at.isoformat()))
    return f"evt_{hashlib.sha256(text.encode()).hexdigest()[:40]}"


def body_of(event: WebhookEvent) -> bytes:
    """The body of a request, as OpenAI sends it."""
    fields = {
        "id": event.id,
        "object": "event",
        "created_at": int(event.occurred_at.timestamp()),
        "type": event.type,
        "data": {"id": event.job},
    }
    return json.dumps(fields, separators=(",", ":")).encode()


def signing_key(secret: str) -> bytes:
    """The key in a secret: of `whsec_` and base64, or the text itself; ConfigError for base64 that is none."""
    if not secret.startswith(SECRET_PREFIX):
        return secret.encode()
    try:
        return base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except binascii.Error:
        raise ConfigError("A webhook's secret begins with whsec_ and goes on with what is not base64.") from None


def signed_headers(key: bytes, event_id: str, body: bytes, timestamp_s: int) -> Mapping[str, str]:
    """Headers with the signature of a body; receivers refuse a timestamp that is minutes old."""
    signed = f"{event_id}.{timestamp_s}.".encode() + body
    signature = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    return {
        "content-type": "application/json",
        "webhook-id": event_id,
        "webhook-timestamp": str(timestamp_s),
        "webhook-signature": f"v1,{signature}",
    }

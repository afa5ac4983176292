"""Config of webhooks: where ends of fine-tuning jobs and batches are sent."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from tandem.config import check
from tandem.errors import ConfigError

EVENTS = (
    *(f"fine_tuning.job.{end}" for end in ("succeeded", "failed", "cancelled")),
    *(f"batch.{end}" for end in ("completed", "failed", "cancelled", "expired")),
)
"""Types of events, as OpenAI names them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WebhookConfig:
    """One endpoint: each event is sent to it by a signed POST, and again for a day until it answers 2xx."""

    url: str
    """https URL of the receiver."""
    secret: str
    """Reference to the secret that signs the events, which every gateway's node must have: `env:NAME` or `file:PATH`. The secret
    itself is `whsec_` and base64, or any text."""
    events: tuple[str, ...] = ()
    """Types of events that are sent: fine_tuning.job.succeeded, .failed, .cancelled, batch.completed, .failed, .cancelled,
    .expired. Empty: all."""
    tenant: str | None = None
    """Tenant whose jobs are told of; unset: those of all tenants."""
    allow_private: bool = False
    """Whether the receiver may be at a private, local or loopback address, and its URL http. Whoever sets the URL can then make
    the gateways send requests to such addresses."""

    def __post_init__(self) -> None:
        for event in self.events:
            check.one_of("gateway.webhooks[].events", event, EVENTS)
        parts = urlsplit(self.url)
        schemes = ("https", "http") if self.allow_private else ("https",)
        if parts.scheme not in schemes or not parts.hostname or parts.username or parts.fragment:
            raise ConfigError(
                f"gateway.webhooks[].url is not a URL of {' or '.join(schemes)} with a host, and without user and fragment. http "
                "needs allow_private: true."
            )
        kind, _, target = self.secret.partition(":")
        if kind not in ("env", "file") or not target:
            raise ConfigError(
                "gateway.webhooks[].secret must be env:NAME or file:PATH; a secret does not stand in a config."
            )

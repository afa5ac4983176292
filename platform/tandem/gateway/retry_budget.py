"""Retry budget: how many replicas may still get one request. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from tandem.gateway.replicas.upstream import Attempt

MAX_STARTED_REPLICAS = 2
"""Replicas that may begin with one request: a request that kills its engine must not reach all of them."""
MAX_TRIED_REPLICAS = 2
"""Replicas that are tried before the request goes back to its queue."""


@dataclass(slots=True)
class RetryBudget:
    """How often one request may still be sent. Pure."""

    started_replicas: int = 0
    """Replicas that may have begun with the request without answering it."""
    tried_replicas: list[str] = field(default_factory=list)
    """Ids of the replicas tried since the request last left its queue."""
    failure: str = ""
    """Reason of the last failure since then."""
    reached_engine: bool = False
    """Whether an engine may have worked on the request."""

    @property
    def exhausted(self) -> bool:
        """Whether no replica may get the request any more."""
        return self.started_replicas >= MAX_STARTED_REPLICAS

    @property
    def allows_attempt(self) -> bool:
        """Whether another replica may be tried without going back to the queue."""
        return not self.exhausted and len(self.tried_replicas) < MAX_TRIED_REPLICAS

    def record(self, attempt: Attempt) -> None:
        """Count a failed attempt."""
        self.failure = attempt.failure
        self.started_replicas = (
            self.started_replicas + attempt.may_have_begun if attempt.retriable else MAX_STARTED_REPLICAS
        )

    def requeued(self) -> None:
        """The request has waited in its queue again: every replica may be tried again."""
        self.tried_replicas, self.failure = [], ""

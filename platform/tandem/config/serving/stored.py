"""Config of stored answers: responses and chat completions that clients ask to store."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.config import check

MIB = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredConfig:
    """Answers of `/v1/responses` and `/v1/chat/completions` that are stored in the app's database, with their requests."""

    enabled: bool = True
    """Whether answers may be stored at all."""
    default: bool = False
    """Whether answers to requests without `store` are stored."""
    days: int = 30
    """Days until a stored answer is deleted."""
    max_bytes: int = 4 * MIB
    """Largest request and answer together that are stored, in bytes."""
    tenant_bytes: int = 2048 * MIB
    """Compressed bytes that the stored answers of one tenant may have together; answers beyond are not stored."""
    max_pending_bytes: int = 64 * MIB
    """Bytes of requests and answers that one gateway holds until they are stored; what exceeds them is not stored."""
    max_turns: int = 100
    """Stored responses that `previous_response_id` may reach back to; a longer conversation gets 400."""

    def __post_init__(self) -> None:
        for key in ("days", "max_bytes", "tenant_bytes", "max_turns"):
            check.at_least(f"gateway.stored.{key}", getattr(self, key), 1)
        check.between("gateway.stored.days", self.days, 1, 3650)
        check.at_least("gateway.stored.max_pending_bytes", self.max_pending_bytes, self.max_bytes)

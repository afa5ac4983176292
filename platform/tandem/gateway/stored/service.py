"""Stored answers at a gateway: prepares requests whose answers are stored or that go on from one, and looks answers up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from starlette.responses import Response

from tandem.api.openai.fine_tuning import METADATA_KEY, METADATA_PAIRS, METADATA_VALUE, Metadata
from tandem.auth.principal import Principal
from tandem.config.serving.app import GatewayConfig
from tandem.errors import IdempotencyConflictError
from tandem.gateway.errors import ApiError
from tandem.gateway.identity.authentication import tenant_of
from tandem.gateway.stored.recorder import LONGEST_ID, Recorder
from tandem.gateway.stored.recording import AnswerLabels, Recording
from tandem.gateway.work.calls import WorkCalls
from tandem.ids import fingerprint
from tandem.registry import RegistryAddress
from tandem.stored.conversation import continued_input
from tandem.stored.records import AnswerKind, Chain, StoredAnswer
from tandem.stored.store import StoredAnswers

T = TypeVar("T")

KINDS = {"/v1/responses": AnswerKind.RESPONSE, "/v1/chat/completions": AnswerKind.CHAT}
"""Routes whose answers can be stored."""
RECENT_S = 1.0
"""Seconds for which an answer is waited for that may have been given just now: it is written after its client has it."""
FIRST_POLL_S, LONGEST_POLL_S = 0.02, 0.16
LOST = {
    "too_large": "request and answer exceed gateway.stored.max_bytes",
    "gateway_full": "the gateway holds too many answers that are not stored yet (gateway.stored.max_pending_bytes)",
}
METADATA: TypeAdapter[dict[str, str]] = TypeAdapter(Metadata)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredRequest:
    """A request to a route whose answers can be stored."""

    labels: AnswerLabels | None
    """Set: its answer is stored under these."""
    conversation: list[Any] | None = None
    """Set: the input of the engine, which goes on from stored responses."""
    num_bytes: int = 0
    """Bytes of these responses, with their requests."""
    repeated: StoredAnswer | None = None
    """Set: the answer that a request with the same idempotency key got before, which is given again."""


class StoredAnswerService:
    """The stored answers, as one gateway's routes use them."""

    def __init__(self, address: RegistryAddress, config: GatewayConfig) -> None:
        self.config = config.stored
        self.store = StoredAnswers.at(address)
        self.recorder = Recorder(StoredAnswers.at(address), config.stored)
        self.calls = WorkCalls(config.retry_after_s)
        self._max_body_bytes = config.max_body_bytes
        self._num_gateways = config.replicas

    def close(self) -> None:
        """End threads and connections."""
        self.calls.close()
        self.store.close()

    async def prepare(
        self, path: str, body: dict[str, Any], principal: Principal, idempotency_key: str | None
    ) -> StoredRequest:
        """Read and remove `store` and `previous_response_id` of a body, which is not changed otherwise.

        ApiError 400 for values that cannot be, and for a response that is not stored or a conversation that is too long; 409 for
        an idempotency key that was sent with another body. The key counts for requests whose answers are stored.
        """
        kind, tenant = KINDS[path], tenant_of(principal)
        store, previous_id = body.get("store"), None
        if store is not None and not isinstance(store, bool):
            raise ApiError(400, f"`store` is of type {type(store).__name__}; it must be true or false.", param="store")
        is_stored = self.config.enabled and (self.config.default if store is None else store)
        key = fingerprint(idempotency_key) if is_stored else None
        if key is not None:
            await self.written(tenant)
            repeated = await self.calls(self._answer_of_key, tenant, kind, key, body)
            # A stream cannot be given again. Its new answer replaces the stored one.
            if repeated is not None and not body.get("stream"):
                return StoredRequest(labels=None, repeated=repeated)
        body.pop("store", None)
        conversation, num_bytes = None, 0
        if kind is AnswerKind.RESPONSE and (previous_id := body.pop("previous_response_id", None)):
            chain = await self._chain(tenant, previous_id)
            conversation, num_bytes = continued_input(chain.answers, body.get("input")), chain.raw_bytes
        if not is_stored:
            return StoredRequest(labels=None, conversation=conversation, num_bytes=num_bytes)
        labels = AnswerLabels(
            kind=kind,
            tenant=tenant,
            key_id=principal.key_id,
            model=body["model"],
            metadata=checked_metadata(body.get("metadata")),
            previous_id=previous_id or None,
            idempotency_key=key,
        )
        return StoredRequest(labels=labels, conversation=conversation, num_bytes=num_bytes)

    def record(self, labels: AnswerLabels | None, request: bytes) -> tuple[Recording | None, str]:
        """The recording of an answer that is to be stored, and why there is none although there should be."""
        if labels is None:
            return None, ""
        recording = self.recorder.open(labels, request)
        if recording.lost:
            recording.close()
            return None, f"the answer is not stored: {LOST[recording.lost]}"
        return recording, ""

    async def find(self, tenant: str, kind: AnswerKind, answer_id: str) -> StoredAnswer | None:
        """A stored answer; None if the tenant has none of that id."""
        return await self._recent(tenant, lambda found: found is not None, self.store.get, tenant, kind, answer_id)

    async def encoded(self, encode: Callable[..., bytes], *args: object) -> Response:
        """What a stored answer has, as a response. It may be megabytes, and is encoded in a thread."""
        return Response(await self.calls(encode, *args), media_type="application/json")

    async def written(self, tenant: str) -> None:
        """Wait, `RECENT_S` at most, until answers that this gateway has given a tenant are in the database."""
        waited_s = 0.0
        while self.recorder.awaits_write(tenant) and waited_s < RECENT_S:
            await asyncio.sleep(FIRST_POLL_S)
            waited_s += FIRST_POLL_S

    def _answer_of_key(self, tenant: str, kind: AnswerKind, key: str, body: dict[str, Any]) -> StoredAnswer | None:
        """The stored answer to a request with an idempotency key; IdempotencyConflictError if it had another body."""
        found = self.store.of_key(tenant, kind, key)
        if found is not None and found.request != body:
            raise IdempotencyConflictError(
                f"The idempotency key was sent before, with another request, whose answer is {found.id}. Send this one with "
                "a new key."
            )
        return found

    async def _chain(self, tenant: str, previous_id: Any) -> Chain:
        """A stored response that a request goes on from, with those before it; ApiError 400 if it cannot."""
        param = "previous_response_id"
        if not isinstance(previous_id, str) or len(previous_id) > LONGEST_ID:
            raise ApiError(400, "`previous_response_id` must be the id of a stored response.", param=param)
        max_turns = self.config.max_turns
        chain: Chain = await self._recent(
            tenant,
            lambda chain: chain.missing is None,
            self.store.chain,
            tenant,
            previous_id,
            max_turns=max_turns,
            max_bytes=self._max_body_bytes,
        )
        if chain.missing is not None:
            raise ApiError(
                400,
                f"Previous response with id '{chain.missing}' not found. It was not stored (`store`), was deleted, or has "
                "expired. Send the whole conversation in `input`.",
                code="previous_response_not_found",
                param=param,
            )
        if not chain.answers:
            raise ApiError(
                400,
                f"The conversation before {previous_id} has {chain.num_turns} or more responses of {chain.raw_bytes:,} bytes; at "
                f"most {max_turns} (gateway.stored.max_turns) of {self._max_body_bytes:,} (gateway.max_body_bytes) are gone on "
                "from. Send what matters of it in `input`.",
                code="conversation_too_long",
                param=param,
            )
        return chain

    async def _recent(
        self, tenant: str, is_found: Callable[[T], bool], look: Callable[..., T], *args: Any, **options: Any
    ) -> T:
        """What `look` finds, which may be an answer that this or another gateway has given just now."""
        waited_s, pause_s = 0.0, FIRST_POLL_S
        while True:
            may_come = self._num_gateways > 1 or self.recorder.is_recording(tenant)
            found = await self.calls(look, *args, **options)
            if is_found(found) or not may_come or waited_s >= RECENT_S:
                return found
            await asyncio.sleep(pause_s)
            waited_s, pause_s = waited_s + pause_s, min(LONGEST_POLL_S, 2 * pause_s)


def checked_metadata(value: Any) -> dict[str, str]:
    """Metadata of a request; ApiError 400 for any that cannot be kept."""
    try:
        return METADATA.validate_python(value or {})
    except ValidationError:
        raise ApiError(
            400,
            f"`metadata` must be an object of at most {METADATA_PAIRS} texts, with keys of at most {METADATA_KEY} characters and "
            f"values of at most {METADATA_VALUE}.",
            param="metadata",
        ) from None

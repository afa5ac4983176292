"""Wire models of `/v1/batches`, as OpenAI's API has them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from tandem.api.openai.fine_tuning import Metadata

Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
WINDOW_S = 86_400
"""Seconds within which a batch is processed; what has no answer then expires."""


class OutputExpiresAfter(BaseModel):
    """When output and error file expire."""

    model_config = ConfigDict(extra="forbid")

    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=2_592_000)


class BatchCreation(BaseModel):
    """Body of a creation."""

    model_config = ConfigDict(extra="forbid")

    completion_window: Literal["24h"]
    endpoint: Endpoint
    input_file_id: str = Field(min_length=1, max_length=64, description="id of a file of the purpose batch")
    metadata: Metadata | None = None
    output_expires_after: OutputExpiresAfter | None = None


class BatchError(BaseModel):
    """A line of the input file that cannot be used."""

    code: str
    message: str
    line: int | None = None
    """From 1."""
    param: str | None = None


class BatchErrors(BaseModel):
    """Why a batch failed before any request was sent."""

    object: Literal["list"] = "list"
    data: list[BatchError]


class RequestCounts(BaseModel):
    """Requests of a batch."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class Batch(BaseModel):
    """One batch."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: BatchErrors | None = None
    input_file_id: str
    completion_window: str = "24h"
    status: Status
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    """Seconds since 1970; so are the other times."""
    in_progress_at: int | None = None
    expires_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = Field(default_factory=RequestCounts)
    metadata: dict[str, str] | None = None
    model: str | None = None
    """The model of its requests, where they are for one."""


class BatchList(BaseModel):
    """One page of batches, newest first."""

    object: Literal["list"] = "list"
    data: list[Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool

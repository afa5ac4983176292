"""Wire models of the routes that manage adapters."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class AdapterRegistration(BaseModel):
    """Body of a registration."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(min_length=1, description="what the adapter is called")
    source: str = Field(
        min_length=1, description="a folder in peft's format, a URI of one, or the id of a training job"
    )
    base: str | None = Field(
        None, description="the registered model that it adapts; the base of a job's adapter is known"
    )
    tenant: str | None = Field(
        None, min_length=1, max_length=63, description="whom a new name belongs to; the tenant of the base, or all"
    )
    promote: bool = Field(True, description="whether the name resolves to this version from the next request on")


class Adapter(BaseModel):
    """One version of an adapter."""

    id: str
    object: Literal["adapter"] = "adapter"
    name: str
    version: int
    base: str | None
    rank: int | None
    source: str
    digest: str
    lineage: dict[str, Any]
    created_at: str
    """ISO 8601, UTC."""
    tenant: str | None
    """Whom the name belongs to; null: it is shared."""


class ListedAdapter(Adapter):
    """A version in a list."""

    promoted: bool
    pinned: bool


class AdapterList(BaseModel):
    """One page of adapters."""

    object: Literal["list"] = "list"
    data: list[ListedAdapter]
    has_more: bool
    last_id: str | None
    """`after` of the next page."""


class AdapterPromotion(BaseModel):
    """An entry in the history of a name."""

    id: str
    at: str
    taken_back: bool


class AdapterDetails(Adapter):
    """A version, the history of its name (newest first), and the ids of the replicas that hold it in memory."""

    promotions: list[AdapterPromotion]
    replicas: list[str]


class PinnedAdapter(Adapter):
    """A version whose name or id was pinned."""

    pinned: Literal[True] = True


class UnpinnedAdapter(BaseModel):
    """A name or id that is not pinned any more."""

    id: str
    pinned: Literal[False] = False
    was_pinned: bool


class DeletedAdapters(BaseModel):
    """Ids of the versions that were deleted."""

    deleted: list[str]


class ReplicaAdapters(BaseModel):
    """Adapters at one replica."""

    replica: str
    base: str
    state: str
    in_slots: list[str]
    in_memory: list[str]
    loads: int
    """Adapters that it has loaded since it started."""
    not_kept: dict[str, str]
    """Pinned adapters that it could not load, with the reasons."""


class AdapterResidency(BaseModel):
    """The adapters at each replica."""

    object: Literal["list"] = "list"
    data: list[ReplicaAdapters]


class Error(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Body of every answer with a status of 400 or above."""

    error: Error

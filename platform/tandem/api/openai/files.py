"""Wire models of OpenAI's files and of its uploads in parts."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

HOUR_S, DAY_S = 3600, 86_400

UploadPurpose = Literal["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]
"""Purposes of files that clients make."""
FilePurpose = Literal[UploadPurpose, "assistants_output", "batch_output", "fine-tune-results"]


class ExpiresAfter(BaseModel):
    """When a file expires."""

    model_config = ConfigDict(extra="forbid", strict=True)

    anchor: Literal["created_at"] = Field(description="the time from which the seconds count: created_at")
    seconds: int = Field(ge=HOUR_S, le=30 * DAY_S, description="seconds after which the file expires")


class FileForm(BaseModel):
    """Fields of the form that uploads a file, beside the file."""

    model_config = ConfigDict(extra="forbid")

    purpose: UploadPurpose = Field(description="what the file is for")
    expires_after: ExpiresAfter | None = None


class UploadCreation(BaseModel):
    """Body that begins an upload in parts."""

    model_config = ConfigDict(extra="forbid", strict=True)

    bytes: int = Field(ge=1, description="size of the whole file")
    filename: str = Field(min_length=1, max_length=255, description="name of the file")
    mime_type: str = Field(min_length=1, max_length=255, description="media type of the file")
    purpose: UploadPurpose = Field(description="what the file is for")
    expires_after: ExpiresAfter | None = None


class UploadCompletion(BaseModel):
    """Body that ends an upload in parts."""

    model_config = ConfigDict(extra="forbid", strict=True)

    part_ids: list[str] = Field(min_length=1, max_length=10_000, description="ids of the parts in their order")
    md5: str | None = Field(default=None, max_length=64, description="MD5 of the whole file in hexadecimal digits")


class FileObject(BaseModel):
    """One file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    """Seconds since 1970, as are the other times."""
    expires_at: int | None
    filename: str
    purpose: FilePurpose
    status: Literal["uploaded", "processed", "error"]
    status_details: str | None


class FileList(BaseModel):
    """One page of files."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFile(BaseModel):
    """Answer to a deletion."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class Upload(BaseModel):
    """An upload in parts."""

    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: FilePurpose
    status: Literal["pending", "completed", "cancelled", "expired"]
    file: FileObject | None
    """The file that it has become."""


class UploadPart(BaseModel):
    """A part of an upload."""

    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str

"""Records of files and uploads, their purposes, statuses and ids. Plain data."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

BATCH_LIFETIME = timedelta(days=30)
"""Time until a file for a batch expires, unless its creator says otherwise, as at OpenAI."""
SHORTEST_LIFETIME_S, LONGEST_LIFETIME_S = 3600, 30 * 86_400
"""Bounds of `expires_after.seconds`."""
LONGEST_FILENAME = 255
"""Characters of a file's name."""


class Purpose(StrEnum):
    """What a file is for."""

    ASSISTANTS = "assistants"
    BATCH = "batch"
    FINE_TUNE = "fine-tune"
    VISION = "vision"
    USER_DATA = "user_data"
    EVALS = "evals"
    ASSISTANTS_OUTPUT = "assistants_output"
    BATCH_OUTPUT = "batch_output"
    FINE_TUNE_RESULTS = "fine-tune-results"

    @property
    def is_output(self) -> bool:
        """Whether jobs alone make such files."""
        return self in (Purpose.ASSISTANTS_OUTPUT, Purpose.BATCH_OUTPUT, Purpose.FINE_TUNE_RESULTS)


class FileStatus(StrEnum):
    """Whether a file's content has been checked. Files whose content is not checked when they are uploaded are processed."""

    UPLOADED = "uploaded"
    PROCESSED = "processed"
    ERROR = "error"


class UploadStatus(StrEnum):
    """State of an upload in parts; all but `pending` are final."""

    PENDING = "pending"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


@dataclass(frozen=True, kw_only=True, slots=True)
class NewFile:
    """A file to be recorded, whose content is stored."""

    id: str
    tenant: str
    key_id: str
    purpose: Purpose
    filename: str
    size_bytes: int
    sha256: str
    location: str
    lifetime_s: int | None = None
    """Seconds until it expires; None: the default of its purpose."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """A file."""

    id: str
    tenant: str
    key_id: str
    purpose: Purpose
    filename: str
    size_bytes: int
    sha256: str
    location: str
    """Path or URI of the content."""
    status: FileStatus
    status_details: str | None
    """Of a file with the status `error`: what is wrong, with the line."""
    created_at: datetime
    expires_at: datetime | None


@dataclass(frozen=True, kw_only=True, slots=True)
class UploadRecord:
    """An upload in parts."""

    id: str
    tenant: str
    key_id: str
    purpose: Purpose
    filename: str
    size_bytes: int
    """Size that the client has announced."""
    status: UploadStatus
    created_at: datetime
    expires_at: datetime
    file_lifetime_s: int | None = None
    part_ids: tuple[str, ...] | None = None
    """The parts in their order, once it is completed."""
    file_id: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PartRecord:
    """A part of an upload."""

    id: str
    upload_id: str
    size_bytes: int
    location: str
    created_at: datetime


def new_file_id() -> str:
    """A random id; nobody can guess it."""
    return f"file-{secrets.token_hex(12)}"


def new_upload_id() -> str:
    """A random id."""
    return f"upload_{secrets.token_hex(16)}"


def new_part_id() -> str:
    """A random id."""
    return f"part_{secrets.token_hex(16)}"


def expiry_of(purpose: Purpose, created_at: datetime, lifetime_s: int | None) -> datetime | None:
    """When a file expires; `lifetime_s` None: the default of its purpose, which for most is never."""
    if lifetime_s is not None:
        return created_at + timedelta(seconds=lifetime_s)
    return created_at + BATCH_LIFETIME if purpose in (Purpose.BATCH, Purpose.BATCH_OUTPUT) else None

"""Config of uploaded files: where contents are stored, sizes, quota."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.config import check

GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class FilesConfig:
    """Files that clients upload (`/v1/files`, `/v1/uploads`) and that jobs write for them."""

    location: str | None = None
    """Folder, or URI such as s3://bucket/files, that holds the contents; every node must reach it. Unset: TANDEM_HOME/files."""
    max_file_bytes: int = 512 * 2**20
    """Largest file of `POST /v1/files`, in bytes; a larger one gets 413."""
    max_upload_bytes: int = 8 * GIB
    """Largest file that is uploaded in parts (`POST /v1/uploads`), in bytes."""
    max_part_bytes: int = 64 * 2**20
    """Largest part of such an upload, in bytes."""
    tenant_bytes: int = 100 * GIB
    """Bytes that the files and pending uploads of one tenant may have together; more gets 403."""
    upload_timeout_s: float = 3600.0
    """Seconds that a client may take to send one file or part; one that is silent for `gateway.upload_timeout_s` gets 408 before
    that."""

    def __post_init__(self) -> None:
        for key in ("max_file_bytes", "max_upload_bytes", "max_part_bytes", "tenant_bytes"):
            check.at_least(f"gateway.files.{key}", getattr(self, key), 1)
        check.between("gateway.files.upload_timeout_s", self.upload_timeout_s, 1.0, 86_400.0)

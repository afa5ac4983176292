"""Sources of adapters that the admin route takes: jobs, folders below TANDEM_HOME, and those in `gateway.adapter_sources`.

A source is read by the gateway and by every replica of the base, with their credentials.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tandem.gateway.errors import ApiError
from tandem.storage import is_remote


def check_source(source: str, allowed: Iterable[str], home: Path) -> None:
    """ApiError 403 for a source that is neither a job's id nor below `home` or one of the `allowed` folders and URIs."""
    if is_remote(source):
        is_allowed = any(is_remote(prefix) and _is_below(source, prefix) for prefix in allowed)
    elif "/" not in source and not source.startswith("~") and not Path(source).exists():
        return  # a job's id; the registration refuses an unknown one
    else:
        path = Path(source).expanduser().resolve()
        folders = [home, *(Path(prefix).expanduser() for prefix in allowed if not is_remote(prefix))]
        is_allowed = any(path.is_relative_to(folder.resolve()) for folder in folders)
    if not is_allowed:
        kind = "URI" if is_remote(source) else "folder"
        raise ApiError(
            403,
            f"`source` is a {kind} that this route does not take: it takes ids of jobs, folders below TANDEM_HOME, and what is "
            "below an entry of gateway.adapter_sources. `tandem adapters register` takes any.",
            code="source_not_allowed",
            param="source",
        )


def _is_below(source: str, prefix: str) -> bool:
    """Whether a URI is another one or below it, as every store reads it."""
    suffix = source[len(prefix.rstrip("/")) :] if source.startswith(prefix.rstrip("/")) else None
    if suffix is None or (suffix and not suffix.startswith("/")):
        return False
    has_plain_path = (
        "::" not in suffix and "?" not in suffix and "#" not in suffix and "%" not in suffix and "\\" not in suffix
    )
    return has_plain_path and ".." not in suffix.split("/")
